"""Two drafters of one base on the same prompts: the table that users publish, with paired intervals.

The intervals are bootstrap intervals over prompts: whole prompts are drawn, with all of their verifications, and both
drafters get the same ones. So what makes a prompt easy for both cancels out of the difference.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from joint_train.errors import ConfigError
from joint_train.evaluate.compare import names
from joint_train.evaluate.intervals import interval
from joint_train.evaluate.page import (
    DRAFTS,
    Section,
    Table,
    errorbars,
    figure,
    format_interval,
    plots_available,
    whole_numbers,
)
from joint_train.weights.placing import replace_file

TITLE = "Speculative decoding, before and after"
# What is compared: its columns, of each prompt, and the ratio of two of their sums.
QUANTITIES: dict[str, tuple[str, str, str]] = {
    "tokens_per_forward": ("tokens per base forward", "settled", "verifications"),
    "first": ("first draft accepted", "first_accepted", "first_drafted"),
    "accepted": ("drafts accepted", "accepted", "drafted"),
}


def compare(results: Mapping[str, Any], other: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """Each K of two measurements of the same prompts.

    Args:
        results, other: what :func:`joint_train.evaluate.measure.measure` found with the drafter and with the other one.

    Returns:
        JSON-able, for each K: ``num_steps`` and by quantity ``before`` (of the other), ``after`` and ``difference``,
        with their intervals; of ``speedup``, that over plain decoding, also ``ratio``, the tokens/s of the one over
        those of the other.

    Raises:
        ValueError: if they are not of the same prompts or K.
    """
    rows = []
    for one, two in zip(results["speculative"], other["speculative"], strict=True):
        after, before = one["of_prompts"], two["of_prompts"]
        if one["num_steps"] != two["num_steps"] or len(after["tokens"]) != len(before["tokens"]):
            raise ValueError("two measurements can be compared only on the same prompts and with the same K")
        row: dict[str, Any] = {"num_steps": one["num_steps"]}
        for name, (_, part, whole) in QUANTITIES.items():
            ratios = [before[part], before[whole]], [after[part], after[whole]]
            row[name] = _paired(*ratios, lambda p, w: p / w, seed)

        def times(of: Mapping[str, Any], measured: Mapping[str, Any]) -> list[list[float]]:
            plain = measured["plain"]["of_prompts"]
            return [of["tokens"], of["seconds"], plain["tokens"], plain["seconds"]]

        faster = times(before, other), times(after, results)
        row["speedup"] = _paired(*faster, lambda t, s, pt, ps: (t / s) / (pt / ps), seed)
        columns = [after["tokens"], after["seconds"], before["tokens"], before["seconds"]]
        row["speedup"]["ratio"] = interval(columns, lambda t, s, bt, bs: (t / s) / (bt / bs), seed)
        rows.append(row)
    return rows


def _paired(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], statistic: Callable[..., Tensor], seed: int
) -> dict[str, Any]:
    count = len(before)
    return {
        "before": interval(before, statistic, seed),
        "after": interval(after, statistic, seed),
        "difference": interval(
            [*before, *after], lambda *sums: statistic(*sums[count:]) - statistic(*sums[:count]), seed
        ),
    }


def signed(value: Mapping[str, float | None], digits: int = 2) -> str:
    """``+0.52 [+0.45, +0.60]``."""
    if value["value"] is None:
        return "–"
    text = f"{value['value']:+.{digits}f}"
    if value["low"] is None:
        return text
    return f"{text} [{value['low']:+.{digits}f}, {value['high']:+.{digits}f}]"


HEADS = ["", "before", "after", "difference"]


def cells(row: Mapping[str, Any]) -> list[list[str]]:
    """Rows under ``HEADS``."""
    labels = {name: label for name, (label, *_) in QUANTITIES.items()} | {"speedup": "speed-up over plain decoding"}
    return [
        [label, format_interval(row[name]["before"]), format_interval(row[name]["after"])]
        + [signed(row[name]["difference"])]
        for name, label in labels.items()
    ]


def best_row(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The K at which the drafter is the fastest."""
    return max(rows, key=lambda row: row["speedup"]["after"]["value"] or 0)


def note(results: Mapping[str, Any]) -> str:
    """What the numbers are of."""
    prompts, options = results["prompts"], results["options"]
    sets = ", ".join(Path(name).name for name in prompts["name"].split(", "))  # a card is published
    shown = names([Path(results["against"]["drafter"]), Path(results["drafter"])])
    return (
        f"Greedy, {prompts['count']} prompts ({sets}), at most {options['max_new_tokens']} tokens each, "
        f"{options['dtype']} on {options['device']}. Before: {shown[0]}; after: {shown[1]}, on the same base. In "
        "brackets 95 % bootstrap intervals over prompts, of the difference paired."
    )


def markdown(results: Mapping[str, Any]) -> str:
    """The table to publish."""
    row = best_row(results["against"]["rows"])
    lines = [f"| K = {row['num_steps']} | {' | '.join(HEADS[1:])} |", "| --- " * len(HEADS) + "|"]
    lines += [f"| {' | '.join(line)} |" for line in cells(row)]
    return "\n".join([*lines, "", note(results)])


def text(results: Mapping[str, Any]) -> list[str]:
    """The table for a terminal."""
    row = best_row(results["against"]["rows"])
    lines = ["", f"{'K = ' + str(row['num_steps']):<24}{'before':<18}{'after':<18}difference"]
    for label, before, after, change in cells(row):
        lines.append(f"{label.removesuffix(' decoding'):<24}{before:<18}{after:<18}{change}")
    return lines


def section(results: Mapping[str, Any]) -> Section:
    """The part of the page."""
    rows = results["against"]["rows"]
    tables = [Table([f"K = {row['num_steps']}", *HEADS[1:]], cells(row)) for row in [best_row(rows)]]
    every = []
    for row in rows:
        of = row["tokens_per_forward"]
        ratio = row["speedup"]["ratio"]
        every.append(
            [str(row["num_steps"]), format_interval(of["before"]), format_interval(of["after"])]
            + [signed(of["difference"]), format_interval(ratio)]
        )
    heads = ["K", "before", "after", "difference", "tokens/s, after over before"]
    tables.append(Table(heads, every, "Tokens per base forward."))
    made = Section(TITLE, note(results), tables=tables)
    if plots_available():

        def draw(axes: Any) -> None:
            for name in ("before", "after"):
                points = [(row["num_steps"], row["tokens_per_forward"][name]) for row in rows]
                errorbars(axes, [(k, y) for k, y in points if y["value"] is not None], label=name)
            whole_numbers(axes)

        made.figures = [("Tokens per base forward", figure(draw, DRAFTS, "tokens per base forward"))]
    return made


def put_into_card(folder: str, table: str) -> Path:
    """Put the table into the model card of a drafter's folder, in the place of an earlier one or at the end.

    Raises:
        ConfigError: if it is no folder of this machine.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"--write-card: {folder} isn't a folder on this machine; give the export's.")
    file = Path(folder) / "README.md"
    card = file.read_text(encoding="utf-8") if file.exists() else ""
    before, found, rest = card.partition(f"## {TITLE}\n")
    after = ""
    if found and (at := rest.find("\n## ")) >= 0:
        after = rest[at + 1 :]
    before = before.rstrip("\n") + "\n\n" if before.strip() else ""
    replace_file(Path(folder), file.name, f"{before}## {TITLE}\n\n{table}\n" + (f"\n{after}" if after else ""))
    return file
