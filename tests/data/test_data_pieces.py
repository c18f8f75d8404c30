"""Documents cut to ``data.max_length`` against a plain reference."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from joint_train.data.cache import DOCUMENT, PICTURE, Tokenised
from joint_train.data.pieces import cut
from joint_train.data.template import ASSISTANT, IMAGE

LENGTH = 12


def tokenised(documents: list[list[int]]) -> Tokenised:
    """A source whose documents have these flags; runs of IMAGE are pictures, each of all its neighbours."""
    table, pictures, flags = np.zeros(len(documents), DOCUMENT), [], []
    for index, document in enumerate(documents):
        table[index] = (len(flags), len(document), document.count(ASSISTANT), index + 1, 0, False)
        edges = np.flatnonzero(np.diff(np.array(document) == IMAGE, prepend=False, append=False))
        for start, end in edges.reshape(-1, 2).tolist():
            pictures.append((index, start, end - start - 2, 0, 0, False))
        flags += document
    source = Tokenised("s", Path("."), "key", ["f"], 0, [])
    source.documents, source.pictures = table, np.array(pictures, PICTURE)
    source._tokens, source._flags = np.arange(len(flags), dtype=np.int32), np.array(flags, np.uint8)
    return source


def reference(document: list[int], overlong: str) -> list[tuple[int, int]]:
    """(start, end) of the pieces, token by token."""
    if len(document) > LENGTH and overlong == "drop":
        return []
    pieces, start = [], 0
    while start < len(document):
        end = start
        while end < len(document):  # put in what belongs together, while it fits
            unit = end + 1
            while document[end] == IMAGE and unit < len(document) and document[unit] == IMAGE:
                unit += 1
            if unit - start > LENGTH:
                break
            end = unit
        if end == start:
            break
        pieces.append((start, end))
        start = end
        if overlong == "truncate":
            break
    return [(a, b) for a, b in pieces if len(document) <= LENGTH or ASSISTANT in document[a + 1 : b]]


units = st.lists(st.sampled_from([[0], [0], [ASSISTANT], [ASSISTANT], "image"]), min_size=1, max_size=40)


@st.composite
def flags(draw) -> list[int]:
    """Flags of a document with a target in it; no two images touch."""
    document = []
    for unit in draw(units):
        document += [IMAGE] * draw(st.integers(3, LENGTH + 1)) + [0] if unit == "image" else unit
    return [*document, ASSISTANT]


@settings(max_examples=300, deadline=None)
@given(st.lists(flags(), min_size=1, max_size=4), st.sampled_from(["truncate", "split", "drop"]))
@example([[0] * (LENGTH - 1) + [ASSISTANT], [0] * LENGTH + [ASSISTANT]], "drop")  # one fits exactly
def test_pieces_are_those_of_a_plain_reference(documents, overlong):
    data = SimpleNamespace(max_length=LENGTH, overlong=overlong, train_on="assistant", on_error="raise", unroll="all")
    pieces = cut(tokenised(documents), data)
    expected = [(i, a, b - a) for i, document in enumerate(documents) for a, b in reference(document, overlong)]
    table = np.stack([pieces.document, pieces.start, pieces.length], axis=1)
    assert table.tolist() == [list(row) for row in expected]
    for piece, (index, start, length) in enumerate(expected):
        assert pieces.read(piece)[1].tolist() == documents[index][start : start + length]


@pytest.mark.parametrize("overlong, lost", [("truncate", 1), ("split", 2)])
def test_pieces_without_a_target_are_counted(overlong, lost, caplog):
    document = [0] * LENGTH + [ASSISTANT] + [0] * (LENGTH - 1) + [0, ASSISTANT]
    data = SimpleNamespace(max_length=LENGTH, overlong=overlong, train_on="assistant", on_error="raise", unroll="all")
    assert len(cut(tokenised([document, [0, ASSISTANT]]), data)) == (1 if overlong == "truncate" else 2)
    assert f"1 of 2 documents (50.0%) are longer than data.max_length={LENGTH}" in caplog.text
    assert f"{lost} of the pieces have no answer in them and are left out" in caplog.text
