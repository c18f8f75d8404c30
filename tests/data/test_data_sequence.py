"""The global sequence of rows on documents that are only lengths: properties that don't depend on how it is made."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from joint_train.data.pieces import Pieces
from joint_train.data.rows import Cursor, RowSequence

WINDOW = 16
COUNTS = (50, 33)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr("joint_train.data.rows.WINDOW", WINDOW)


def sequence(mixture, seed=0, counts=COUNTS, weights=(1.0, 1.0), packing=True, shuffle=True):
    sources = []
    for number, count in enumerate(counts):
        lengths = np.random.default_rng(number).integers(1, 9, count)
        sources.append(Pieces(None, np.arange(count), np.zeros(count, dtype=int), lengths))
    data = SimpleNamespace(max_length=10, packing=packing, train_on="assistant")
    return RowSequence(sources, list(weights)[: len(counts)], data, seed, mixture, shuffle)


def documents(sequence, window) -> list[tuple[int, int]]:
    return [tuple(document) for row in sequence.window(window) for document in row.tolist()]


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_of_many_windows_has_each_document_once(packing):
    rows = sequence("epoch", packing=packing)
    assert rows.windows_an_epoch == 6
    everything = sorted((source, piece) for source, count in enumerate(COUNTS) for piece in range(count))
    epochs = [[documents(rows, 6 * epoch + window) for window in range(6)] for epoch in range(3)]
    for epoch in epochs:
        assert [len(window) for window in epoch] == [WINDOW] * 5 + [3]
        assert sorted(itertools.chain(*epoch)) == everything
    assert len({frozenset(epoch[0]) for epoch in epochs}) == 3, "each epoch is cut into windows of its own"


def test_an_endless_source_repeats_whole_in_another_order_each_time():
    rows = sequence("endless", counts=(48, 48), weights=(1.0, 1.0), packing=False)
    drawn = [document for window in range(40) for row in rows._endless_documents(window).tolist() for document in [row]]
    orders = []
    for source in (0, 1):
        pieces = [piece for s, piece in drawn if s == source]
        for first in range(0, len(pieces) - 47, 48):
            assert sorted(pieces[first : first + 48]) == list(range(48))
            orders.append(tuple(pieces[first : first + 48]))
    assert len(orders) > 10 and len(set(orders)) == len(orders), "no order of one pass or one source is another's"


@pytest.mark.parametrize("mixture, counts", [("epoch", (50, 33)), ("endless", (50,)), ("endless", (50, 33))])
def test_the_seed_moves_everything(mixture, counts):
    """The documents of a window, the sources that are drawn, and the order of the rows."""
    first, same, other = (sequence(mixture, seed, counts) for seed in (0, 0, 1))
    assert [documents(first, w) for w in range(9)] == [documents(same, w) for w in range(9)]
    for window in range(9):
        assert set(documents(first, window)) != set(documents(other, window))
    if len(counts) > 1:
        assert [s for s, _ in documents(first, 0)] != [s for s, _ in documents(other, 0)]
        if mixture == "endless":
            assert first._draws(0, 64).tolist() != other._draws(0, 64).tolist()


def test_rows_are_shuffled_in_each_window_anew():
    """Best fit makes the rows of the longest documents first: a run must not see them in that order."""
    rows = sequence("epoch", counts=(80,))
    orders = []
    for window in range(5):
        firsts = [max(map(rows.sources[0].length_of, row[:, 1].tolist())) for row in rows.window(window)]
        orders.append(firsts != sorted(firsts, reverse=True))
    assert all(orders)
    even = sequence("epoch", counts=(80,))
    even.sources[0].length[:] = 10  # a row each, made in the order of the documents
    ranks = set()
    for window in range(5):
        made = even._epoch_documents(window)[:, 1].tolist()
        ranks.add(tuple(made.index(row[0, 1]) for row in even.window(window)))
    assert len(ranks) == 5


def test_unshuffled_sources_stand_where_they_are_drawn():
    rows = sequence("endless", shuffle=False, packing=False, weights=(3.0, 1.0))
    drawn = rows._draws(0, 9 * WINDOW).tolist()
    assert 0.6 < drawn.count(0) / len(drawn) < 0.9
    following = [itertools.cycle(range(count)) for count in COUNTS]
    expected = [(source, next(following[source])) for source in drawn]
    assert [document for window in range(9) for document in documents(rows, window)] == expected


@pytest.mark.parametrize("mixture", ["epoch", "endless"])
def test_any_window_can_be_made_without_those_before_it(mixture):
    rows, walk = sequence(mixture), sequence(mixture)
    forward = [documents(walk, window) for window in range(12)]
    for window in (7, 2, 11, 0, 3):
        assert documents(rows, window) == forward[window]
    cursor = Cursor(rows, 1, 2)
    there = [row.tolist() for row in cursor.rows(0, 40)]
    assert [row.tolist() for row in cursor.rows(0, 40)] == there, "back again"
    flat = [row.tolist() for window in range(1, 12) for row in walk.window(window)]
    assert there == flat[2:42]
