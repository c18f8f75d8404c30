"""Training runs side by side: losses, acceptance, throughput, and what was configured differently, in one page."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.console
import rich.markup
import rich.table

from joint_train.command import Parser
from joint_train.config import read_written
from joint_train.config.values import shown_setting
from joint_train.errors import ConfigError
from joint_train.evaluate.page import Section, Table, figure, html, plots_available, whole_numbers
from joint_train.files import replace
from joint_train.metrics import SUMMARY

CURVES = {
    "Losses": [("base_loss", "base, training"), ("drafter_loss", "drafter, training")],
    "Validation": [("val/base_loss", "base, validation"), ("val/drafter_ce", "drafter cross-entropy, validation")],
    "Acceptance": [
        ("val/accepted_length_expected", "accepted length expected, teacher forced"),
        ("val/tokens_per_forward", "tokens per base forward, generated"),
    ],
    "Speed and steadiness": [("tokens_per_second", "tokens/s"), ("grad_norm", "gradient norm")],
}
SMOOTHING = 60  # a training curve is drawn as the means of at most this many pieces


@dataclass
class Run:
    """A run's folder, read: configuration (flat) and metrics (one dictionary a step)."""

    name: str
    folder: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) wherever the metric was written."""
        return [(r["step"], r[metric]) for r in self.records if r.get(metric) is not None]


def load_run(folder: Path, name: str) -> Run:
    """Read a run's output folder.

    Raises:
        ValueError: if it has no metrics.
    """
    file = folder / "metrics.jsonl"
    records = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # the line that a running or crashed run is at
                continue
    if not records:
        raise ConfigError(
            f"{folder} is not a run: it has no metrics.jsonl with records. Give an OUTPUT_DIR of joint_train."
        )
    config = read_written(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    return Run(name, folder, dict(flatten(config)), records)


def flatten(config: Mapping[str, Any], prefix: str = ""):
    """``{"a": {"b": 1}}`` as ``("a.b", 1)``."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(p[-count:]) for p in parts]
        if len(set(ends)) == len(ends):
            return ends
    raise ConfigError("the same run is given twice")


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of [key, each run's value] for the settings that aren't the same; the output folder is no setting."""
    keys = sorted({key for run in runs for key in run.config} - {"output_dir", "tracking.name"})
    rows = [[key, *(shown_setting(run.config.get(key, "–")) for run in runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def result_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of [what, each run's "first → last"], then throughput and time."""
    rows = [["steps", *(str(run.records[-1]["step"]) for run in runs)]]
    for metric, label in SUMMARY.items():
        series = [run.series(metric) for run in runs]
        if any(series):
            rows.append([label, *(f"{s[0][1]:.3f} → {s[-1][1]:.3f}" if s else "–" for s in series)])
    speeds = [[value for _, value in run.series("tokens_per_second")] for run in runs]
    rows.append(["tokens/s, median", *(f"{sorted(v)[len(v) // 2]:,.0f}" if v else "–" for v in speeds)])
    spans = [run.records[-1].get("time", 0) - run.records[0].get("time", 0) for run in runs]
    rows.append(["minutes from first to last record", *(f"{span / 60:.1f}" for span in spans)])
    if any(run.series("bad_steps") for run in runs):
        rows.append(["bad steps", *(str(int(max((v for _, v in run.series("bad_steps")), default=0))) for run in runs)])
    return rows


def in_numbers(run: Run) -> dict[str, Any]:
    """A run for other programs: first and last value of each metric of the summary, and its settings."""
    series = {metric: values for metric in SUMMARY if (values := run.series(metric))}
    return {
        "steps": run.records[-1]["step"],
        "metrics": {metric: {"first": values[0][1], "last": values[-1][1]} for metric, values in series.items()},
        "config": run.config,
    }


def smooth(series: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means of consecutive pieces, if there are many points."""
    size = math.ceil(len(series) / SMOOTHING)
    pieces = [series[i : i + size] for i in range(0, len(series), max(1, size))]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in pieces]


def curve(runs: Sequence[Run], metric: str) -> str | None:
    """A metric of all runs over steps, or nothing if none has it."""
    series = [smooth(run.series(metric)) for run in runs]
    if not any(series):
        return None

    def draw(axes) -> None:
        for run, points in zip(runs, series, strict=True):
            if points:
                marker = {"marker": "o", "markersize": 3} if len(points) < 20 else {}
                axes.plot(*zip(*points, strict=True), label=run.name, linewidth=1.4, **marker)
        whole_numbers(axes)

    return figure(draw, "step", "")


def page(runs: Sequence[Run]) -> str:
    """The page."""
    heads = ["", *(run.name for run in runs)]
    sections = [Section("Results", tables=[Table(heads, result_rows(runs), "First and last value that was measured.")])]
    for title, metrics in CURVES.items() if plots_available() else ():
        figures = [(label, svg) for metric, label in metrics if (svg := curve(runs, metric))]
        if figures:
            sections.append(Section(title, figures=figures))
    rows = differences(runs)
    text = "" if rows else "The runs were configured alike."
    tables = [Table(heads, rows)] if rows else []
    sections.append(Section("Configured differently", text, tables=tables))
    sections.append(Section("Folders", tables=[Table(["run", "folder"], [[r.name, str(r.folder)] for r in runs])]))
    return html("Training runs compared", ", ".join(run.name for run in runs), sections)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m joint_train.evaluate compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="output folders of runs")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), help="page to write (comparison.html)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args(argv)
    runs = [load_run(folder, name) for folder, name in zip(args.runs, names(args.runs), strict=True)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace(args.out, page(runs))
    if args.json:
        print(json.dumps({run.name: {"folder": str(run.folder), **in_numbers(run)} for run in runs}, indent=1))
        return 0
    table = rich.table.Table("", *(run.name for run in runs), box=None, pad_edge=False)
    for row in [*result_rows(runs), *differences(runs)]:
        table.add_row(*map(rich.markup.escape, row))
    rich.console.Console(highlight=False).print(table)
    print(f"written: {args.out}")
    return 0
