"""A distributed checkpoint as two Hugging Face folders, with what the run knows: its tokenizer, its model cards."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from joint_train.checkpoint.compat import FROZEN_BASE, check_frozen_base
from joint_train.checkpoint.layout import AVERAGE, Manifest, check_files, damage_error, find_newest
from joint_train.checkpoint.layout import MANIFEST as COMPLETE
from joint_train.checkpoint.layout import verify as verify_sizes
from joint_train.config import Config, read
from joint_train.config.values import as_saved, grown_rows
from joint_train.data.template import ASSISTANT, encode
from joint_train.data.tokenizer import CONVERSATION, end_token_ids, load_tokenizer, read_tokenizer
from joint_train.distributed.ranks import Ranks
from joint_train.errors import ConfigError, DataError
from joint_train.model_card import model_cards
from joint_train.weights.adapter import export_adapter, fill_from_checkpoint
from joint_train.weights.changes import Changes
from joint_train.weights.export import compare_checkpoint, export_checkpoint, verify
from joint_train.weights.folders import read_config, resolve
from joint_train.weights.identity import frozen_base
from joint_train.weights.loading import build_meta, stored_tensors
from joint_train.weights.placing import MANIFEST, PARTS, discard, place, refuse_to_replace
from joint_train.weights.placing import verify as verify_files
from joint_train.weights.run_files import RunFiles, list_of_ids
from joint_train.weights.settle import changes_of_base, merged_adapters

log = logging.getLogger(__name__)


def export_run(
    checkpoint: Path,
    out: Path,
    check: bool = False,
    max_shard_size: str | None = None,
    base: str | None = None,
    drafter: str | None = None,
    kv_shared_weights: bool = False,
    tokenizer: str | None = None,
) -> int:
    """What the command does. Returns 1 if `check` found a difference, 0 otherwise.

    Raises:
        DamagedCheckpoint, ConfigError: before anything is written; for a folder that has something else, too.
    """
    manifest = verify_checkpoint(checkpoint)
    cfg = run_config(checkpoint)
    cfg.model.base, cfg.model.drafter = base or cfg.model.base, drafter or cfg.model.drafter
    cfg.data.tokenizer = tokenizer or cfg.data.tokenizer
    if checkpoint.resolve() in (out.resolve(), *out.resolve().parents):
        raise ConfigError(f"{out} is the checkpoint, or lies in it: give another folder for the export.")
    refuse_to_replace(out, (cfg.model.base, cfg.model.drafter), others=True)
    trained_with = run_tokenizer(cfg)
    options = cfg.data.chat_template_kwargs
    ends = [] if trained_with is None else end_token_ids(trained_with, options)
    unused = cfg.model.export.kv_shared_weights or kv_shared_weights
    parts: dict[str, tuple[PreTrainedModel, Path, Changes]] = {}
    outs: list[Path] = []
    sources = (
        resolve(cfg.model.base, cfg.model.revision, cfg.model.cache_dir),
        resolve(cfg.model.drafter, cfg.model.drafter_revision, cfg.model.cache_dir),
    )
    state = json.loads((checkpoint / "state.json").read_bytes()) if (checkpoint / "state.json").exists() else {}
    before, measured = ((state.get(name) or {}) for name in ("before", "measured"))
    cards = model_cards(cfg, sources, manifest.step, before, measured)
    weights = {"base": "base/model", "drafter": "drafter/model"}
    if as_saved(cfg):
        del weights["base"]
    if (checkpoint / AVERAGE).is_dir():
        weights |= {"drafter": AVERAGE} | ({"drafter_last": "drafter/model"} if cfg.model.export.drafter_last else {})
    try:
        if as_saved(cfg) and not cfg.lora.r:
            check_base(checkpoint, cfg, sources[0], Changes())
        if as_saved(cfg) and cfg.lora.r:
            config = read_config(sources[0], text_config=cfg.model.text_config, quantized=True)
            model = build_meta(config, torch.bfloat16)
            fill_from_checkpoint(model, cfg, checkpoint, sources[0])
            outs.append(out / "adapter")
            export_adapter(model, out / "adapter", in_place=False, card=cards["adapter"])
        for part in weights:
            source, tokens = (sources[0], None) if part == "base" else (sources[1], cfg.drafter.num_steps)
            overrides = cfg.model.text_config if part == "base" else None
            rows = grown_rows(cfg)
            model = build_meta(read_config(source, text_config=overrides, rows=rows), torch.bfloat16)
            changes = Changes(rows=rows)  # all other values are the checkpoint's
            outs.append(out / part)
            if part == "base" and cfg.lora.r:
                changes = changes_of_base(cfg, model, source, Ranks(cfg.parallel.timeout_seconds), merged_adapters(cfg))
                fill_from_checkpoint(model, cfg, checkpoint, source, changes)
                outs.append(out / "adapter")
                export_adapter(model, out / "adapter", in_place=False, card=cards["adapter"])
            elif part == "base" and (checkpoint / FROZEN_BASE).exists():
                changes = changes_of_base(cfg, model, source, Ranks(cfg.parallel.timeout_seconds), merged_adapters(cfg))
                check_base(checkpoint, cfg, source, changes)
            export_checkpoint(
                checkpoint / weights[part], model, source, out / part,
                max_shard_size or cfg.model.export.max_shard_size, num_assistant_tokens=tokens,
                kv_shared_weights=unused, in_place=False, changes=changes,
                files=RunFiles(trained_with, ends, cards[part]),
            )  # fmt: skip
            parts[part] = model, source, changes
        place(outs, whole=True)
    except BaseException:
        discard(outs)
        raise
    problems = 0
    for part, (model, source, changes) in parts.items():
        print(f"{out / part}: {len(stored_tensors(out / part))} tensors")
        if check:
            found = verify(out / part, source, unused, changes=changes)
            found += compare_checkpoint(checkpoint / weights[part], model, source, out / part, changes)
            problems += print_problems(f"{out / part} differs from {source} and {checkpoint}", found)
            if not found:
                print(f"{out / part}: names, shapes and dtypes as in {source}, values as in step {manifest.step}")
    if check and trained_with is not None:
        found = compare_tokens(list(parts), out, trained_with, options)
        problems += print_problems(f"{out} doesn't prompt and end as training did", found)
        if not found:
            print(f"{out}: a conversation has the tokens of training, and generation ends where answers end there")
    return (verify_export(out) if check else 0) or int(problems > 0)


def check_base(checkpoint: Path, cfg: Config, source: Path, changes: Changes) -> None:
    """Compare a base that isn't in the checkpoint with the one that it was trained on.

    Raises:
        CheckpointError: if it is another.
    """
    if (document := checkpoint / FROZEN_BASE).exists():
        now = frozen_base(source, changes, cfg.model.quantization)
        check_frozen_base(checkpoint, json.loads(document.read_bytes()), now)


def run_tokenizer(cfg: Config) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a run was trained with; None, with a warning, if the base's folder has none any more.

    Raises:
        ConfigError: if ``data.tokenizer`` can't be read.
    """
    try:
        return load_tokenizer(cfg)
    except ConfigError as error:
        if cfg.data.tokenizer:
            raise ConfigError(f"{error} Give the run's tokenizer with --tokenizer.") from error
        log.warning("the export gets no tokenizer, and its tokens can't be compared with training's: %s", error)
        return None


def compare_tokens(
    parts: list[str], out: Path, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> list[str]:
    """What the folders of an export make of a conversation otherwise than training did.

    Args:
        tokenizer, options: of training, and its chat template's.
    """
    problems = []
    for part in parts:
        problems += [f"{part}: {problem}" for problem in _other_tokens(out / part, tokenizer, options)]
        ends = list_of_ids(GenerationConfig.from_pretrained(out / part).eos_token_id)
        problems += [
            f"{part}: generation doesn't end with {tokenizer.convert_ids_to_tokens(token)} ({token})"
            for token in end_token_ids(tokenizer, options)
            if token not in ends
        ]
    return problems


def _other_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> list[str]:
    """How the tokens differ that a folder's tokenizer gives: of a conversation, or without a template of a text."""
    try:
        exported: Any = read_tokenizer(folder)
    except ConfigError:
        return ["there is no tokenizer that can be read"]
    if not tokenizer.chat_template:
        text = {"text": "Some text."}
        same = encode(text, exported)[-1].tokens.tolist() == encode(text, tokenizer)[-1].tokens.tolist()
        return [] if same else ["its tokenizer gives other tokens for a text"]
    if not exported.chat_template:
        return ["there is no chat template"]
    conversation = {"messages": CONVERSATION, "chat_template_kwargs": options}
    wanted = encode(conversation, tokenizer)[-1]
    try:
        found = encode(conversation, exported)[-1]
    except DataError as error:
        return [f"its chat template refuses a conversation: {error}"]
    start = int(np.flatnonzero(wanted.flags & ASSISTANT)[0])
    prompt = exported.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True, tokenize=False, **options)
    served = [*exported(prompt, add_special_tokens=False)["input_ids"], *found.tokens[start:].tolist()]
    return [] if served == wanted.tokens.tolist() else ["its tokenizer or chat template gives other tokens"]


def load_problems(folder: Path) -> list[str]:
    """What transformers misses, or doesn't know, when it loads a folder with ``AutoModelForCausalLM``."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except Exception as error:  # of many kinds
        return [f"transformers can't load it: {type(error).__name__}: {error}"]
    info = loaded[1]
    return [
        f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind], key=str)[:5]))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    ]


def verify_export(folder: Path) -> int:
    """Compare the folders of an export, or one of them, with their checksums. Returns 1 for a difference.

    Raises:
        WeightsError: if there is no whole export, or none with checksums.
    """
    parts = [folder / part for part in PARTS if (folder / part / MANIFEST).exists()]
    problems = 0
    for part in parts or [folder]:
        found = verify_files(part)
        problems += print_problems(f"{part} isn't what the export wrote", found)
        if not found:
            print(f"{part}: every file as the export wrote it")
        if (part / "config.json").exists():
            found = load_problems(part)
            problems += print_problems(f"{part} isn't what transformers expects", found)
            if not found:
                print(f"{part}: loaded with transformers")
    return int(problems > 0)


def print_problems(what: str, problems: list[str]) -> int:
    """Print problems; returns how many there are."""
    if problems:
        print(f"{what}:", *problems, sep="\n  ", file=sys.stderr)
    return len(problems)


def verify_checkpoint(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint whose weights and configuration have every byte that was written.

    Raises:
        ConfigError: if the folder isn't a checkpoint.
        CheckpointError: if it is incomplete or damaged, naming every wrong file.
    """
    if not os.path.lexists(checkpoint / COMPLETE):
        steps = checkpoint / "checkpoints" if (checkpoint / "checkpoints").is_dir() else checkpoint
        newest = find_newest(steps) if steps.is_dir() else None
        hint = f"; the newest one there is {newest}" if newest else ""
        raise ConfigError(
            f"{checkpoint} isn't a complete checkpoint (no COMPLETE in it): give a step_NNNNNNNN folder{hint}."
        )
    manifest = verify_sizes(checkpoint, contents=False)
    names = [name for name in manifest.files if name.startswith(("base/", "drafter/")) or name == "config.json"]
    if problems := check_files(checkpoint, manifest, names):
        raise damage_error(checkpoint, problems)
    return manifest


def run_config(checkpoint: Path) -> Config:
    """The configuration of the run that wrote a checkpoint: its config.yaml, else what the checkpoint has of it.

    Raises:
        ConfigError: if there is none, or none that can be read.
    """
    file = checkpoint.resolve().parent.parent / "config.yaml"
    if not file.exists():
        file = checkpoint / "config.json"
    if not file.exists():
        raise ConfigError(
            f"no configuration of the run at {checkpoint.resolve().parent.parent / 'config.yaml'}, and no config.json "
            f"in {checkpoint}."
        )
    return read(file)
