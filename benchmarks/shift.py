"""What fine-tuning does to a drafter that stays as it was: the second half of ``make train``.

    python -m benchmarks.shift OUT data       # OUT/code: functions of Python's standard library to be completed
    python -m benchmarks.shift OUT report     # of OUT/run, and of OUT/detached and OUT/shifted, fine-tuned on the code

OUT/detached was trained with ``drafter.base_grad_scale=0``: its base is bit for bit the one that would be trained
without a drafter. So that run gives two of the pairs that are compared: the new base with the drafter as it was
(stale), and with the drafter that was trained along. In OUT/shifted a tenth of the drafter's gradient reached the base,
which is the default. ``report`` measures them on held-out code and prints a table; its page has the losses, the
acceptance and texts.
"""

import argparse
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import results
from benchmarks.greedy import compared, greedy_texts, verifications
from benchmarks.joint import functions, load_base
from joint_train.command import start
from joint_train.evaluate.compare import curve, load_run
from joint_train.evaluate.measure import interval
from joint_train.evaluate.page import Section, Table, figure, html, plots_available
from joint_train.evaluate.prompts import chat_prompt
from joint_train.files import replace
from joint_train.pair.model import JointModel
from joint_train.starter import chats, write_jsonl

NUM_STEPS = 4
MAX_NEW_TOKENS = 64
COLUMNS = {
    "pair": ("on held-out code", ""),
    "base_loss": ("base loss", ".3f"),
    "tokens_per_forward": ("tokens per base forward", ".2f"),
}
CURVES = ("base_loss", "drafter_loss", "val/base_loss", "val/accepted_length_expected")


def write_data(out: Path) -> None:
    """The second domain's data, the same on every call."""
    folder = out / "code"
    folder.mkdir(parents=True, exist_ok=True)
    learned, held_out = chats(functions(Path(sysconfig.get_paths()["stdlib"])))
    for name, records in (("train", learned), ("val", held_out)):
        write_jsonl(folder / f"{name}.jsonl", records)
    print(f"made: {folder}\n  {len(learned)} training and {len(held_out)} validation examples")


@torch.no_grad()
def measure(pair: tuple[Path, Path], messages: list[list[dict[str, Any]]], max_length: int) -> dict[str, Any]:
    """A pair on held-out conversations: the base's loss, its greedy texts, and what verifications settle of them."""
    base, tokenizer = load_base(pair[0]), transformers.AutoTokenizer.from_pretrained(pair[0])
    drafter = transformers.Gemma4AssistantForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()
    rows = []
    for conversation in messages:
        encoded = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        rows.append((encoded["input_ids"][:max_length], [bool(x) for x in encoded["assistant_masks"]][:max_length]))
    sums = compared(base, base, rows)
    prompts = [chat_prompt(conversation, tokenizer, "code").ids for conversation in messages]
    texts = greedy_texts(base, prompts, MAX_NEW_TOKENS)
    settled = verifications(JointModel(base, drafter, drafter_num_steps=NUM_STEPS).eval(), prompts, texts)
    counts = [sum(s) for s in settled], [len(s) for s in settled]
    return {
        "base_loss": sum(sums["loss"]) / sum(sums["targets"]),
        "tokens_per_forward": interval(list(counts), lambda s, v: s / v, seed=0),
        # Share of verifications that accept more than k drafts.
        "accepted": [sum(n > k + 1 for s in settled for n in s) / max(1, sum(counts[1])) for k in range(NUM_STEPS)],
        "texts": [tokenizer.decode(text, skip_special_tokens=True) for text in texts],
    }


def report(out: Path, prompts: int) -> None:
    """Measure the four pairs, print the table and write the page."""
    before, detached, joint = (out / run / "export" for run in ("run", "detached", "shifted"))
    pairs = {
        "before fine-tuning": (before / "base", before / "drafter"),
        "base fine-tuned, drafter as it was (stale)": (detached / "base", before / "drafter"),
        "both fine-tuned, base_grad_scale=0 (detached)": (detached / "base", detached / "drafter"),
        "both fine-tuned, base_grad_scale=0.1 (joint)": (joint / "base", joint / "drafter"),
    }
    lines = (out / "code" / "val.jsonl").read_text().splitlines()[:prompts]
    messages = [json.loads(line)["messages"] for line in lines]
    found = {name: measure(pair, messages, max_length=128) for name, pair in pairs.items()}

    heads = [heading for heading, _ in COLUMNS.values()]
    measured = [{"pair": name, **{key: of[key] for key in list(COLUMNS)[1:]}} for name, of in found.items()]
    result = results.record("shift", COLUMNS, measured)
    rows = [[results.cell(row[key], form) for key, (_, form) in COLUMNS.items()] for row in measured]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    print()
    for row in (heads, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    page = out / "report.html"
    replace(page, document(out, found, rows, messages))
    replace(out / "shift.json", json.dumps(result, indent=1) + "\n")
    print(f"\nreport: {page}")


def document(out: Path, found: dict[str, dict], rows: list[list[str]], messages: list[list[dict[str, Any]]]) -> str:
    """The page."""
    note = (
        f"{len(messages)} prompts, greedy, K = {NUM_STEPS}, at most {MAX_NEW_TOKENS} tokens; 95 % bootstrap intervals."
    )
    sections = [Section("The pairs", tables=[Table(["pair", "base loss", "tokens per base forward"], rows, note)])]
    if plots_available():

        def draw(axes) -> None:
            for name, of in found.items():
                short = name.partition("(")[2].rstrip(")") or "before"
                axes.plot(range(1, NUM_STEPS + 1), of["accepted"], marker="o", markersize=3, label=short)
            axes.set_ylim(0, 1)

        said = "share of verifications that accept at least so many drafts"
        sections.append(Section("Acceptance", figures=[(said, figure(draw, "drafts", ""))]))
        for title, run in (("Training", "run"), ("Fine-tuning, joint", "shifted")):
            drawn = [(metric, curve([load_run(out / run, run)], metric)) for metric in CURVES]
            sections.append(Section(title, figures=[(metric, svg) for metric, svg in drawn if svg]))
    first, *_, last = found.values()
    texts = [[m[-2]["content"], first["texts"][i], last["texts"][i]] for i, m in enumerate(messages[:8])]
    sections.append(Section("Texts", tables=[Table(["prompt", "before", "after fine-tuning"], texts)]))
    lead = "A base that was fine-tuned, with the drafter as it was and with one that was trained along."
    return html("What joint training keeps", lead, sections)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shift", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("part", choices=("data", "report"))
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts")
    options = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    parts = {"data": lambda: write_data(options.out), "report": lambda: report(options.out, options.prompts)}
    return start("benchmarks.shift", parts[options.part])


if __name__ == "__main__":
    sys.exit(main())
