"""Documents into rows: best fit, and the arrays of a row."""

from bisect import bisect_left, insort

import numpy as np


def best_fit(lengths: list[int], capacity: int, sort: bool = True) -> list[list[int]]:
    """Put each document into the row that it leaves least space in.

    Args:
        lengths: of the documents, each at most ``capacity``.
        capacity: of a row.
        sort: longest first, which fills rows best; otherwise in the order given.

    Returns:
        The documents (indices into ``lengths``, ascending) of each row; the rows in the order of their first document.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)) if sort else range(len(lengths))
    rows: list[list[int]] = []
    spaces: list[int] = []  # the different amounts of space that are left somewhere, ascending
    rows_with: dict[int, list[int]] = {}
    for index in order:
        length = lengths[index]
        found = bisect_left(spaces, length)
        if found == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[found]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del rows_with[space], spaces[found]
        rows[row].append(index)
        if left := space - length:
            if left not in rows_with:
                rows_with[left] = []
                insort(spaces, left)
            rows_with[left].append(row)
    return sorted(map(sorted, rows))


def assemble(documents: list[tuple[np.ndarray, np.ndarray, int]], length: int) -> dict[str, np.ndarray]:
    """A row's arrays, each ``[length]`` int64.

    Args:
        documents: of the row: token ids ``[T]``, which of them are targets ``[T]`` bool, index of the source.
        length: of the row; padding is on the right.
    """
    row = {
        "input_ids": np.zeros(length, dtype=np.int64),
        "labels": np.full(length, -100, dtype=np.int64),
        "position_ids": np.zeros(length, dtype=np.int64),
        "document_ids": np.zeros(length, dtype=np.int64),
        "source": np.full(length, -1, dtype=np.int64),
    }
    start = 0
    for number, (tokens, targets, source) in enumerate(documents, start=1):
        span = slice(start, start + len(tokens))
        row["input_ids"][span] = tokens
        row["labels"][span] = np.where(targets, tokens, -100)
        row["position_ids"][span] = np.arange(len(tokens))
        row["document_ids"][span] = number
        row["source"][span] = source
        start = span.stop
    return row
