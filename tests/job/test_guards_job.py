"""The main job with a fault in it: NaN in one rank's batch, and a rank that stops answering."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_main_job import SMALL, settings

from joint_train.config import load
from joint_train.distributed.preemption import Preemption
from joint_train.errors import TooManyBadSteps


def poisoned(rank: int, overrides: list[str], steps: list[int]) -> tuple[str, list[torch.Tensor]]:
    """The job on one rank, where rank 1's drafter gives NaN in some steps.

    Returns:
        What it ended with, and the sum of the weights before the first step and after each.
    """
    from joint_train.train import trainer

    sums = []

    class Poisoned(trainer.Trainer):
        def train_step(self, batches):
            if not sums:
                sums.append(self.total())
            hook = None
            if rank == 1 and self.step + 1 in steps:
                hook = self.model.drafter.model.norm.register_forward_hook(lambda module, args, out: out * torch.nan)
            try:
                return super().train_step(batches)
            finally:
                if hook is not None:
                    hook.remove()
                sums.append(self.total())

        def total(self):
            return sum(p.to_local().double().abs().sum() for p in self.model.parameters())

    try:
        Poisoned(load(overrides), Preemption(60)).train()
    except TooManyBadSteps as error:
        return str(error), sums
    return "done", sums


def without_targets(rank: int, overrides: list[str], step: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The job on one rank, where one step has no target on any; sums of weights and of moments after each step."""
    from joint_train.train import trainer

    weights, moments = [], []

    class Masked(trainer.Trainer):
        def prepare(self, batch, sources):
            if self.model.training and self.step + 1 == step:
                batch["labels"] = torch.full_like(batch["labels"], -100)
            return super().prepare(batch, sources)

        def train_step(self, batches):
            metrics = super().train_step(batches)
            states = [x for of_one in self.optimizer.state.values() for x in of_one.values()]
            for sums, tensors in ((weights, list(self.model.parameters())), (moments, states)):
                local = (x.to_local() if hasattr(x, "to_local") else x for x in tensors)
                sums.append(sum(x.detach().double().abs().sum() for x in local))
            return metrics

    Masked(load(overrides), Preemption(60)).train()
    return weights, moments


def records(folder: Path) -> dict[int, dict]:
    return {record["step"]: record for record in map(json.loads, (folder / "metrics.jsonl").open())}


def test_a_poisoned_batch_is_skipped_and_counted_and_the_run_goes_on(starter_dir, tmp_path):
    overrides = settings(starter_dir, tmp_path, "max_steps=5", "model.export.at_end=false")
    for ended, sums in run_ranks(poisoned, 2, overrides, [2, 4]):
        assert ended == "done"
        changed = [bool(after != before) for before, after in zip(sums, sums[1:], strict=False)]
        assert changed == [True, False, True, False, True]
        assert all(torch.isfinite(x) for x in sums)
    found = records(tmp_path)
    assert [found[step]["bad_steps"] for step in range(1, 6)] == [0, 1, 1, 2, 2]
    assert found[2]["grad_norm"] is None and found[3]["grad_norm"] > 0

    run_ranks(poisoned, 2, [*overrides, "max_steps=7"], [7])  # goes on from 5
    found = records(tmp_path)
    assert [found[step]["bad_steps"] for step in (5, 6, 7)] == [2, 2, 3]


def test_a_step_without_a_target_moves_nothing_and_its_metrics_are_null(starter_dir, tmp_path):
    overrides = settings(starter_dir, tmp_path, "max_steps=4", "checkpoint.every=2", "model.export.at_end=false")
    for sums in run_ranks(without_targets, 2, overrides, 2):
        for of_step in sums:
            assert torch.isfinite(torch.stack(of_step)).all()
            assert of_step[1] == of_step[0] and of_step[2] != of_step[1]
    found = records(tmp_path)
    for name in ("base_loss", "drafter_loss", "acceptance_argmax_0", "accepted_length_walked"):
        assert found[2][name] is None and found[3][name] > 0
    assert found[2]["grad_norm"] == 0 and found[4]["bad_steps"] == 0


def test_too_many_in_a_row_end_the_run_with_a_dump(starter_dir, tmp_path):
    overrides = settings(starter_dir, tmp_path, "max_steps=9", "tracking.max_bad_steps=3")
    for ended, sums in run_ranks(poisoned, 2, overrides, [2, 3, 4, 5]):
        assert "tracking.max_bad_steps" in ended and "bad_step_00000004" in ended
        assert len(sums) == 1 + 4
    report = json.loads((tmp_path / "bad_step_00000004" / "rank_1.json").read_text())
    name, facts = next(iter(report["parameters"].items()))
    assert facts["gradient_nonfinite"] > 0 and facts["weight_nonfinite"] == 0, name
    batches = torch.load(tmp_path / "bad_step_00000004" / "rank_1.pt")
    assert len(batches) == 2 and batches[0]["input_ids"].shape == (1, 48)  # SMALL's accumulation and rows
    for batch in batches:
        assert len(batch["rows"]) > 0 and torch.equal(batch["input_ids"].flatten()[batch["rows"] + 1], batch["labels"])


def heartbeats(rank: int, overrides: list[str]) -> list[int]:
    """The job; the watchdog's heartbeats in each of its validations, the first and the last."""
    from joint_train.train import trainer

    beats, of_each = [], []

    class Counted(trainer.Watchdog):
        def beat(self):
            beats.append(self.thread.is_alive())
            super().beat()

    class Validated(trainer.Trainer):
        def evaluate(self, generate, progress=None):
            before = len(beats)
            measured = super().evaluate(generate, progress)
            assert all(beats[before:]), "the watchdog isn't watching"
            of_each.append(len(beats) - before)
            return measured

    trainer.Watchdog = Counted
    Validated(load(overrides), Preemption(60)).train()
    return of_each


def test_a_long_validation_is_no_hang(starter_dir, tmp_path):
    """Every batch and every prompt is a sign of life."""
    small = ["max_steps=1", "eval.batches=6", "eval.prompts=2", "eval.max_new_tokens=2"]
    ((first, last),) = run_ranks(heartbeats, 1, settings(starter_dir, tmp_path, *small))
    assert first >= 8 and last >= 8


HANGS = """
import sys, time
from joint_train.train import trainer

def stops_answering():
    time.sleep(600)

step = trainer.Trainer.train_step

def train_step(self, batches):
    if self.rank == 1 and self.step == 2:
        print(f"hanging {time.time()}", flush=True)
        stops_answering()
    return step(self, batches)

trainer.Trainer.train_step = train_step
sys.argv[0] = "joint_train"
from joint_train.__main__ import main
main()
"""


@pytest.mark.slow
def test_a_rank_that_stops_answering_ends_the_run_with_its_stack_on_screen(starter_dir, tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    timeout = 30
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    overrides = ["+experiment=starter", f"pair={starter_dir}", f"output_dir={tmp_path / 'run'}", *SMALL]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [*command, *overrides, "max_steps=5", f"parallel.timeout_seconds={timeout}"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )
    ended = time.time()
    assert done.returncode != 0
    said = done.stderr.splitlines()
    assert any(line.startswith("[rank 1] ") and "stops_answering" in line for line in said)
    assert any(line.startswith("[rank 0] ") and "in train_step" in line for line in said)  # the one that waits
    hanging = float(done.stdout.split("hanging ")[1].split()[0])
    assert ended - hanging < timeout + 15  # torchrun's own end included
