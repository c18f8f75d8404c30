"""Whole files, looked at as training would: which rows are good, what is wrong with the others, what is trained on."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from joint_train.data import sources
from joint_train.data.pieces import NO_TARGET
from joint_train.data.readers import read_records, source_name
from joint_train.data.seen import Seen
from joint_train.data.tokenise import DOCUMENT, tokenise
from joint_train.errors import DataError

QUANTILES = (0, 50, 90, 99, 100)
# What differs between two errors of one kind: remarks, names and numbers.
REMARK = re.compile(r" \([^)]*\)")
PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^]]*\]|\d[\d,.]*")


@dataclass
class Report:
    """What is in a source.

    Attributes:
        name, path: of the source.
        rows: in all.
        bad: for each kind of error how many rows have it, and the first error.
        seen: formats, columns, and what is worth knowing.
        documents: ``[N]`` DOCUMENT of the good rows; None: there was no tokenizer.
        max_length: of a row in training.
    """

    name: str
    path: str
    max_length: int
    rows: int = 0
    bad: dict[str, tuple[int, str]] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)
    documents: np.ndarray | None = None

    def add_error(self, message: str) -> None:
        """Count a bad row by its error, ``file:line: what is wrong``."""
        kind = PARTICULAR.sub("…", REMARK.sub("", message.split(": ", 1)[-1]))
        count, first = self.bad.get(kind, (0, message))
        self.bad[kind] = (count + 1, first)

    @property
    def bad_rows(self) -> int:
        """How many rows are bad."""
        return sum(count for count, _ in self.bad.values())

    def as_json(self) -> dict[str, Any]:
        """All of it, plain."""
        found: dict[str, Any] = {
            "name": self.name,
            "path": self.path,
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "bad": [
                {"kind": kind, "rows": count, "first": first}
                for kind, (count, first) in sorted(self.bad.items(), key=lambda item: -item[1][0])
            ],
            "formats": dict(self.seen.formats),
            "columns_used": sorted(self.seen.used),
            "columns_unused": self.seen.unused,
            "notices": [
                {"kind": kind, "count": count, "first": where} for kind, (count, where) in self.seen.notices.items()
            ],
        }
        if self.documents is not None:
            lengths = self.documents["length"]
            tokens, targets = int(lengths.sum()), int(self.documents["targets"].sum())
            found |= {
                "documents": len(lengths),
                "tokens": tokens,
                "supervised_tokens": targets,
                "supervised_share": targets / tokens if tokens else 0.0,
                "longer_than_max_length": int((lengths > self.max_length).sum()),
                "length_quantiles": {
                    str(q): int(np.percentile(lengths, q, method="lower")) for q in QUANTILES if len(lengths)
                },
            }
        return found


def check(specs: Iterable, data, tokenizer) -> list[Report]:
    """Look at every row of some sources.

    Args:
        specs: ``SourceConfig`` of each.
        data: the ``data`` group.
        tokenizer: with a chat template; None: only whether the rows are understood.

    Raises:
        DataError: there is no such file.
    """
    return [_check_source(spec, data, tokenizer) for spec in specs]


def _check_source(spec, data, tokenizer) -> Report:
    report = Report(source_name(spec), spec.path, data.max_length)
    records = read_records(spec, data.max_line_bytes)
    if tokenizer is None:
        for record in records:
            report.rows += 1
            try:
                report.seen.saw(sources.understand(record, spec))
            except DataError as error:
                report.add_error(str(error))
        return report
    found = []
    for chunk in tokenise(records, spec, data, tokenizer, data.num_workers, on_error="skip"):
        report.rows += chunk.records
        report.seen.add(chunk.seen)
        for message in chunk.errors:
            report.add_error(message)
        if data.train_on != "all":
            for index in np.flatnonzero((chunk.documents["targets"] == 0) & ~chunk.documents["earlier"]).tolist():
                report.add_error(f"{chunk.files[index]}:{chunk.documents['line'][index]}: {NO_TARGET}")
        found.append(chunk.documents)
    report.documents = np.concatenate(found) if found else np.empty(0, DOCUMENT)
    return report


def show(console: Console, reports: list[Report]) -> None:
    """Print reports as tables."""
    table = Table(title="data check")
    for heading in ("source", "rows", "bad", "formats", "documents", "tokens", "trained", "longest"):
        table.add_column(heading, overflow="fold")
    for report in reports:
        formats = ", ".join(f"{count:,} {name}" for name, count in report.seen.formats.most_common())
        cells = ["", "", "", ""]
        if report.documents is not None:
            found = report.as_json()
            longest = f"{found['length_quantiles'].get('100', 0):,}"
            if found["longer_than_max_length"]:
                longest += f" ({found['longer_than_max_length']:,} above {report.max_length:,})"
            cells = [f"{found['documents']:,}", f"{found['tokens']:,}", f"{found['supervised_share']:.1%}", longest]
        table.add_row(report.name, f"{report.rows:,}", f"{report.bad_rows:,}", formats, *cells)
    console.print(table)
    for report in reports:
        seen = report.seen
        console.print(
            Text(
                f"{report.name}: columns used: {', '.join(sorted(seen.used)) or 'none'}; "
                f"unused: {', '.join(seen.unused) or 'none'}"
            )
        )
        for _, sentence in seen.sentences():
            console.print(Text(f"{report.name}: {sentence}"))
    kinds = [
        (report.name, count, kind, first)
        for report in reports
        for kind, (count, first) in sorted(report.bad.items(), key=lambda item: -item[1][0])
    ]
    if kinds:
        table = Table("source", "rows", "the first of a kind of bad row", title="bad rows", show_lines=True)
        for name, count, _, first in kinds:
            table.add_row(name, f"{count:,}", Text(first))
        console.print(table)


def to_json(reports: list[Report]) -> str:
    """Reports as a JSON list."""
    return json.dumps([report.as_json() for report in reports], indent=1, ensure_ascii=False) + "\n"
