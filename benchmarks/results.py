"""What a benchmark found, as data: one JSON file with the numbers and where they come from, and the table made of it.

Every benchmark takes ``--results FILE`` and writes this there; the documentation's tables are made from the files in
``docs/results``, and ``python -m benchmarks.compare OLD NEW`` prints the ratios of two.
"""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from joint_train.files import code_version, replace

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"
# A value of a row: a name of what was measured, a number, or a number with the spread of its repetitions
# ({"mean", "sd"}) or its interval ({"value", "low", "high"}, the bounds None where there is none). None: an empty cell.
Value = str | float | dict[str, Any] | None


def spread(values: Sequence[float]) -> Value:
    """The mean of several repetitions with their standard deviation; a single one as it is."""
    return values[0] if len(values) == 1 else {"mean": fmean(values), "sd": stdev(values)}


def record(benchmark: str, columns: dict[str, tuple[str, str]], rows: list[dict[str, Value]], **details: Any) -> dict:
    """The result of this process's command.

    Args:
        benchmark: the module's name under ``benchmarks``.
        columns: each column's heading and the format of its numbers, e.g. ``.2f``, ``.1f GiB``; ``""`` for text.
        rows: what was measured, a value a column; the text columns together name the row.
        **details: further JSON, for plots.
    """
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--results=")]
    if "--results" in arguments:
        at = arguments.index("--results")
        del arguments[at : at + 2]
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *arguments]),
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": code_version() | {"python": platform.python_version()},
        "columns": {name: list(column) for name, column in columns.items()},
        "rows": rows,
        **details,
    }


def finish(result: dict, file: Path | None) -> None:
    """Print the table, and write the result where ``--results`` says."""
    print(table(result))
    if file is not None:
        replace(file, json.dumps(result, indent=1) + "\n")


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, metavar="FILE", help="also write the numbers there, as JSON")


def read(file: Path) -> dict:
    """A result; a bare name is one of ``docs/results``."""
    return json.loads((file if file.suffix else FOLDER / f"{file}.json").read_text())


def table(result: dict) -> str:
    """The rows as a Markdown table."""
    columns = result["columns"]
    lines = ["| " + " | ".join(heading for heading, _ in columns.values()) + " |", "|" + " --- |" * len(columns)]
    for row in result["rows"]:
        cells = [cell(row.get(name), form) for name, (_, form) in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(value: Value, form: str) -> str:
    """One value of a table. A form may have text behind its specification, after a blank: ``.2f GiB``."""
    spec, _, unit = form.partition(" ")
    unit = f" {unit}" * bool(unit)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return format(value, spec) + unit
    if "sd" in value:
        return f"{value['mean']:{spec}} ± {value['sd']:{spec.lstrip('+')}}{unit}"
    if value["value"] is None:
        return "–"
    shown = f"{value['value']:{spec}}{unit}"
    return shown if value["low"] is None else f"{shown} [{value['low']:{spec}}, {value['high']:{spec}}]"


def number(value: Value) -> float | None:
    """The number of a value, without its spread; ``None`` for text and empty cells."""
    if isinstance(value, dict):
        return value.get("mean", value.get("value"))
    return None if isinstance(value, str) else value


def machine() -> str:
    """The GPUs where torch sees some, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()})"
