"""SIGTERM or SIGUSR1 outside a training step: real ranks are signalled in each phase of a run, and run again."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks import CONTEXT
from test_main_job import comparable, records, settings

from joint_train.checkpoint import layout
from joint_train.distributed.preemption import OVERRUN, PREEMPTED

STEPS = ["max_steps=4", "eval.every=2", "eval.batches=3", "eval.generate_every=4", "eval.prompts=3"]
STEPS += ["eval.max_new_tokens=3", "checkpoint.every=3"]


def signal_in(phase: str) -> None:
    """Make this process signal itself, once, in the middle of a phase of the run, which then takes its time."""
    from joint_train.data import tokenise
    from joint_train.distributed import preemption
    from joint_train.train import trainer

    def signalled(owner, name: str, call: int, seconds: float = 0.0, when=lambda *args: True) -> None:
        original, calls = getattr(owner, name), []

        def patched(*args, **kwargs):
            calls.extend([1] * when(*args))
            if len(calls) == call:
                calls.append(1)
                os.kill(os.getpid(), signal.SIGTERM if phase != "saving" else signal.SIGUSR1)
                time.sleep(seconds)
            return original(*args, **kwargs)

        setattr(owner, name, patched)

    def of_step(step: int, training: bool):
        return lambda job, *_: job.step == step and job.model.training == training

    if phase == "loading":
        signalled(trainer, "load_pair", 1, 30)
    elif phase == "tokenising":
        signalled(tokenise.Tokenise, "__getitem__", 2, 30)  # num_workers=0: in this process
    elif phase == "first validation":
        signalled(trainer.Trainer, "prepare", 2, 30, of_step(0, False))
    elif phase == "validation":
        signalled(trainer.Trainer, "prepare", 2, 0, of_step(2, False))
    elif phase == "generation":
        signalled(trainer.Trainer, "check", 5, 0, lambda job: job.step == 4)
    elif phase == "saving":
        signalled(preemption.Preemption, "should_stop", 2, 0)  # of step 2, while step 1 is still being written
        save = trainer.Checkpointer._write
        trainer.Checkpointer._write = lambda *args: (time.sleep(1.5), save(*args))
    elif phase.startswith("export"):
        signalled(trainer.Trainer, "export", 1, 0)


def rank_of_run(rank: int, ranks: int, store: str, log: str, overrides: list[str], phase: str | None) -> None:
    from joint_train.config import load
    from joint_train.train import trainer
    from joint_train.weights import placing

    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if phase and rank == ranks - 1:  # one rank's signal is enough, and it needn't be the first's
        signal_in(phase)
    if phase == "export, too slow":
        placing.put_in_place = lambda *args: time.sleep(30)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    trainer.run(load(overrides))


def run(folder, overrides: list[str], ranks: int = 1, phase: str | None = None) -> tuple[list[int], str]:
    """Exit codes of the ranks and what they said; fails if they take more than four minutes."""
    store, log = folder / f"store-{phase}", folder / f"log-{phase}"
    processes = [
        CONTEXT.Process(target=rank_of_run, args=(rank, ranks, str(store), str(log), overrides, phase))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 240
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + 60)  # as torchrun does, which then kills the others
        processes[0].join(0.1)
        time.sleep(0.1)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes, log.read_text()


@pytest.fixture(scope="module")
def whole(starter_dir, tmp_path_factory):
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    codes, said = run(folder, settings(starter_dir, folder / "run", *STEPS), ranks=2)
    assert codes == [0, 0], said
    return folder / "run"


def same_run(one, other) -> None:
    ours, theirs = records(one), records(other)
    assert ours.keys() == theirs.keys()
    for step in ours:
        one_step, other_step = comparable(ours[step]), comparable(theirs[step])
        differ = [name for name in one_step | other_step if one_step.get(name) != other_step.get(name)]
        assert not differ, (step, {name: (one_step.get(name), other_step.get(name)) for name in differ})
    random = "checkpoints/step_00000004/random.pt"  # a repeated validation draws nothing
    for a, b in zip(torch.load(one / random), torch.load(other / random), strict=True):
        assert torch.equal(a["torch"], b["torch"])
    for file in (other / "export").rglob("*.safetensors"):
        assert file.read_bytes() == (one / file.relative_to(other)).read_bytes()
    assert (one / "export" / "drafter" / "config.json").exists()


@pytest.mark.parametrize("phase", ["loading", "tokenising", "first validation"])
def test_before_anything_is_trained_a_run_ends_at_once(starter_dir, tmp_path, phase):
    overrides = settings(starter_dir, tmp_path / "run", *STEPS)
    if phase == "tokenising":
        overrides.append(f"data.cache_dir={tmp_path / 'cache'}")
    codes, said = run(tmp_path, overrides, phase=phase)
    assert codes == [PREEMPTED], said
    assert "there is nothing to save yet" in said and "saving within" not in said
    assert not list((tmp_path / "run").glob("checkpoints/step_*")) and not (tmp_path / "run" / "export").exists()
    if phase == "tokenising":
        half = [path.parent for path in (tmp_path / "cache").rglob("tokens.bin")]
        assert half and all(".tmp-" in path.name for path in half)
        codes, said = run(tmp_path, [*overrides, "max_steps=1", "eval.prompts=0", "model.export.at_end=false"])
        assert codes == [0], said
        assert not list((tmp_path / "cache").rglob("*.tmp-*"))  # what was left half done is gone


@pytest.mark.parametrize(("phase", "step"), [("validation", 2), ("generation", 4)])
def test_a_validation_is_interrupted_saved_and_repeated(starter_dir, tmp_path, whole, phase, step):
    mirror = tmp_path / "mirror"
    overrides = settings(starter_dir, tmp_path / "run", *STEPS, f"checkpoint.mirror=file://{mirror}")
    codes, said = run(tmp_path, overrides, ranks=2, phase=phase)
    assert codes == [PREEMPTED, PREEMPTED], said
    assert step not in records(tmp_path / "run")  # the step's record waits for its validation
    newest = max((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert newest.name == f"step_{step:08d}"
    assert json.loads((newest / "state.json").read_text())["unfinished"]["generate"] == (phase == "generation")
    layout.verify(mirror / "checkpoints" / newest.name)  # uploaded within the grace, too
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as on a fresh machine: the mirror has them
    codes, said = run(tmp_path, overrides, ranks=2)
    assert codes == [0, 0], said
    same_run(tmp_path / "run", whole)
    assert (mirror / "export" / "COMPLETE").exists() and "are missing there" not in said
    # The checkpoint has what was measured of its step, here and in the mirror, as if nothing had interrupted it.
    wanted = {name: x for name, x in records(whole)[step].items() if name.startswith("val/")}
    for run_folder in (tmp_path / "run", mirror):
        assert layout.verify(run_folder / "checkpoints" / newest.name).metrics == wanted


def test_a_background_save_is_finished_and_so_is_that_of_the_last_step(starter_dir, tmp_path, whole):
    overrides = settings(starter_dir, tmp_path / "run", *STEPS, "checkpoint.every=1", "checkpoint.background=true")
    codes, said = run(tmp_path, overrides, ranks=2, phase="saving")
    assert codes == [PREEMPTED, PREEMPTED], said
    found = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert [path.name for path in found] == ["step_00000001", "step_00000002"]
    for path in found:
        layout.verify(path)
    codes, said = run(tmp_path, overrides, ranks=2)
    assert codes == [0, 0], said
    same_run(tmp_path / "run", whole)


def test_an_export_is_finished_or_left_under_another_name(starter_dir, tmp_path, whole):
    overrides = settings(starter_dir, tmp_path / "run", *STEPS)
    codes, said = run(tmp_path, [*overrides, "checkpoint.grace_seconds=1"], ranks=2, phase="export, too slow")
    assert OVERRUN in codes and "saving within 1 s" in said, said
    assert not (tmp_path / "run" / "export" / "base").exists()
    codes, said = run(tmp_path, overrides, ranks=2, phase="export")
    assert codes == [0, 0], said
    assert [path.name for path in (tmp_path / "run" / "export").iterdir() if path.name.startswith(".")] == []
    same_run(tmp_path / "run", whole)
