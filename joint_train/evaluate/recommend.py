"""How many tokens to draft, and below which confidence to stop: what makes the most tokens a second.

A greedy text doesn't depend on what is drafted for it. So one pass of plain decoding that drafts K tokens at each of
its tokens (a scout, see :func:`joint_train.evaluate.decoding.decode`) tells what any policy would have accepted:
walking along the text, n drafts at a time, from one verification to the next. What a policy's verifications and drafts
take is asked of a :class:`joint_train.evaluate.cost.Cost`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joint_train.errors import ConfigError
from joint_train.evaluate.cost import Cost
from joint_train.evaluate.decoding import Decoded
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

NO_DRAFTS: dict[str, Any] = {"num_steps": 0, "threshold": 0.0}


@dataclass(frozen=True)
class Trace:
    """One answer, and what was drafted at each of its tokens but the first, which the prompt's forward gives.

    Attributes:
        matches: at each token, how many of the drafts there are the text's own, in a row.
        confidences: the drafter's largest probability for each draft.
    """

    matches: list[int]
    confidences: list[list[float]]

    @classmethod
    def of(cls, scout: Decoded) -> "Trace":
        """From decoding with ``scout``."""
        matches = []
        for at, drafts in enumerate(scout.drafts, start=1):
            own = scout.ids[at:]
            pairs = enumerate(zip(drafts, own, strict=False))
            matches.append(next((k for k, (draft, token) in pairs if draft != token), min(len(drafts), len(own))))
        return cls(matches, scout.confidences)


@dataclass(frozen=True)
class Round:
    """A verification: the drafts that it got, the passes of the drafter for them, and the tokens that it settled."""

    kept: int
    passes: int
    settled: int


def walk(trace: Trace, num_steps: int, threshold: float) -> list[Round]:
    """The verifications of one answer with at most ``num_steps`` drafts, of which the first with a confidence below
    ``threshold`` and all after it are left out. The pass that made it is made all the same."""
    rounds, at = [], 0
    while at < len(trace.matches):
        confidences = trace.confidences[at][:num_steps]
        kept = next((k for k, confidence in enumerate(confidences) if confidence < threshold), len(confidences))
        settled = min(min(trace.matches[at], kept) + 1, len(trace.matches) - at)
        rounds.append(Round(kept, min(kept + 1, len(confidences)), settled))
        at += settled
    return rounds


def tokens_per_second(rounds: Sequence[Round], cost: Cost, batch: int) -> float:
    """Of all sequences of a batch together, each of which is at any of these verifications.

    The drafter's passes of a batch go on until its last sequence stops, so their number is the expected largest of the
    batch's; the base's forward is taken at the mean number of rows.
    """
    if not rounds:
        return 0.0
    count = len(rounds)
    if batch == 1:
        seconds = sum(cost.verify(1 + r.kept, 1) + r.passes * cost.draft(1) for r in rounds) / count
    else:
        most = max(r.passes for r in rounds)
        passes = sum(1 - (sum(r.passes <= n for r in rounds) / count) ** batch for n in range(most))
        kept = sum(r.kept for r in rounds) / count
        seconds = cost.verify(batch * (1 + kept), batch) + passes * cost.draft(batch)
    return batch * sum(r.settled for r in rounds) / count / seconds


def recommend(
    traces: Sequence[Trace],
    cost: Cost,
    num_steps: Sequence[int],
    thresholds: Sequence[float],
    batches: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """Every policy's acceptance and speed, and the best at each batch size.

    Returns:
        JSON-able: ``batches``; ``policies``, each with ``num_steps``, ``threshold``, ``tokens_per_forward``,
        ``drafts_per_forward`` and ``tokens_per_second`` by batch; ``best`` by batch, and ``best_without_threshold`` for
        engines that have none (vLLM, SGLang).
    """
    policies = []
    for n in (0, *num_steps):
        for threshold in (0.0, *thresholds) if n else (0.0,):
            walked = [walk(trace, n, threshold) for trace in traces]
            rounds = [r for of_answer in walked for r in of_answer]
            counts = [len(of_answer) for of_answer in walked]
            settled, kept = ([sum(getattr(r, name) for r in w) for w in walked] for name in ("settled", "kept"))
            policies.append(
                {
                    "num_steps": n,
                    "threshold": threshold,
                    "tokens_per_forward": interval([settled, counts], lambda s, v: s / v, seed),
                    "drafts_per_forward": interval([kept, counts], lambda d, v: d / v, seed),
                    "tokens_per_second": {str(b): tokens_per_second(rounds, cost, b) for b in batches},
                }
            )
    return chosen(policies, batches)


def recommend_served(
    served: Mapping[str, Any], cost: Cost, measured: Mapping[int, tuple[float, float]]
) -> dict[str, Any]:
    """The same of a running engine's own acceptance, for up to as many drafts as it makes.

    With n of its K drafts a verification accepts what it accepted among the first n: that a text's verifications would
    then be at other places is left out of account.

    Args:
        served: what :func:`joint_train.evaluate.served.served_summary` found.
        measured: tokens/s and tokens per base forward by batch, which ``cost`` was fitted to.
    """
    policies: list[dict[str, Any]] = []
    shares = [position["share"]["value"] or 0.0 for position in served["acceptance"]]
    for n in range(len(shares) + 1):
        value = 1 + sum(shares[:n])
        speeds = {str(b): b * value / (cost.verify(b * (1 + n), b) + n * cost.draft(b)) for b in measured}
        policies.append(
            {
                "num_steps": n,
                "threshold": 0.0,
                "tokens_per_forward": {"value": value, "low": None, "high": None},
                "drafts_per_forward": {"value": float(n), "low": None, "high": None},
                "tokens_per_second": speeds,
            }
        )
    return chosen(policies, list(measured))


def chosen(policies: list[dict[str, Any]], batches: Sequence[int]) -> dict[str, Any]:
    """The policies with the best of them; of equal ones that with the fewest drafts."""

    def top(among: Sequence[dict[str, Any]], batch: int) -> dict[str, Any]:
        policy = max(among, key=lambda p: p["tokens_per_second"][str(batch)])
        return {"num_steps": policy["num_steps"], "threshold": policy["threshold"]}

    plain = [p for p in policies if not p["threshold"]]
    return {
        "batches": list(batches),
        "policies": policies,
        "best": {str(b): top(policies, b) for b in batches},
        "best_without_threshold": {str(b): top(plain, b) for b in batches},
    }


def still_rising(found: Mapping[str, Any]) -> str:
    """A sentence on the batch sizes at which the most drafts that were measured are the best; empty without any."""
    most = max(policy["num_steps"] for policy in found["policies"])
    batches = [b for b in found["batches"] if found["best_without_threshold"][str(b)]["num_steps"] == most > 0]
    if not batches:
        return ""
    at = " and ".join(map(str, batches))
    return f"At batch {at} it still rises at K = {most}, the most that was measured."


def find(found: Mapping[str, Any], policy: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known of a policy."""
    return next(p for p in found["policies"] if _is(p, policy))


def name_of(policy: Mapping[str, Any]) -> str:
    """``K = 4, threshold 0.4``."""
    if not policy["num_steps"]:
        return "no drafts"
    return f"K = {policy['num_steps']}" + (f", threshold {policy['threshold']:g}" if policy["threshold"] else "")


def speed(found: Mapping[str, Any], policy: Mapping[str, Any], batch: int) -> float:
    """Tokens/s of a policy against plain decoding at the same batch size."""
    plain = find(found, NO_DRAFTS)["tokens_per_second"][str(batch)]
    return policy["tokens_per_second"][str(batch)] / plain


def text(found: Mapping[str, Any]) -> list[str]:
    """The table for a terminal."""
    lines = ["", "drafts that make the most tokens a second, by", found["cost"]]
    lines.append(f"{'batch':>5}  {'vLLM, SGLang':<14}{'speed-up':<10}{'with a threshold':<24}speed-up")
    for batch in found["batches"]:
        cells = []
        for key in ("best_without_threshold", "best"):
            policy = found[key][str(batch)]
            cells += [name_of(policy), f"{speed(found, find(found, policy), batch):.2f}"]
        lines.append(f"{batch:>5}  {cells[0]:<14}{cells[1]:<10}{cells[2]:<24}{cells[3]}")
    return lines + [line for line in (still_rising(found), found.get("note")) if line]


def section(found: Mapping[str, Any]) -> Section:
    """The part of the page."""
    batches = found["batches"]
    best = {(p["num_steps"], p["threshold"]) for p in found["best"].values()}
    rows = []
    for policy in found["policies"]:
        if policy["threshold"] and (policy["num_steps"], policy["threshold"]) not in best:
            continue
        speeds = [f"{speed(found, policy, b):.2f}{' *' * (_is(found['best'][str(b)], policy))}" for b in batches]
        cells = [format_interval(policy[key]) for key in ("tokens_per_forward", "drafts_per_forward")]
        rows.append([name_of(policy), *cells, *speeds])
    heads = ["drafts", "tokens per base forward", "drafts per base forward"]
    heads += [f"speed-up, batch {batch}" for batch in batches]
    made = Section(
        "How many drafts",
        f"Tokens a second against plain decoding at the same batch size: measured acceptance in greedy decoding, and "
        f"what a verification and a draft cost by {found['cost']}. * is the most at that batch size. A threshold stops "
        f"drafting at a confidence below it, as llama.cpp's --draft-p-min does; vLLM and SGLang draft K each time. "
        f"{still_rising(found)} {found.get('note', '')}",
        tables=[Table(heads, rows, "Of the thresholds, those that are best at a batch size.")],
    )
    if plots_available():

        def draw(axes: Any) -> None:
            for batch in batches:
                speeds = {p["num_steps"]: speed(found, p, batch) for p in found["policies"] if not p["threshold"]}
                points = [(n, {"value": value, "low": None, "high": None}) for n, value in speeds.items()]
                errorbars(axes, points, label=f"batch {batch}")
                top = max(speeds, key=speeds.__getitem__)
                axes.plot(top, speeds[top], "o", markersize=10, fillstyle="none", color="#888888")
            axes.axhline(1, color="#888888", linewidth=1, linestyle="--")
            whole_numbers(axes)

        made.figures = [("Where more drafts stop paying", figure(draw, DRAFTS, "speed-up"))]
    return made


def _is(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (one["num_steps"], one["threshold"]) == (other["num_steps"], other["threshold"])


def set_num_assistant_tokens(folder: str, num_steps: int) -> Path:
    """Write a number of drafts into the ``generation_config.json`` of a drafter's folder, and keep the rest of it.

    Raises:
        ConfigError: if it is no folder of this machine.
    """
    file = Path(folder) / "generation_config.json"
    if not Path(folder).is_dir():
        raise ConfigError(f"--set-drafts: {folder} isn't a folder on this machine; give the export's.")
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    text = json.dumps(kept | {"num_assistant_tokens": num_steps}, indent=2, sort_keys=True) + "\n"
    replace_file(Path(folder), file.name, text)
    return file
