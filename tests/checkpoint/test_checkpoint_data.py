"""The real job, saved on N ranks and resumed on M: the same samples in the same steps, and the same losses."""

import json

import pytest
from ranks import run_ranks
from test_torture import SETTINGS

ROWS = 4  # of a step, however many ranks share them


def train(rank, overrides):
    """The job; every row that this rank trained on, by step."""
    from joint_train.config import load
    from joint_train.distributed.preemption import Preemption
    from joint_train.train import trainer

    job = trainer.Trainer(load(overrides), Preemption(60))
    rows: dict[int, list] = {}
    prepare = job.prepare

    def recorded(batch, *args):
        if job.model.training:
            rows.setdefault(job.step + 1, []).extend(map(tuple, batch["input_ids"].tolist()))
        return prepare(batch, *args)

    job.prepare = recorded
    job.train()
    return rows


def run(ranks, pair, output_dir, steps, *more):
    overrides = [*SETTINGS, f"pair={pair}", f"output_dir={output_dir}", f"max_steps={steps}", "data.mixture=epoch"]
    rows = run_ranks(train, ranks, [*overrides, f"optim.grad_accum={ROWS // ranks}", *more])
    return {step: sorted(row for of_rank in rows for row in of_rank[step]) for step in rows[0]}


def losses(output_dir):
    records = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: (r["base_loss"], r["drafter_loss"], r["grad_norm"]) for r in records if "grad_norm" in r}


@pytest.fixture(scope="module")
def whole(starter_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(2, starter_dir, folder, 5), losses(folder)


@pytest.mark.parametrize(
    ("before", "after", "sharding"),
    [
        (2, 1, ()),
        (2, 4, ("parallel.dp_replicate=2",)),
        pytest.param(4, 2, (), marks=pytest.mark.slow),
    ],
)
def test_resharding_loses_and_repeats_no_sample(starter_dir, tmp_path, whole, before, after, sharding):
    rows = run(before, starter_dir, tmp_path, 2) | run(after, starter_dir, tmp_path, 5, *sharding)
    expected, expected_losses = whole
    assert rows == expected
    assert all(len(of_step) == ROWS for of_step in rows.values())
    seen = losses(tmp_path)
    assert seen.keys() == expected_losses.keys()
    for step, values in expected_losses.items():
        assert seen[step] == pytest.approx(values, rel=1e-4), step
