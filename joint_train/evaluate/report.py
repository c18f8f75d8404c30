"""What :mod:`joint_train.evaluate.measure` found, as a table for a terminal and as a page."""

from collections.abc import Sequence
from typing import Any

from joint_train.evaluate import against, recommend
from joint_train.evaluate.page import (
    DRAFTS,
    Section,
    Table,
    errorbars,
    figure,
    format_interval,
    html,
    plots_available,
    whole_numbers,
)
from joint_train.evaluate.where import WAYS

SAMPLED_WAYS = {
    "plain": "plain",
    "argmax": "argmax drafts",
    "sampled": "sampled drafts",
    "transformers": "as transformers",
}
PROBABILISTIC = """vLLM drafts the argmax unless its --speculative-config has "draft_sample_method": "probabilistic"."""


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
    lines += against.text(results) if "against" in results else []
    lines += recommend.text(results["recommend"]) if "recommend" in results else []
    lines += columns_text(results.get("columns", [])) + where_text(results.get("where"))
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


def columns_text(columns: Sequence[dict[str, Any]]) -> list[str]:
    """Tokens per base forward of each column, by K."""
    lines = []
    for i, s in enumerate(columns[0]["speculative"] if columns else []):
        lines += ["", f"K = {s['num_steps']:<4}tokens/forward      speed-up"]
        for column in columns:
            own = column["speculative"][i]
            numbers = f"{format_interval(own['tokens_per_forward']):<20}{format_interval(own['speedup'])}"
            lines.append(f"        {numbers}  {column['name']}")
    return lines


def where_text(found: dict[str, Any] | None) -> list[str]:
    """Acceptance by where it happens."""
    lines = []
    for way, title in WAYS.items():
        if parts := (found or {}).get(way):
            lines += ["", f"{title + ', K = ' + str(found['num_steps']):<38}{'tokens/forward':<20}first draft"]  # type: ignore[index]
            for part in parts:
                numbers = f"{format_interval(part['tokens_per_forward']):<20}{format_interval(part['first'])}"
                lines.append(f"{part['name'][:36]:<38}{numbers}")
    return lines


def page(results: dict[str, Any]) -> str:
    """The page."""
    options, prompts, top = results["options"], results["prompts"], best(results)
    lead = (
        f"With K = {top['num_steps']} drafts, {format_interval(top['tokens_per_forward'])} tokens per base forward and "
        f"{format_interval(top['speedup'])} times the speed of plain decoding, on {prompts['count']} prompts "
        f"({prompts['name']}). Brackets are 95 % bootstrap intervals over prompts."
    )
    columns = results.get("columns", [])
    sections = [decoding_section(results)]
    sections += [against.section(results)] if "against" in results else []
    sections += [recommend.section(results["recommend"])] if "recommend" in results else []
    sections += [*columns_section(columns), acceptance_section(results)]
    sections += [category_section(top), *where_section(results.get("where"), columns), text_section(results)]
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
        whole_numbers(axes)

    return figure(draw, DRAFTS, label)


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
            whole_numbers(axes)

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


def where_section(found: dict[str, Any] | None, columns: Sequence[dict[str, Any]]) -> list[Section]:
    """Acceptance by where it happens; with several columns, that of each beside the others."""
    if not found:
        return []
    named = [(column["name"], column["where"]) for column in columns] or [("", found)]
    section = Section(
        f"Where drafts are accepted, K = {found['num_steps']}",
        "A verification counts where the first token is that it settles: at its position in the answer, after the "
        "context of all tokens before it, in the kind of text that it belongs to.",
    )
    for way, title in WAYS.items():
        parts = list(dict.fromkeys(part["name"] for _, where in named for part in where.get(way, [])))
        if way in ("position", "context"):  # buckets, which one column may have and another not
            parts.sort(key=lambda name: int(name.split()[0].replace(",", "")))
        if not parts:
            continue
        of = [{part["name"]: part for part in where.get(way, [])} for _, where in named]
        heads = [title]
        for name, _ in named:
            heads += [f"{name}: {head}" if name else head for head in WHERE_HEADS]
        rows = [[part, *(cell for one in of for cell in _where_cells(one.get(part)))] for part in parts]
        section.tables.append(Table(heads, rows))
        if plots_available() and len(parts) > 1:
            section.figures.append((f"By {title.partition(',')[0]}", _by_part(named, of, parts, title)))
    return [section] if section.tables else []


WHERE_HEADS = ["tokens per base forward", "first draft accepted", "verifications"]


def _where_cells(part: dict[str, Any] | None) -> list[str]:
    if part is None:
        return ["–"] * len(WHERE_HEADS)
    return [format_interval(part["tokens_per_forward"]), format_interval(part["first"]), f"{part['verifications']:,}"]


def _by_part(named: Sequence[tuple[str, Any]], of: Sequence[dict[str, Any]], parts: Sequence[str], label: str) -> str:
    """Tokens per base forward of each part, one series for each column."""
    buckets = label.endswith("tokens")
    ticks = [part.split(" to ")[-1] if buckets else part for part in parts]
    crowded = sum(map(len, ticks)) > 40

    def draw(axes) -> None:
        for i, ((name, _), one) in enumerate(zip(named, of, strict=True)):
            shift = 0.12 * (i - (len(named) - 1) / 2)
            points = [(x + shift, one[part]["tokens_per_forward"]) for x, part in enumerate(parts) if part in one]
            points = [(x, y) for x, y in points if y["value"] is not None]
            errorbars(axes, points, buckets, **({"label": name} if name else {}))
        axes.set_xticks(range(len(parts)))
        slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axes.set_xticklabels([name if len(name) <= 20 else f"{name[:19]}…" for name in ticks], **slant)
        axes.set_xlim(-0.5, len(parts) - 0.5)

    return figure(draw, label.replace(", tokens", ", up to … tokens"), "tokens per base forward")


def columns_section(columns: Sequence[dict[str, Any]]) -> list[Section]:
    """The same prompts under other options of the chat template, or with adapters on the base."""
    if not columns:
        return []
    steps = [s["num_steps"] for s in columns[0]["speculative"]]
    tables = []
    for key, note in (("tokens_per_forward", "Tokens per base forward."), ("speedup", "Speed-up over plain decoding.")):
        rows = [[str(k), *(format_interval(c["speculative"][i][key]) for c in columns)] for i, k in enumerate(steps)]
        tables.append(Table(["K", *(column["name"] for column in columns)], rows, note))
    section = Section("Side by side", "The sections that show one column show the first.", tables=tables)
    if plots_available():

        def draw(axes) -> None:
            for column in columns:
                points = [(s["num_steps"], s["tokens_per_forward"]) for s in column["speculative"]]
                errorbars(axes, [(k, y) for k, y in points if y["value"] is not None], label=column["name"])
            whole_numbers(axes)

        section.figures = [("Tokens per base forward", figure(draw, DRAFTS, "tokens per base forward"))]
    return [section]


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
