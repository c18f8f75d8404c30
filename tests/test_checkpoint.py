"""Saving and resuming: exact, on any number of ranks, refusing what doesn't fit."""

import numpy as np
import pytest
from checkpoint_run import train
from ranks import run_ranks


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not np.array_equal(a[name], b[name])]
    assert not different, different


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, background):
    overrides = {"checkpoint.async": background}
    whole = run_ranks(train, 2, tmp_path / "whole", overrides, 6)
    run_ranks(train, 2, tmp_path / "parts", overrides, 4)
    parts = run_ranks(train, 2, tmp_path / "parts", overrides, 6)
    for (losses, end), (losses_resumed, end_resumed) in zip(whole, parts, strict=True):
        assert losses_resumed == {step: losses[step] for step in (5, 6)}
        same(end, end_resumed)
