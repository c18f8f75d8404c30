"""A table over runs: how far each is, and its newest metrics.

    python -m launch.summary DIR [--sort METRIC] [--metrics NAME,NAME,…] [--json]

A run is any folder in DIR (or DIR itself) with a metrics.jsonl, or one that was submitted and has not begun. The
settings in which the runs differ have a column each.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from joint_train.command import Parser, start
from joint_train.config import read_written
from joint_train.config.values import shown_setting
from joint_train.errors import DataError

METRICS = (
    "base_loss",
    "drafter_loss",
    "val/base_loss",
    "val/drafter_loss",
    "val/tokens_per_forward",
    "tokens_per_second",
)
NOT_SETTINGS = ("output_dir", "resume", "tracking.name")


def read_metrics(file: Path) -> dict[str, float | None]:
    """The newest value of each metric, from the run's whole history; empty if there is none.

    A last line that is still being written is left out. Raises DataError naming file and line for any other bad line.
    """
    newest: dict[str, float | None] = {}
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            newest |= json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines) or line.endswith("\n"):
                raise DataError(f"{file}, line {number}: not JSON ({error})") from error
    return newest


def read_settings(run: Path) -> dict[str, object]:
    """The run's configuration, flat, by dotted key; as it ran or else as it was submitted."""
    for file in (run / "config.yaml", run / "slurm" / "config.yaml"):
        if file.exists():
            return flatten(read_written(file))
    return {}


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict) or not value:
        return {prefix.rstrip("."): value}
    return {key: leaf for name, child in value.items() for key, leaf in flatten(child, f"{prefix}{name}.").items()}


def format_number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it is a run, else the runs in it, numbered ones in the order of their numbers."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if (folder / "metrics.jsonl").exists():
        return [folder]
    found = [
        path for path in folder.iterdir() if (path / "metrics.jsonl").exists() or (path / "slurm/config.yaml").exists()
    ]
    return sorted(found, key=lambda path: (int(path.name) if path.name.isdigit() else -1, path.name))


def summarize(folder: Path, metrics: tuple[str, ...] = METRICS, sort: str | None = None) -> Table:
    """The table; runs without the metric that is sorted by come last.

    Raises:
        FileNotFoundError: when there is no run.
    """
    runs = find_runs(folder)
    if not runs:
        raise FileNotFoundError(f"no run in {folder}: neither it nor a folder in it has a metrics.jsonl")
    settings = {run: read_settings(run) for run in runs}
    newest = {run: read_metrics(run / "metrics.jsonl") for run in runs}
    keys = sorted({key for run in runs for key in settings[run]} - set(NOT_SETTINGS))
    differing = [key for key in keys if len({str(settings[run].get(key)) for run in runs}) > 1]
    shown = [name for name in metrics if any(name in newest[run] for run in runs)]
    if sort is not None:
        runs.sort(key=lambda run: math.inf if (value := newest[run].get(sort)) is None else value)

    table = Table(title=str(folder), title_justify="left", box=None, pad_edge=False)
    table.add_column("run")
    for key in differing:
        table.add_column(key)
    for name in ("step", *shown):
        table.add_column(name, justify="right")
    for run in runs:
        step = newest[run].get("step")
        of = settings[run].get("max_steps")
        epochs = settings[run].get("epochs")
        row = [str(run.relative_to(folder)) if run != folder else run.name]
        row += [shown_setting(settings[run].get(key)) for key in differing]
        if step is None:
            row.append("not begun")
        elif epochs and newest[run].get("epoch") is not None:
            row.append(f"{step:.0f}, epoch {newest[run]['epoch']:.1f} of {epochs:g}")
        else:
            row.append(f"{step:.0f} of {of or '?'}")
        row += [format_number(newest[run][name]) if name in newest[run] else "" for name in shown]
        table.add_row(*row)
    return table


def fitting(table: Table, console: Console) -> list[Table]:
    """The table if it fits the console; else turned, a run a column, in as many tables as that takes."""
    if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
        return [table]
    headings = [str(column.header) for column in table.columns]
    runs = list(zip(*(column.cells for column in table.columns), strict=True))
    first, tables, taken = max(map(len, headings)), list[Table](), 0
    while taken < len(runs):
        turned = Table(title=table.title if not tables else None, title_justify="left", box=None, pad_edge=False)
        turned.add_column(headings[0])
        width, start = first, taken
        while taken < len(runs) and (taken == start or width + _width(runs[taken]) + 1 <= console.width):
            width += _width(runs[taken]) + 1
            turned.add_column(str(runs[taken][0]), justify="right")
            taken += 1
        for number, heading in enumerate(headings[1:], 1):
            turned.add_row(heading, *(run[number] for run in runs[start:taken]))
        tables.append(turned)
    return tables


def _width(run: tuple) -> int:
    return max(len(str(cell)) for cell in run)


def main() -> int:
    parser = Parser(
        prog="python -m launch.summary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sort", help="metric, lowest first")
    parser.add_argument("--metrics", default=",".join(METRICS), help="columns, separated by commas")
    parser.add_argument("--json", action="store_true", help="print a JSON list of the runs instead of the table")
    arguments = parser.parse_args()

    def run() -> None:
        if arguments.json:
            runs = find_runs(arguments.folder)
            found = [{"run": str(r), "config": read_settings(r), **read_metrics(r / "metrics.jsonl")} for r in runs]
            print(json.dumps(found, indent=1))
            return
        console = Console()
        table = summarize(arguments.folder, tuple(arguments.metrics.split(",")), arguments.sort)
        for one in fitting(table, console):
            console.print(one)

    return start("launch.summary", run)


if __name__ == "__main__":
    sys.exit(main())
