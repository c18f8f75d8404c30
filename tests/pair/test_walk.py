"""The walk of decoding over the rows of a text, against one row after the other."""

import pytest
import torch

from joint_train.pair.walk import decoding_rows


def one_by_one(rows: list[int], accepted: list[int]) -> list[bool]:
    visited, targets = [False] * len(accepted), set(rows)
    for row in (row for row in rows if row - 1 not in targets):
        while row in targets:
            visited[row] = True
            row += accepted[row] + 1
    return visited


@pytest.mark.parametrize("supervised", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("length", [2, 3, 64, 500])
def test_the_walk_visits_the_rows_of_a_loop(length, supervised):
    generator = torch.Generator().manual_seed(length)
    for most in (0, 1, 4):
        rows = (torch.rand(length - 1, generator=generator) < supervised).nonzero().squeeze(1)
        left = torch.zeros(length, dtype=torch.int64)  # targets that follow a row's own in its run
        for row in reversed(range(length - 2)):
            left[row] = (left[row + 1] + 1) if (rows == row + 1).any() else 0
        accepted = torch.minimum(torch.randint(most + 1, (length,), generator=generator), left)
        assert decoding_rows(rows, accepted).tolist() == one_by_one(rows.tolist(), accepted.tolist())


def test_runs_of_accepted_rows_count_once():
    """Rows that accept 4 drafts or none in blocks of 16, on average 2: decoding stops less often in the former."""
    accepted = (torch.arange(4096) // 16 % 2 * 4).long()
    accepted[-8:] = 0
    visited = decoding_rows(torch.arange(4095), accepted)
    row_mean, walk = 1 + accepted.double().mean(), 1 + accepted[visited].double().mean()
    assert row_mean == pytest.approx(3.0, abs=0.02) and 1.7 < walk < 2.0
    assert (accepted[visited] + 1).sum() == pytest.approx(4095, abs=5)
