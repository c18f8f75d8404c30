"""Documents into rows: which of them fill a row best, and the arrays of a row."""

import numpy as np

LOOKAHEAD = 64
"""How many documents a row is filled from."""


def fullest(lengths: list[int], space: int) -> list[int]:
    """The documents that leave the least of a space: an exact subset sum, with bits for the sums that can be reached.

    Args:
        lengths: of the documents, positive; the first ``LOOKAHEAD`` of them are tried.
        space: that they may take together.

    Returns:
        Their indices, ascending; of several ways to the same sum one that needs the fewest documents from the front.
    """
    reached = [1]  # bit n: n tokens can be reached with the documents so far
    mask = (1 << (space + 1)) - 1
    for length in lengths[:LOOKAHEAD]:
        reached.append(reached[-1] | reached[-1] << length & mask)
        if reached[-1] >> space:
            break
    total = reached[-1].bit_length() - 1
    chosen = []
    for index in range(len(reached) - 1, 0, -1):
        if not reached[index - 1] >> total & 1:
            chosen.append(index - 1)
            total -= lengths[index - 1]
    return chosen[::-1]


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
