"""What :mod:`joint_train.evaluate.measure` found, as a table for a terminal and as a page."""

from collections.abc import Sequence
from typing import Any

from joint_train.evaluate.page import Section, Table, figure, html, plots_available

Interval = dict[str, float | None]

SAMPLED_WAYS = {
    "plain": "plain",
    "argmax": "argmax drafts",
    "sampled": "sampled drafts",
    "transformers": "as transformers",
}
PROBABILISTIC = """vLLM drafts the argmax unless its --speculative-config has "draft_sample_method": "probabilistic"."""


def format_interval(interval: Interval, digits: int = 2) -> str:
    """``1.52 [1.45, 1.60]``; a dash where there is no value."""
    if interval["value"] is None:
        return "–"
    if interval["low"] is None:
        return f"{interval['value']:.{digits}f}"
    return f"{interval['value']:.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


def best(results: dict[str, Any]) -> dict[str, Any]:
    """The K with the largest speed-up."""
    return max(results["speculative"], key=lambda s: s["speedup"]["value"] or 0)


def text(results: dict[str, Any]) -> str:
    """The main table, at most 80 columns wide, and a warning where texts differ."""
    lines = [f"{'K':>3}  {'tokens/forward':<20}{'tokens/s':<22}{'speed-up':<20}{'same text':>9}"]
    plain, prompts = results["plain"], results["prompts"]["count"]
    lines.append(f"{'–':>3}  {'1':<20}{format_interval(plain['tokens_per_second'], 1):<22}{'1':<20}")
    for s in results["speculative"]:
        same = f"{prompts - len(s['differences'])}/{prompts}"
        lines.append(
            f"{s['num_steps']:>3}  {format_interval(s['tokens_per_forward']):<20}"
            f"{format_interval(s['tokens_per_second'], 1):<22}"
            f"{format_interval(s['speedup']):<20}{same:>9}"
        )
    lines += ["", f"{'draft':>5}  accepted (with all before it), K = {results['speculative'][-1]['num_steps']}"]
    for k, position in enumerate(results["speculative"][-1]["acceptance"]):
        lines.append(f"{k + 1:>5}  {format_interval(position['share'])}")
    for s in results["speculative"]:
        for d in s["differences"]:
            margin = "" if d["margin"] is None else f", margin of the base's logits {d['margin']:.2g}"
            lines.append(
                f"K = {s['num_steps']}, prompt {d['prompt']}: differs at token {d['position']}, "
                f"{d['plain']!r} and {d['speculative']!r}{margin}"
            )
    if not results["prompts"].get("turns", True):
        lines.append("The base has no chat template: the prompts were plain text, without turns.")
    for s in results["sampling"] or []:
        verdict = "the base's distribution" if s["bases_distribution"] else "NOT the base's distribution"
        deviation = ", ".join(f"{name} {z:+.1f}" for name, z in s["deviation"].items())
        length = (
            "" if s["tokens_per_forward"] is None else f", {format_interval(s['tokens_per_forward'])} tokens/forward"
        )
        lines.append(f"sampling, {SAMPLED_WAYS[s['way']]}: {verdict} (standard errors: {deviation}){length}")
    if results["sampling"]:
        lines.append(f"sampling: {PROBABILISTIC}")
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """The page."""
    options, prompts, top = results["options"], results["prompts"], best(results)
    lead = (
        f"With K = {top['num_steps']} drafts, {format_interval(top['tokens_per_forward'])} tokens per base forward and "
        f"{format_interval(top['speedup'])} times the speed of plain decoding, on {prompts['count']} prompts "
        f"({prompts['name']}). Brackets are 95 % bootstrap intervals over prompts."
    )
    sections = [decoding_section(results), acceptance_section(results), category_section(top), text_section(results)]
    sections.append(calibration_section(results["calibration"], results["sampling"]))
    if results["sampling"]:
        sections.append(sampling_section(results["sampling"], options["temperature"]))
    sections += [examples_section(results), setting_section(results)]
    return html("Speculative decoding, measured", lead, sections)


def decoding_section(results: dict[str, Any]) -> Section:
    rows = [["plain", "1", format_interval(results["plain"]["tokens_per_second"], 1), "1"]]
    for s in results["speculative"]:
        rows.append(
            [
                str(s["num_steps"]),
                format_interval(s["tokens_per_forward"]),
                format_interval(s["tokens_per_second"], 1),
                format_interval(s["speedup"]),
            ]
        )
    section = Section(
        "Speed",
        "Tokens per base forward is the mean number of tokens that a verification settles: the accepted drafts and one "
        "of the base's own. The prompt's forward isn't counted.",
        tables=[Table(["K", "tokens per base forward", "tokens/s", "speed-up"], rows)],
    )
    if plots_available():
        section.figures = [
            (
                "Tokens per base forward",
                over_k(results["speculative"], "tokens_per_forward", "tokens per base forward"),
            ),
            ("Speed against plain decoding", over_k(results["speculative"], "speedup", "speed-up")),
        ]
    return section


def over_k(speculative: list[dict[str, Any]], key: str, label: str) -> str:
    """A quantity and its interval over K."""

    def draw(axes) -> None:
        points = [(s["num_steps"], s[key]) for s in speculative if s[key]["value"] is not None]
        errorbars(axes, points)
        axes.axhline(1, color="#888888", linewidth=1, linestyle="--")
        axes.set_xticks([k for k, _ in points])

    return figure(draw, "K, drafts in a verification", label)


def errorbars(axes, points: Sequence[tuple[float, Interval]], **style: Any) -> None:
    """Points with their intervals."""

    def distance(low: float | None, high: float | None) -> float:
        return 0.0 if low is None or high is None else high - low

    below = [distance(i["low"], i["value"]) for _, i in points]
    above = [distance(i["value"], i["high"]) for _, i in points]
    axes.errorbar(
        [x for x, _ in points],
        [i["value"] for _, i in points],
        yerr=[[max(0, b) for b in below], [max(0, a) for a in above]],
        fmt="o-",
        markersize=4,
        linewidth=1.5,
        capsize=3,
        **style,
    )


def acceptance_section(results: dict[str, Any]) -> Section:
    last = results["speculative"][-1]
    rows = [
        [
            str(k + 1),
            format_interval(p["share"]),
            format_interval(p["share_if_reached"]),
            f"{p['accepted']:,} of {p['drafted']:,}",
        ]
        for k, p in enumerate(last["acceptance"])
    ]
    section = Section(
        f"Acceptance by draft position, K = {last['num_steps']}",
        tables=[Table(["draft", "accepted", "accepted if all before it were", "count"], rows)],
    )
    if plots_available():

        def draw(axes) -> None:
            for key, label in (("share", "with all before it"), ("share_if_reached", "if all before it were")):
                points = [(k + 1, p[key]) for k, p in enumerate(last["acceptance"]) if p[key]["value"] is not None]
                errorbars(axes, points, label=label)
            axes.set_ylim(0, 1)
            axes.set_xticks(range(1, last["num_steps"] + 1))

        section.figures = [("Accepted drafts", figure(draw, "draft position", "share accepted"))]
    return section


def category_section(top: dict[str, Any]) -> Section:
    found = top["tokens_per_forward_by_category"]
    section = Section(
        f"By kind of prompt, K = {top['num_steps']}",
        tables=[Table(["kind", "tokens per base forward"], [[name, format_interval(i)] for name, i in found.items()])],
    )
    if plots_available() and len(found) > 1:

        def draw(axes) -> None:
            names = [name for name in reversed(found) if found[name]["value"] is not None]
            values = [found[name]["value"] for name in names]
            spread = [
                [max(0, found[n]["value"] - found[n]["low"]) if found[n]["low"] is not None else 0 for n in names],
                [max(0, found[n]["high"] - found[n]["value"]) if found[n]["low"] is not None else 0 for n in names],
            ]
            axes.barh(names, values, xerr=spread, height=0.6, error_kw={"capsize": 3, "linewidth": 1})
            axes.grid(axis="y", visible=False)

        section.figures = [("Tokens per base forward", figure(draw, "tokens per base forward", ""))]
    return section


def text_section(results: dict[str, Any]) -> Section:
    rows = [
        [
            str(s["num_steps"]),
            str(d["prompt"]),
            str(d["position"]),
            repr(d["plain"]),
            repr(d["speculative"]),
            "–" if d["margin"] is None else f"{d['margin']:.2g}",
        ]
        for s in results["speculative"]
        for d in s["differences"]
    ]
    section = Section("The text")
    if rows:
        section.text = (
            "Greedy speculative decoding must give plain decoding's text. Where it doesn't, a margin near the dtype's "
            "rounding error means that the base was undecided between two tokens, and anything larger is a mistake."
        )
        heads = ["K", "prompt", "first difference at token", "plain", "speculative", "margin of the base's logits"]
        section.tables = [Table(heads, rows)]
    else:
        section.text = (
            "Greedy speculative decoding gave plain decoding's text, token for token, for every K and prompt."
        )
    return section


def calibration_section(calibration: dict[str, Any], sampling: list[dict[str, Any]] | None) -> Section:
    """How far the drafter's confidence is to be trusted, and what stopping at a low one does."""
    measured = {"greedy": calibration["reliability"]}
    for way in sampling or []:
        if way["reliability"]:
            measured["sampling"] = way["reliability"]
    heads = ["confidence", "mean", "accepted", "drafts"]
    tables = []
    for name, reliability in measured.items():
        rows = [
            [
                f"{b['from']:.1f} to {b['to']:.1f}",
                f"{b['confidence']:.2f}",
                format_interval(b["accepted"]),
                f"{b['drafts']:,}",
            ]
            for b in reliability["bins"]
            if b["drafts"]
        ]
        error = "" if reliability["error"] is None else f" Mean distance of the two: {reliability['error']:.3f}."
        tables.append(Table(heads, rows, f"Acceptance by confidence, {name}.{error}"))
    thresholds = [
        [
            f"{t['threshold']:g}" if t["threshold"] else "none",
            *(format_interval(t[key]) for key in ("tokens_per_forward", "drafts_per_forward", "accepted")),
            format_interval(t["tokens_per_second"], 1),
        ]
        for t in calibration["thresholds"]
    ]
    heads = ["threshold", "tokens per base forward", "drafts per base forward", "of them accepted", "tokens/s"]
    tables.append(Table(heads, thresholds, "Greedy decoding that drafts no token below a threshold."))
    section = Section(
        f"The drafter's confidence, K = {calibration['num_steps']}",
        "A draft's confidence is the drafter's largest probability. Counted are drafts with all before them accepted. "
        "Sampling accepts the drafter's most likely token with the base's probability of it, which the confidence "
        "estimates; greedy decoding accepts it wherever it is the base's own, however unsure both are. Engines can "
        "stop drafting below a threshold, as llama.cpp does with --draft-p-min.",
        tables=tables,
    )
    if plots_available() and tables[0].rows:

        def draw(axes) -> None:
            axes.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle="--")
            for name, reliability in measured.items():
                points = [(b["confidence"], b["accepted"]) for b in reliability["bins"] if b["drafts"]]
                errorbars(axes, points, label=name)
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1)

        section.figures = [("Acceptance by confidence", figure(draw, "confidence", "share accepted"))]
        if len(thresholds) > 1:

            def over_thresholds(axes) -> None:
                for key, label in (("tokens_per_forward", "tokens"), ("drafts_per_forward", "drafts")):
                    points = [(t["threshold"], t[key]) for t in calibration["thresholds"]]
                    errorbars(axes, [(x, y) for x, y in points if y["value"] is not None], label=label)

            section.figures.append(
                ("Stopping at low confidence", figure(over_thresholds, "threshold", "per base forward"))
            )
    return section


def sampling_section(sampling: list[dict[str, Any]], temperature: float) -> Section:
    rows = [
        [
            SAMPLED_WAYS[s["way"]],
            "yes" if s["bases_distribution"] else "no",
            f"{s['deviation']['log_probability']:+.1f}",
            f"{s['deviation']['most_likely']:+.1f}",
            "–" if s["tokens_per_forward"] is None else format_interval(s["tokens_per_forward"]),
            "–" if s["accepted"] is None else ", ".join(format_interval({**a, "low": None}) for a in s["accepted"]),
            f"{s['tokens']:,}",
        ]
        for s in sampling
    ]
    heads = [
        "drafts",
        "base's distribution",
        "log-probability",
        "most likely token",
        "tokens per forward",
        "accepted at each position",
        "tokens",
    ]
    return Section(
        f"Sampling at temperature {temperature:g}",
        "Whether sampled tokens are as probable, and as often the most likely one, as samples of the base have to be; "
        "in standard errors, of which more than 4 are no chance. A draft is the drafter's most likely token (argmax), "
        "accepted with the base's probability of it, or a sample of the drafter. transformers accepts its most likely "
        f"draft as if it were a sample. {PROBABILISTIC}",
        tables=[Table(heads, rows)],
    )


def examples_section(results: dict[str, Any]) -> Section:
    rows = [[e["category"], e["prompt"][:400], e["text"][:600]] for e in results["examples"][:12]]
    return Section("Examples", tables=[Table(["kind", "prompt", "text"], rows)])


def setting_section(results: dict[str, Any]) -> Section:
    rows = [["base", results["base"]], ["drafter", results["drafter"]], ["when", results["when"]]]
    rows += [[name, str(value)] for name, value in {**results["options"], **results["versions"]}.items()]
    return Section("Setting", tables=[Table(["", ""], rows)])
