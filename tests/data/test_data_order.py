"""The global sequence of rows on documents that are only lengths: properties that don't depend on how it is made."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joint_train.data.loader import RankBatches
from joint_train.data.packing import LOOKAHEAD
from joint_train.data.pieces import Pieces
from joint_train.data.rows import RowSequence, Walk

COUNTS = (50, 33)
CAPACITY = 100


def sequence(
    counts=COUNTS, weights=None, mixture="endless", seed=0, packing=True, shuffle=True, epochs=None, mean=None, of=0
):
    """Documents of exponentially distributed lengths, ``mean`` on average; of 1 to 8 tokens without it."""
    sources = []
    for number, count in enumerate(counts):
        random = np.random.default_rng([number, of])
        lengths = random.integers(1, 9, count) if mean is None else random.exponential(mean, count).astype(int)
        name = SimpleNamespace(name=f"s{number}")
        lengths = lengths.clip(1, CAPACITY)
        sources.append(Pieces(name, np.arange(count), np.zeros(count, dtype=int), lengths))
    data = SimpleNamespace(max_length=CAPACITY, packing=packing, train_on="assistant")
    return RowSequence(sources, list(weights or [1.0] * len(counts)), data, seed, mixture, shuffle, epochs)


def plain(rows) -> list[list[tuple[int, int]]]:
    return [[(document.source, document.piece) for document in row] for row in rows]


def check_passes(rows: list[list[tuple[int, int]]], counts) -> None:
    """Each document once before any again, and twice in a row only beside every other one of its source."""
    seen = [np.zeros(count, dtype=int) for count in counts]
    least, at_least = [0] * len(counts), list(counts)
    for row in rows:
        inside = [Counter() for _ in counts]
        for source, piece in row:
            assert seen[source][piece] == least[source], "again before another was there"
            seen[source][piece] += 1
            at_least[source] -= 1
            inside[source][piece] += 1
            if not at_least[source]:
                least[source], at_least[source] = least[source] + 1, counts[source]
        for source, held in enumerate(inside):
            if held and max(held.values()) > 1:
                assert len(held) == counts[source] and max(held.values()) - min(held.values()) <= 1


sizes = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 400), st.integers(1, 10_000)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), counts=sizes, packing=st.booleans(), shuffle=st.booleans(), mean=st.sampled_from([2, 10, 40]))
def test_every_document_once_before_any_again(data, counts, packing, shuffle, mean):
    weights = data.draw(st.lists(st.sampled_from([0.1, 1.0, 3.0, 7.5]), min_size=len(counts), max_size=len(counts)))
    made = sequence(counts, weights, packing=packing, shuffle=shuffle, mean=mean)
    rows = plain(itertools.islice(Walk(made), 300 if packing else 2000))
    check_passes(rows, counts)
    # The weights hold at every place, but for what waits for space.
    drawn, share = np.zeros(len(counts)), np.array(weights) / sum(weights)
    for number, row in enumerate(rows):
        drawn += np.bincount([source for source, _ in row], minlength=len(counts))
        if number % 50 == 0:
            assert np.abs(drawn - share * drawn.sum()).max() <= 2 + 3 * LOOKAHEAD * packing


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    packing=st.booleans(),
    parts=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4),
)
def test_ranks_and_resumes_change_nothing(counts, packing, parts):
    """Whatever runs share the sequence: ranks, micro-batches and steps of each, from where the one before it ended."""
    made = sequence(counts, mean=20, packing=packing)
    tokenizer = SimpleNamespace(name_or_path="")
    got, position = [], {**Walk(made).position, "data": "these"}
    for size, micro_batch, steps in parts:
        ranks = [RankBatches(made, position, rank, size, micro_batch, None, tokenizer) for rank in range(size)]
        for step in range(steps):
            for rank, batches in enumerate(ranks):
                got += batches._take((step * size + rank) * micro_batch, (step * size + rank + 1) * micro_batch)
        for batches in ranks:
            batches._take(steps * size * micro_batch, steps * size * micro_batch)
        positions = [{**position, **batches.walk.position} for batches in ranks]
        assert all(other == positions[0] for other in positions)
        position = positions[0]
    assert plain(got) == plain(itertools.islice(Walk(made), len(got)))
    assert position["rows"] == len(got) and position["documents"] == sum(map(len, got))


def first_fit_decreasing(lengths) -> int:
    """Rows that the best known plain way of packing needs, with all documents in sight and no order to keep."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = next((i for i, space in enumerate(spaces) if space >= length), None)
        if at is None:
            spaces.append(CAPACITY - length)
        else:
            spaces[at] -= length
    return len(spaces)


@pytest.mark.parametrize("count", [100, 300, 1000, 4000])
@pytest.mark.parametrize("mean", [3, 10, 20, 35])
def test_rows_are_full(count, mean):
    made = sequence([count], mean=mean)
    rows = list(itertools.islice(Walk(made), 1000))
    fill = sum(document.length for row in rows for document in row) / (CAPACITY * len(rows))
    lengths = made.sources[0].length
    possible = lengths.sum() / CAPACITY / first_fit_decreasing(lengths)
    assert fill >= min(0.99, possible - 0.005)


def test_small_sources_beside_large_ones_leave_rows_full():
    for counts, weights in (([5000, 40], [0.8, 0.2]), ([50] * 8, [1.0] * 8), ([5000, 1], [0.9, 0.1])):
        rows = list(itertools.islice(Walk(sequence(counts, weights, mean=10)), 1000))
        assert sum(document.length for row in rows for document in row) >= 0.99 * CAPACITY * len(rows)


def test_no_document_waits_for_long():
    """A document that never fits well gets its row, too: none lags behind by more than the documents looked at."""
    made = sequence([3000], mean=20)
    placed = [document.piece for row in itertools.islice(Walk(made), 500) for document in row]
    order = made._order(0, 3000, 0).tolist()
    rank = {piece: at for at, piece in enumerate(order)}
    assert max(abs(rank[piece] - at) for at, piece in enumerate(placed[:2000])) < 3 * LOOKAHEAD


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("epochs", [1.0, 2.5, 0.1])
@pytest.mark.parametrize("mixture", ["epoch", "endless"])
def test_epochs_end(packing, epochs, mixture):
    made = sequence(packing=packing, epochs=epochs, mixture=mixture)
    rows = plain(Walk(made))
    assert len(rows) == made.count_rows()
    documents = list(itertools.chain(*rows))
    assert len(documents) == made.documents == round(epochs * 83) and made.epoch(len(documents)) == pytest.approx(
        epochs, abs=0.01
    )
    check_passes(rows, COUNTS)
    if mixture == "epoch":
        check_passes([[(0, source * COUNTS[0] + piece) for source, piece in row] for row in rows], [83])
    if mixture == "epoch":
        times = Counter(documents)
        everything = {(source, piece) for source, count in enumerate(COUNTS) for piece in range(count)}
        for document in everything:
            assert int(epochs) <= times[document] <= -int(-epochs // 1)
    if not packing:  # nothing moves for the end
        assert rows == plain(itertools.islice(Walk(sequence(packing=packing, mixture=mixture)), len(rows)))


def test_more_epochs_go_on_where_fewer_ended():
    """A run of one epoch that is resumed with two: no document is lost or repeated at the seam."""
    for mixture in ("epoch", "endless"):
        walk = Walk(sequence(mixture=mixture, epochs=1.0))
        first = plain(walk)
        rest = plain(Walk(sequence(mixture=mixture, epochs=2.0), walk.position))
        documents = Counter(itertools.chain(*first, *rest))
        assert sum(documents.values()) == 2 * 83
        check_passes([*first, *rest], COUNTS)


def test_each_pass_has_another_order_and_the_seed_moves_everything():
    made = [sequence([48, 48], packing=False, seed=seed) for seed in (0, 0, 1)]
    first, same, other = ([row[0] for row in itertools.islice(Walk(s), 960)] for s in made)
    assert first == same
    assert [d.source for d in first] != [d.source for d in other]
    orders = set()
    for run in (first, other):
        for source in (0, 1):
            pieces = [document.piece for document in run if document.source == source]
            for begin in range(0, len(pieces) - 47, 48):
                assert sorted(pieces[begin : begin + 48]) == list(range(48))
                orders.add(tuple(pieces[begin : begin + 48]))
    assert len(orders) >= 36, "no order of one pass, source or seed is another's"


def test_unshuffled_sources_keep_their_files_order_and_their_weights():
    rows = plain(itertools.islice(Walk(sequence(weights=[3.0, 1.0], shuffle=False, packing=False)), 400))
    drawn = [document for (document,) in rows]
    following = [itertools.cycle(range(count)) for count in COUNTS]
    assert drawn == [(source, next(following[source])) for source, _ in drawn]
    assert [source for source, _ in drawn[:8]].count(0) == 6


def test_a_position_holds_without_what_came_before():
    made = sequence(mean=20)
    walk = Walk(made)
    rows = []
    for _ in range(60):
        position = walk.position
        assert len(position["left"]) <= 3 * LOOKAHEAD, "and is small"
        assert plain([next(Walk(sequence(mean=20), position))]) == plain([row := next(walk)])
        rows.append(row)


def test_the_orders_of_many_sources_are_each_made_once(monkeypatch):
    """What is kept is by source: a fixed number of orders would make those of the others anew again and again."""
    from joint_train.data import rows

    made = []
    monkeypatch.setattr(rows, "permutation", lambda *key: made.append(key) or np.arange(key[0]))
    walk = Walk(sequence([2000] * 20, packing=False))
    for _ in itertools.islice(walk, 20_000):
        pass
    assert len(made) == len(set(made)) <= 20
