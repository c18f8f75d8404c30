"""Checks whole files as training would read them: which rows are good, what is wrong with the others, what is
trained."""

import hashlib
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
from joint_train.data.template import ASSISTANT
from joint_train.data.tokenise import DOCUMENT, Chunk, of_several, tokenise
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
        duplicates: rows that an earlier row is the same as, and the first of them.
        answers: that are trained on.
        answers_lost, answers_cut: those of them of which cutting the documents at ``max_length`` leaves nothing, and
            those of which it leaves the beginning.
    """

    name: str
    path: str
    max_length: int
    rows: int = 0
    bad: dict[str, tuple[int, str]] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)
    documents: np.ndarray | None = None
    duplicates: int = 0
    first_duplicate: str = ""
    answers: int = 0
    answers_lost: int = 0
    answers_cut: int = 0
    _digests: set[bytes] = field(default_factory=set)

    def add_digest(self, content: bytes, where: str) -> None:
        """Count a row whose content occurred before."""
        digest = hashlib.blake2b(content, digest_size=8).digest()
        if digest in self._digests:
            self.duplicates += 1
            self.first_duplicate = self.first_duplicate or where
        self._digests.add(digest)

    def add_answers(self, flags: np.ndarray, overlong: str) -> None:
        """Count the answers of a document, and what cutting it leaves of them."""
        trained = (flags & ASSISTANT) != 0
        starts = np.flatnonzero(trained & ~np.append(False, trained[:-1]))
        ends = np.flatnonzero(trained & ~np.append(trained[1:], False)) + 1
        self.answers += len(starts)
        if len(flags) <= self.max_length or overlong == "split":
            return
        left = self.max_length if overlong == "truncate" else 0
        self.answers_lost += int((starts >= left).sum())
        self.answers_cut += int(((starts < left) & (ends > left)).sum())

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
        """The report in plain types."""
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
            "duplicate_rows": self.duplicates,
            "template_options": dict(self.seen.options),
            "notices": [
                {"kind": kind, "count": count, "first": where} for kind, (count, where) in self.seen.notices.items()
            ],
        }
        if self.documents is not None:
            lengths = self.documents["length"]
            tokens, targets = int(lengths.sum()), int(self.documents["targets"].sum())
            unrolled, last = of_several(self.documents), ~self.documents["earlier"]
            found |= {
                "documents": len(lengths),
                "conversations_of_several_documents": int((unrolled & last).sum()),
                "tokens_of_them": int(lengths[unrolled].sum()),
                "tokens_of_their_last_documents": int(lengths[unrolled & last].sum()),
                "tokens": tokens,
                "supervised_tokens": targets,
                "supervised_share": targets / tokens if tokens else 0.0,
                "longer_than_max_length": int((lengths > self.max_length).sum()),
                "longer_share": float((lengths > self.max_length).mean()) if len(lengths) else 0.0,
                "answers": self.answers,
                "answers_lost": self.answers_lost,
                "answers_cut": self.answers_cut,
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
                adapted = sources.understand(record, spec)
                report.seen.count_record(adapted)
                report.add_digest(repr(adapted.example).encode(), adapted.where)
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
        _look_at(chunk, report, data.overlong)
        found.append(chunk.documents)
    report.documents = np.concatenate(found) if found else np.empty(0, DOCUMENT)
    return report


def _look_at(chunk: Chunk, report: Report, overlong: str) -> None:
    """Count the duplicates and the answers of some documents. A row's last document has what its earlier ones have."""
    documents = chunk.documents
    for index, (start, length, earlier) in enumerate(
        zip(documents["offset"].tolist(), documents["length"].tolist(), documents["earlier"].tolist(), strict=True)
    ):
        flags = chunk.flags[start : start + length]
        report.add_answers(flags, overlong)
        if not earlier:
            tokens = chunk.tokens[start : start + length]
            where = f"{chunk.files[index]}:{documents['line'][index]}"
            report.add_digest(tokens.tobytes() + flags.tobytes() + _pictures(chunk, index), where)


def _pictures(chunk: Chunk, document: int) -> bytes:
    """The paths and bytes of a document's pictures."""
    found = chunk.pictures[chunk.pictures["document"] == document] if len(chunk.pictures) else chunk.pictures
    return b"".join(chunk.picture_data[picture["offset"] : picture["offset"] + picture["size"]] for picture in found)


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
                longest += f" ({found['longer_share']:.1%} above {report.max_length:,})"
            cells = [f"{found['documents']:,}", f"{found['tokens']:,}", f"{found['supervised_share']:.1%}", longest]
        table.add_row(report.name, f"{report.rows:,}", f"{report.bad_rows:,}", formats, *cells)
    console.print(table)
    for report in reports:
        seen = report.seen
        if not report.rows:
            console.print(Text(f"{report.name}: there are no rows, and a run is refused", style="red"))
            continue
        console.print(
            Text(
                f"{report.name}: columns used: {', '.join(sorted(seen.used)) or 'none'}; "
                f"unused: {', '.join(seen.unused) or 'none'}"
            )
        )
        if seen.options:
            options = ", ".join(f"{option} ({count:,} rows)" for option, count in seen.options.most_common())
            console.print(Text(f"{report.name}: options of the chat template: {options}"))
        if report.duplicates:
            console.print(
                Text(
                    f"{report.name}: {report.duplicates:,} rows are the same as an earlier one (first: "
                    f"{report.first_duplicate})"
                )
            )
        if report.answers_lost or report.answers_cut:
            console.print(
                Text(
                    f"{report.name}: of {report.answers:,} answers {report.answers_lost:,} are lost and "
                    f"{report.answers_cut:,} lose their end, because documents are cut at data.max_length="
                    f"{report.max_length:,}"
                )
            )
        found = report.as_json()
        if count := found.get("conversations_of_several_documents"):
            tokens, once = found["tokens_of_them"], found["tokens_of_their_last_documents"]
            console.print(
                Text(
                    f"{report.name}: {count:,} conversations are a document for each answer, {tokens:,} tokens in all: "
                    f"{tokens / once:.1f} times what each of them is once; data.unroll='last N' limits it"
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
