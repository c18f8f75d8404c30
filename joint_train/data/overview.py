"""What a run trains on and validates with, as a table for its log."""

from collections.abc import Mapping

from joint_train.data.loader import BatchLoader
from joint_train.data.pieces import Pieces

HEADINGS = ("data", "source", "documents", "tokens", "trained", "longest", "cut", "share")


def overview(loaders: Mapping[str, BatchLoader | None]) -> str:
    """A line for each source, with columns that stand one below the other.

    Args:
        loaders: by split, ``train`` and ``val``; None: there is none.
    """
    rows = [HEADINGS]
    for split, loader in loaders.items():
        if loader is None:
            continue
        sequence = loader.sequence
        for source, share in zip(sequence.sources, sequence.shares.tolist(), strict=True):
            part = f"{share:.1%}" if len(sequence.sources) > 1 else ""
            if not isinstance(source, Pieces):
                rows.append((split, source.name, "stream", "", "", "", "", part))
                continue
            documents = source.source.documents
            lengths, tokens = documents["length"], int(documents["length"].sum())
            cut = int((lengths > sequence.max_length).sum())
            rows.append(
                (
                    split,
                    source.name,
                    f"{len(documents):,}",
                    f"{tokens:,}",
                    f"{int(documents['targets'].sum()) / max(tokens, 1):.0%}",
                    f"{int(lengths.max()):,}",
                    f"{cut / len(documents):.1%}" if cut else "",
                    part,
                )
            )
    used = [column for column in zip(*rows, strict=True) if any(column[1:])]
    aligned = [
        [cell.ljust(width) if number < 2 else cell.rjust(width) for cell in column]
        for number, column in enumerate(used)
        for width in [max(map(len, column))]
    ]
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))
