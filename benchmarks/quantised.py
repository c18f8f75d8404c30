"""What quantising a base costs its drafter, and what a drafter gains that is trained on the quantised base.

    python -m benchmarks.quantised DIR                   # three start pairs, all ways of rounding
    python -m benchmarks.quantised DIR --starts 0 --forms int4 int3

A start pair is a starter pair of other random weights that was trained on docstrings. The linear layers of its base are
rounded (to float32 numbers that the codes stand for), and its drafter is tuned with the base frozen: on the base as it
was, and on each rounded one. Each drafter is measured on every base: as it was, tuned on bf16, tuned on that base. The
expected length is 1 + the expected number of sampled drafts that are accepted, on held-out answers; beside it stands
what greedy decoding of held-out prompts settles a base forward, which is noisy, since a base this small repeats itself.
Intervals are 95 % bootstrap intervals, hierarchical: over start pairs and over prompts. Whatever is finished in DIR
isn't run again.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import results
from benchmarks.greedy import expected_lengths, greedy_texts, verifications
from benchmarks.joint import conversations, hierarchical, load_base, rows_of
from benchmarks.runs import starter_pair, train
from joint_train.command import start
from joint_train.config import DataConfig, load
from joint_train.distributed.quantised import KINDS, block_size, dequantise, quantise
from joint_train.evaluate.prompts import chat_prompt
from joint_train.files import replace
from joint_train.pair.model import JointModel

LINEAR = re.compile(r".*layers\.\d+\..*(_proj|experts\.\w+)(\.weight)?$")
GROUP = 32
DRAFTERS = {"stale": "as it was", "bf16": "tuned on bf16", "own": "tuned on this base"}
COLUMNS = {
    "base": ("base", ""),
    "error": ("weights changed by", ".2%"),
    **{drafter: (f"expected length, {name}", ".3f") for drafter, name in DRAFTERS.items()},
    "gain": ("tuned on this base against bf16", "+.1%"),
    **{f"{drafter}_decoded": (f"decoded greedily, {name}", ".3f") for drafter, name in DRAFTERS.items()},
    "gain_decoded": ("tuned on this base against bf16", "+.1%"),
}


def kept(kind: str) -> Callable[[Tensor], Tensor]:
    """Rounding as ``model.quantization=kind`` does it."""

    def rounded(weight: Tensor) -> Tensor:
        block = block_size(kind, weight.shape[-1])
        return dequantise(*quantise(weight, kind, block), kind, block, torch.float32)

    return rounded


def integers(bits: int) -> Callable[[Tensor], Tensor]:
    """Symmetric integers with a scale for each group of 32 numbers of a row, to the nearest."""
    highest = 2 ** (bits - 1) - 1

    def rounded(weight: Tensor) -> Tensor:
        groups = weight.float().unflatten(-1, (-1, GROUP))
        scale = (groups.abs().amax(-1, keepdim=True) / highest).clamp(min=1e-12)
        return ((groups / scale).round().clamp(-highest - 1, highest) * scale).flatten(-2)

    return rounded


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": lambda weight: weight.float(),
    **{kind: kept(kind) for kind in ("int8", "fp8", "nf4")},
    "int4": integers(4),
    "int3": integers(3),
}
assert KINDS.keys() <= FORMS.keys()


def round_base(source: Path, out: Path, form: str) -> float:
    """Write a base with its decoder's linear layers rounded, in float32; returns by how much they changed.

    Returns:
        The root mean square of the change, as a share of the rounded weights.
    """
    if not (out / "error.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(source, out, ignore=shutil.ignore_patterns("joint_train_export.json"))
        weights = load_file(source / "model.safetensors")
        changed = size = 0.0
        for name, weight in weights.items():
            weights[name] = weight.float()
            if LINEAR.fullmatch(name) and weight.shape[-1] % GROUP == 0:
                weights[name] = FORMS[form](weight).contiguous()
                changed += float((weights[name] - weight.float()).square().sum())
                size += float(weight.float().square().sum())
        save_file(weights, out / "model.safetensors", {"format": "pt"})
        replace(out / "error.json", json.dumps((changed / size) ** 0.5))
    return json.loads((out / "error.json").read_text())


@torch.no_grad()
def measured(base_folder: Path, drafters: dict[str, Path], data: DataConfig, options: argparse.Namespace) -> dict:
    """For each drafter, sums of each held-out prompt: expected lengths of its rows, and how many rows there are; tokens
    settled while the base decodes, and its verifications."""
    base, tokenizer = load_base(base_folder), transformers.AutoTokenizer.from_pretrained(base_folder)
    messages = conversations(Path(data.val[0].path), options.prompts)
    rows = rows_of(tokenizer, messages, data.max_length)
    prompts = [chat_prompt(conversation, tokenizer, "held out").ids for conversation in messages[: options.decoded]]
    texts = greedy_texts(base, prompts, options.max_new_tokens)
    found = {}
    for name, folder in drafters.items():
        drafter = transformers.Gemma4AssistantForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        pair = JointModel(base, drafter, drafter_num_steps=options.num_steps).eval()
        settled = verifications(pair, prompts, texts)
        decoded = {"settled": [sum(one) for one in settled], "verifications": [len(one) for one in settled]}
        found[name] = expected_lengths(pair, rows) | decoded
    return found


def of_start(number: int, options: argparse.Namespace) -> dict[str, dict]:
    """What one start pair reached: for each form its error, and the counts of each drafter."""
    folder = options.work_dir / f"start_{number}"
    pair = starter_pair(folder / "pair", number, options.timeout)
    common = [f"seed={number}", f"drafter.num_steps={options.num_steps}", *options.set]
    trained = train(folder / "start", pair, *common, f"max_steps={options.start_steps}", timeout=options.timeout)
    export, found = trained / "export", {}
    data = load(["+experiment=starter", f"pair={pair}"]).data

    def tuned(base: Path, name: str) -> Path:
        settings = [f"model.base={base}", f"model.drafter={export}/drafter", "freeze.base=true"]
        settings += [f"max_steps={options.steps}", *common]
        return train(folder / "tuned" / name, pair, *settings, timeout=options.timeout) / "export/drafter"

    on_bf16 = tuned(export / "base", "bf16")
    for form in options.forms:
        file = folder / "measured" / f"{form}.json"
        base = folder / "bases" / form
        error = round_base(export / "base", base, form)
        drafters = {"stale": export / "drafter", "bf16": on_bf16}
        drafters["own"] = on_bf16 if form == "bf16" else tuned(base, form)
        if not file.exists():
            print(f"{folder}: {form}", file=sys.stderr, flush=True)
            file.parent.mkdir(exist_ok=True)
            replace(file, json.dumps(measured(base, drafters, data, options)) + "\n")
        found[form] = {"error": error, **json.loads(file.read_text())}
    return found


def summary(found: list[dict[str, dict]]) -> list[dict[str, results.Value]]:
    """A row for each form, over the start pairs."""
    rows: list[dict[str, results.Value]] = []
    for form in found[0]:
        row: dict[str, results.Value] = {"base": form, "error": results.spread([one[form]["error"] for one in found])}
        for suffix, sums in (("", ("lengths", "rows")), ("_decoded", ("settled", "verifications"))):
            for drafter in DRAFTERS:
                of_drafter = [[[one[form][drafter][key] for key in sums]] for one in found]
                row[f"{drafter}{suffix}"] = hierarchical(of_drafter, lambda settled, times: settled / times)
            both = [[[one[form][drafter][key] for drafter in ("own", "bf16") for key in sums]] for one in found]
            row[f"gain{suffix}"] = hierarchical(both, lambda a, m, b, n: (a / m) / (b / n) - 1)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--starts", type=int, nargs="+", default=[0, 1, 2], help="start pairs, by their seeds")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS, help="ways of rounding")
    parser.add_argument("--start-steps", type=int, default=600, help="of the training on docstrings")
    parser.add_argument("--steps", type=int, default=150, help="of a drafter's tuning")
    parser.add_argument("--num-steps", type=int, default=4, help="K, in training and decoding")
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts")
    parser.add_argument("--decoded", type=int, default=50, help="of them that are decoded")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for one run")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every run")
    results.add_option(parser)
    options = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()

    def run() -> int:
        found = [of_start(number, options) for number in options.starts]
        results.finish(results.record("quantised", COLUMNS, summary(found)), options.results)
        return 0

    return start("benchmarks.quantised", run)


if __name__ == "__main__":
    sys.exit(main())
