"""metrics.jsonl has each step once, whatever chain of signals and kills a run goes through."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from joint_train.train.best import Best
from joint_train.train.guards import StepProfiler
from joint_train.train.tracking import JsonLines, Tracker
from joint_train.train.trainer import Trainer

STEPS = 7


class Killed(BaseException):
    """As SIGKILL: nothing in the run may act on it."""


class Signalled:
    """A preemption whose signal comes with an event."""

    came = False

    def should_stop(self) -> bool:
        return self.came

    def ends_at_once(self):
        return self

    def __enter__(self):
        if self.came:
            raise Killed
        return self

    def __exit__(self, *_):
        return None

    def exit(self):
        raise SystemExit(85)

    def seconds_left(self):
        return None


class Watchdog:
    """That of a run has threads."""

    beat = __enter__ = __exit__ = lambda *_: None


class Run(Trainer):
    """The real loop, records and states of a run; steps and validations are numbers, and checkpoints a dictionary."""

    def __init__(self, folder: Path, disk: dict, every: int, event) -> None:
        self.event, self.disk, self.rank, self.output_dir = event, disk, 0, folder
        self.cfg = SimpleNamespace(
            max_steps=STEPS, checkpoint=SimpleNamespace(every=every), output_dir=str(folder),
            tracking=SimpleNamespace(diagnose_every=0, log_every=2),
            eval=SimpleNamespace(every=3, generate_every=4, batches=1),
            model=SimpleNamespace(export=SimpleNamespace(at_end=True, weights="last")),
        )  # fmt: skip
        self.preemption, self.loader, self.val_loader = Signalled(), [], True
        self.checkpointer = SimpleNamespace(restore_random_state=lambda: None, poll=lambda: None, close=lambda: None)
        self.checkpointer.add_metrics = lambda metrics: self.event()
        self.watchdog, self.max_steps, self.last_step = Watchdog(), STEPS, STEPS
        self.best, self.prompts = Best(None, 0), 0
        self.profiler = StepProfiler(None, folder, 0)
        self.stages = SimpleNamespace(peak=0, joint_steps=STEPS)
        self.device, self.memory_at_start = torch.device("cpu"), 0
        self.go_on_from(json.loads(disk["newest"]) if disk else None)
        self.tracker = Tracker.__new__(Tracker)
        self.tracker.sinks = [JsonLines(folder / "metrics.jsonl", self.step, self.unfinished is not None)]

    def train_step(self, batches):
        self.event()
        self.step += 1
        self.event()
        return {"base_loss": 10.0 / self.step} if self.step % 2 == 0 or self.step == STEPS else {}

    def evaluate(self, generate, progress=None):
        for _ in range(3):
            self.event()
            if progress:
                progress()
        return {"val/base_loss": 20.0 / (1 + self.step), **({"val/tokens_per_forward": 2.0} if generate else {})}

    def save(self, block):
        self.event()
        state = {"step": self.step, "before": self.before, "measured": self.measured, "unfinished": self.unfinished}
        self.tracker.sync()
        self.disk["newest"] = json.dumps(state)
        self.event()

    def export(self, folder, step, measured):
        self.event()

    def publish(self, folder):
        self.event()

    def close(self):
        self.event()
        self.tracker.close()


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name != "time"} for line in lines]


def life(folder: Path, disk: dict, every: int, kill: int | None = None, signal: int | None = None) -> tuple[bool, int]:
    """One process of the run: whether it finished, and how many events it had."""
    count = 0

    def event():
        nonlocal count
        count += 1
        if count == signal:
            run.preemption.came = True
        if count == kill:
            raise Killed

    run = Run(folder, disk, every, event)
    try:
        run.train()
        return True, count
    except (Killed, SystemExit):
        return False, count
    finally:
        run.tracker.close()


@pytest.mark.parametrize("every", [1, 3, 5, 100])
def test_each_step_is_recorded_once_through_any_chain_of_kills(tmp_path, every):
    (tmp_path / "whole").mkdir()
    finished, events = life(tmp_path / "whole", {}, every)
    expected = records(tmp_path / "whole")
    assert finished and [r["step"] for r in expected] == [0, 2, 3, 4, 6, 7]
    chance, signals = random.Random(every), 0
    for chain in range(100):
        folder, disk, finished = tmp_path / str(chain), {}, False
        folder.mkdir()
        while not finished:
            kill, signal = (chance.choice([None, chance.randint(1, events)]) for _ in range(2))
            finished, _ = life(folder, disk, every, kill, signal)
            signals += signal is not None
            steps = [record["step"] for record in records(folder)]
            assert steps == sorted(set(steps)), f"chain {chain}: {steps}"
        assert records(folder) == expected, f"chain {chain}"
    assert signals > 50


def test_a_validation_that_was_repeated_by_a_run_that_was_killed_is_recorded_once(tmp_path):
    """By hand: signalled in the validation of step 3, repeated by a run that is killed in step 5, and run again."""
    disk, validation, step = {}, 3, 2  # events of each
    finished, _ = life(tmp_path, disk, 100, signal=validation + 3 * step + 1)
    assert not finished and json.loads(disk["newest"])["unfinished"] and json.loads(disk["newest"])["step"] == 3
    assert [r["step"] for r in records(tmp_path)] == [0, 2]
    assert not life(tmp_path, disk, 100, kill=validation + 2 * step + validation)[0]
    assert [r["step"] for r in records(tmp_path)] == [0, 2, 3, 4]
    assert life(tmp_path, disk, 100)[0]
    assert [r["step"] for r in records(tmp_path)] == [0, 2, 3, 4, 6, 7]
