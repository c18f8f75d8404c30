"""The model card of an export: what the pair was made from, with which data and settings, what it achieved, how to
serve it.

A README.md of the hub's form, with its metadata in front. Folders of this machine are named by their last part only, as
a card is meant to be published; the run's whole configuration is in its ``config.yaml``.
"""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from joint_train.config import Config, SourceConfig, config_to_save
from joint_train.config.values import as_saved, parse_adapters, parse_served
from joint_train.data.readers import source_name
from joint_train.evaluate.serving import serve_command
from joint_train.files import code_version
from joint_train.metrics import SUMMARY

PARTS = {
    "base": "The base of a pair that was trained together with its drafter.",
    "drafter": "A multi-token-prediction drafter, trained together with its base.",
    "adapter": "The LoRA adapters of a base that was trained together with its drafter.",
    "drafter_last": "A multi-token-prediction drafter with the weights of the run's last step. `drafter` beside it has "
    "their average over the steps (`optim.drafter_ema`), and is the one to serve.",
}
FROZEN_PARTS = {
    "base": "The base of a pair. It wasn't trained here; its drafter was, to guess what this base says.",
    "drafter": "A multi-token-prediction drafter, trained on its base, which was not trained.",
}
SETTINGS = (
    "seed", "drafter.num_steps", "drafter.pairing", "drafter.rope_position", "drafter.loss_weight",
    "drafter.base_grad_scale", "loss.drafter", "freeze.base", "freeze.base_after", "freeze.towers", "freeze.embeddings",
    "lora.r", "lora.alpha", "data.max_length", "data.micro_batch_size", "data.packing", "data.train_on", "data.mixture",
    "data.chat_template_kwargs", "optim.name", "optim.lr", "optim.drafter_lr", "optim.schedule", "optim.warmup_steps",
    "optim.grad_accum", "optim.weight_decay", "optim.drafter_ema", "precision.compute", "precision.params",
    "model.text_config", "model.resize_vocabulary", "model.quantization",
)  # fmt: skip
LICENCE = ("license", "license_name", "license_link", "language")


def model_cards(
    cfg: Config,
    sources: tuple[Path, Path],
    step: int,
    before: Mapping[str, float | None],
    measured: Mapping[str, float | None],
) -> dict[str, str]:
    """The text of README.md, for each folder of an export.

    Args:
        sources: the folders of base and drafter that the run began with.
        step: optimizer steps done.
        before, measured: validation metrics before the first step, and last.
    """
    saved = config_to_save(cfg)  # without the values of interpolations, which may be secrets
    made = [*_data(saved), *_settings(saved)]
    served = [*_table("Versions", ("package", "version"), code_version().items()), *_serving(cfg, sources)]
    cards = {}
    for part, sentence in (PARTS | (FROZEN_PARTS if cfg.freeze.base else {})).items():
        if (part == "adapter" and not cfg.lora.r) or (part == "drafter_last" and not cfg.model.export.drafter_last):
            continue
        if part == "base" and as_saved(cfg):
            continue
        lines = [*_metadata(cfg, part, sources), f"# {part}", "", sentence, "", *_origin(cfg, step, part), *made]
        cards[part] = "\n".join([*lines, *_measured(before, measured, part), *served])
    return cards


def _metadata(cfg: Config, part: str, sources: tuple[Path, Path]) -> list[str]:
    """The hub's metadata: the licence is that of the source's own card."""
    of_drafter = part.startswith("drafter")
    source = sources[of_drafter]
    metadata: dict[str, Any] = {key: value for key, value in _front_matter(source).items() if key in LICENCE}
    metadata["library_name"] = "peft" if part == "adapter" else "transformers"
    model = cfg.model.drafter if of_drafter else cfg.model.base
    if _is_hub_id(model):
        metadata |= {"base_model": model, "base_model_relation": "adapter" if part == "adapter" else "finetune"}
    metadata["tags"] = ["gemma4", "speculative-decoding", "multi-token-prediction", "joint-train"]
    return ["---", yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(), "---", ""]


def _front_matter(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        found = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _origin(cfg: Config, step: int, part: str) -> list[str]:
    of_base = f"trained by adapters of rank {cfg.lora.r}" if cfg.lora.r else "frozen" if cfg.freeze.base else "trained"
    if as_saved(cfg):
        of_base += ", with the weights as they are quantised there"
    elif cfg.model.quantization != "none":
        of_base += f", with its weights kept as {cfg.model.quantization}; the export has those of the original"
    if cfg.freeze.base_after is not None:
        of_base += f", until it was frozen by freeze.base_after={cfg.freeze.base_after}"
    rows = [
        ("base", f"{_public(cfg.model.base, cfg.model.revision)} ({of_base})"),
        ("drafter", _public(cfg.model.drafter, cfg.model.drafter_revision)),
        ("optimizer steps", f"{step:,}"),
    ]
    adapters = parse_adapters(cfg.model.adapter)
    named = [f"{_public(adapter.path, adapter.revision)} (weight {adapter.weight:g})" for adapter in adapters]
    if cfg.model.continue_adapter:
        rows.insert(1, ("adapter that was trained on", named.pop()))
    if named:
        rows.insert(1, ("adapters merged into the base", ", ".join(named)))
    if served := parse_served(cfg.model.adapters):
        each = ", ".join(_public(adapter.path, adapter.revision) for adapter in served)
        rows.insert(1, ("adapters that the drafter was trained for, one at a time on the base", each))
    if cfg.data.tokenizer:
        rows.append(("tokenizer", _public(cfg.data.tokenizer)))
    advice = "A drafter guesses what its own base says: serve the two of one export together."
    if part == "adapter" and named:
        advice += (
            " These adapters belong on the base with the ones above merged into it, and give other texts on the base "
            "alone: `base` of the same export has all of them merged."
        )
    return _table("Where it comes from", ("", ""), rows) + [advice, ""]


def _data(saved: dict[str, Any]) -> list[str]:
    rows = []
    for split in ("train", "val"):
        for spec in saved["data"][split]:
            path, on_hub = spec["path"], _is_hub_id(spec["path"])
            where = path if on_hub else os.path.basename(os.path.normpath(path))
            name = source_name(SourceConfig(path=path, name=spec["name"]))
            part = ", ".join(filter(None, (spec["subset"], spec["split"]))) if on_hub else ""
            rows.append((split, name, where, part, f"{spec['weight']:g}", spec["limit"] or "all"))
    return _table("Data", ("", "name", "source", "split", "weight", "examples"), rows)


def _settings(saved: dict[str, Any]) -> list[str]:
    rows = []
    for key in SETTINGS:
        value: Any = saved
        for name in key.split("."):
            value = value[name]
        rows.append((f"`{key}`", f"`{value}`"))
    return _table("Settings", ("key", "value"), rows)


def _measured(before: Mapping[str, float | None], measured: Mapping[str, float | None], part: str) -> list[str]:
    if part == "drafter_last":
        return ["## Measured", "", "Nothing was measured of these weights: the run validated their average.", ""]
    named = SUMMARY | {
        name: f"share of the drafts of round {name.rpartition('_')[2]} that greedy decoding accepts"
        for name in measured
        if name.startswith("val/agreement_")
    }
    rows = [(what, _number(before.get(name)), _number(measured.get(name))) for name, what in named.items()
            if name in before or name in measured]  # fmt: skip
    if not rows:
        return ["## Measured", "", "Nothing was measured: the run had no validation data (`data.val`).", ""]
    return _table("Measured, on the validation data", ("", "before", "after"), rows)


def _serving(cfg: Config, sources: tuple[Path, Path]) -> list[str]:
    base = "`base` the quantised folder named above" if as_saved(cfg) else "the folders `base`"
    lines = ["## Serve", "", f"With {base} and `drafter`, or their ids on the hub:", "", "```"]
    for engine in ("vllm", "sglang"):
        lines += [serve_command(engine, *sources, cfg.drafter.num_steps, None, names=("base", "drafter"))]
    return [
        *lines, "```", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'tokenizer = AutoTokenizer.from_pretrained("base")',
        'base, drafter = (AutoModelForCausalLM.from_pretrained(name) for name in ("base", "drafter"))',
        'chat = [{"role": "user", "content": "Hello!"}]',
        'prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)",
        "print(tokenizer.decode(base.generate(**prompt, assistant_model=drafter)[0]))", "```", "",
    ]  # fmt: skip


def _table(title: str, heads: tuple[str, ...], rows: Iterable[tuple]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (list(heads), ["---"] * len(heads), *cells)]
    return [f"## {title}", "", *lines, ""]


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith(("/", ".", "~", "$")) and not os.path.exists(path)


def _public(path: str, revision: str | None = None) -> str:
    """A hub id with its revision, or the last part of a folder's path."""
    if _is_hub_id(path):
        return f"[{path}](https://huggingface.co/{path})" + (f", revision {revision}" if revision else "")
    return f"`{os.path.basename(os.path.normpath(path))}`, a folder"
