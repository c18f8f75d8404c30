"""Prints rows in colour: what is trained on, where documents are cut, what each drafter round has to predict."""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from joint_train.data.pieces import Pieces
from joint_train.data.rows import RowSequence, Walk
from joint_train.pair.targets import joint_targets

BRACKETS = ("⟦", "⟧")
"""Around what is trained on, where there are no colours."""
TRAINED, UNTRAINED, CUT, NOTE = "bold green", "grey50", "magenta", "italic cyan"


def show(console: Console, drafter, sequence: RowSequence, tokenizer, first: int, count: int, at: int | None) -> None:
    """Print rows [first, first + count) of the global sequence.

    Args:
        drafter: the ``drafter`` group.
        at: the position in each of them whose rounds are spelled out; None: the first where all of them count.
    """
    rows = list(itertools.islice(Walk(sequence), first, first + count))  # a stream knows then what it skipped
    console.print(_sources(sequence))
    marks = BRACKETS if console.color_system is None else ("", "")
    trained = "trained on".join(marks)
    console.print(
        Text.assemble((trained, TRAINED), "  ", ("not trained on", UNTRAINED), "  ", ("cut between documents", CUT))
    )
    for number, documents in enumerate(rows, start=first):
        row = sequence.row(documents, sequence.max_length)
        used = int((row["document_ids"] > 0).sum())
        targets = int((row["labels"] != -100).sum())
        console.rule(
            f"row {number}: {len(documents)} documents, {used} of {sequence.max_length} tokens, {targets} targets"
        )
        _print_documents(console, sequence, documents, row, tokenizer, marks)
        console.print(_rounds(drafter, row, at, lambda token: _shown(tokenizer, token)))


def _sources(sequence: RowSequence) -> Table:
    table = Table("source", "documents", "tokens", "pieces", "skipped", "share", title=f"data ({sequence.mixture})")
    for source, share in zip(sequence.sources, sequence.shares, strict=True):
        if isinstance(source, Pieces):
            documents = source.source.documents
            counts: tuple[int | str, ...] = (
                len(documents),
                int(documents["length"].sum()),
                len(source),
                source.skipped,
            )
        else:
            counts = ("stream", "", "", source.skipped)
        # In an epoch mixture a source's share is that of its examples.
        share = f"{share:.1%}" if sequence.mixture == "endless" else ""
        table.add_row(source.name, *(f"{n:,}" if isinstance(n, int) else n for n in counts), share)
    return table


def _shown(tokenizer, token: int) -> str:
    return tokenizer.decode([token]).replace("\n", "↵")


def _print_documents(
    console: Console, sequence: RowSequence, documents, row, tokenizer, marks: tuple[str, str]
) -> None:
    for index, document in enumerate(documents, start=1):
        where = np.flatnonzero(row["document_ids"] == index)
        pieces = sequence.sources[document.source]
        at = pieces.where(document.piece)
        heading = f"── document {index} · positions {where[0]}–{where[-1]} · {pieces.name} · {at} "
        console.print(Text(heading.ljust(console.width, "─"), CUT), no_wrap=True, overflow="crop")
        text = Text()
        # Neighbours of one kind are decoded together: a character may be several tokens.
        trained = row["labels"][where] != -100
        for run in np.split(where, np.flatnonzero(np.diff(trained)) + 1):
            decoded = tokenizer.decode(row["input_ids"][run]).replace("\n", "↵\n")
            if row["labels"][run[0]] != -100:
                text.append(decoded.join(marks), TRAINED)
            else:
                text.append(decoded, UNTRAINED)
        console.print(text)
    if padding := int((row["document_ids"] == 0).sum()):
        console.print(Text(f"── {padding} positions of padding", CUT))


def _rounds(drafter, row, at: int | None, shown: Callable[[int], str]) -> Table | Text:
    """What the base's row ``at`` and every round of it predict."""
    labels, documents = (torch.from_numpy(row[key])[None] for key in ("labels", "document_ids"))
    targets = joint_targets(labels, documents, drafter.num_steps, drafter.pairing)
    position = {int(r) + 1: index for index, r in enumerate(targets.rows)}
    # Round k of row t has the target at t + 1 + offset + k.
    ahead = [1, *(1 + targets.offset + k for k in range(drafter.num_steps))]

    def counts(t: int) -> list[bool]:
        return [t + a in position and bool(targets.valid[position[t + a], c]) for c, a in enumerate(ahead)]

    if at is None:
        at = next((t for t in range(labels.shape[1]) if all(counts(t))), None)
        if at is None:
            return Text("no position of this row has a target in every round", NOTE)
    table = Table("", "reads", "state", "predicts", "counts", title=f"position {at} (pairing {drafter.pairing})")
    ids, ids_document = row["input_ids"], row["document_ids"]
    for column, (a, counted) in enumerate(zip(ahead, counts(at), strict=True)):
        read, target = (at if column == 0 else at + a - 1), at + a
        state = "" if column == 0 else f"h[{at}]" if column == 1 else f"of round {column - 2}"
        inside = target < len(ids) and ids_document[target] == ids_document[at] > 0
        predicts = Text(f"x[{target}] {shown(int(ids[target]))!r}" if inside else f"x[{target}]")
        predicts.stylize(TRAINED if counted else UNTRAINED)
        reason = "yes" if counted else "no: not trained on" if inside else "no: beyond the document"
        reads = f"x[{read}] {shown(int(ids[read]))!r}" if read < len(ids) else f"x[{read}]"
        table.add_row("base" if column == 0 else f"round {column - 1}", Text(reads), state, predicts, reason)
    return table
