"""Killed at every point of a save, and killed again and again at random moments of the real job."""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint_run import build_stand_in, config
from ranks import CONTEXT

from joint_train.checkpoint import Checkpointer, layout
from joint_train.checkpoint.reader import Reader, stored_tensors
from joint_train.checkpoint.state import load_tensors
from joint_train.checkpoint.store import Store
from joint_train.distributed.preemption import PREEMPTED

# --- every point of a save ------------------------------------------------------------------------------------------


def in_child(function, *args) -> str:
    """The function's result, or what it raised, from a process in which forking is safe."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_send, args=(theirs, function, *args))
    process.start()
    theirs.close()
    assert ours.poll(1800), "no answer"
    failed, result = ours.recv()
    process.join(10)
    assert not failed, result
    return result


def _send(pipe, function, *args):
    import traceback

    torch.set_num_threads(1)
    try:
        pipe.send((False, function(*args)))
    except BaseException:
        pipe.send((True, traceback.format_exc()))


EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "fcntl.lockf"}


def die_before_operation(number: int, folder) -> None:
    """SIGKILL this process as it is about to do its ``number``-th operation on files below ``folder``."""
    count = 0

    def hook(event, args):
        nonlocal count
        below = str(folder) in str(args[0]) if args else False
        of_rmtree = event in ("os.remove", "os.rmdir") and args[1] != -1  # names relative to an open folder
        if event in EVENTS and (below or of_rmtree or event == "fcntl.lockf"):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def forked(function) -> int:
    """The exit status of a fork that runs the function: 0, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def open_run(folder, background=False):
    cfg = config({"checkpoint.background": background, "checkpoint.keep_last": 1})
    return cfg, Checkpointer(folder, cfg.checkpoint, timeout_seconds=30, lock_wait_seconds=0)


def save(folder, step, model, optimizer, background=False):
    cfg, checkpointer = open_run(folder, background)
    checkpointer.find_resume()
    checkpointer.save(step, model, optimizer, {"step": step}, config=cfg)
    checkpointer.close()


def assert_survived(folder, at_least, at_most):
    """The newest checkpoint that a resume takes, on opening the run again; all that is there is whole."""
    for path in layout.list_steps(folder / "checkpoints"):
        layout.verify(path)
    _, checkpointer = open_run(folder)
    step = layout.step_of(checkpointer.find_resume())
    checkpointer.close()
    assert at_least <= step <= at_most
    assert all(layout.step_of(path) for path in (folder / "checkpoints").iterdir())
    return step


def kill_saves(folder, background):
    """Save step 1; then, from there, save step 2 (and prune step 1), killed before each operation in turn."""
    model, optimizer = build_stand_in()
    start, run = folder / "start", folder / "run"
    save(start, 1, model, optimizer)
    survivors = []
    for number in range(1, 1000):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(start, run)

        def attempt(number=number):
            die_before_operation(number, run)
            save(run, 2, model, optimizer, background)

        status = forked(attempt)
        assert status in (0, -signal.SIGKILL), status
        survivors.append(assert_survived(run, 1, 2))
        if status == 0:
            assert survivors == sorted(survivors), "a later kill lost what an earlier one kept"
            return survivors
    raise AssertionError("no end")


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sync", "async"])
def test_a_save_killed_at_every_point_of_it(tmp_path, background):
    survivors = in_child(kill_saves, tmp_path, background)
    assert len(survivors) > 40 and survivors.count(1) > 20 and survivors.count(2) > 3


def kill_mirrored(folder, every):
    """Save steps 2 and 3 with a mirror, killed before every so many-th operation on either; then the disk is lost."""
    model, optimizer = build_stand_in()
    start, live = folder / "start", folder / "live"
    mirrored(live, 1, model, optimizer)
    live.rename(start)
    kills = 0
    for number in range(1, 2000, every):
        shutil.rmtree(live, ignore_errors=True)
        shutil.copytree(start, live)

        def attempt(number=number):
            die_before_operation(number, live)
            for step in (2, 3):
                mirrored(live, step, model, optimizer)

        status = forked(attempt)
        assert status in (0, -signal.SIGKILL), status
        store = Store(str(live / "mirror"))
        there = store.steps()
        assert there, "a kill left a mirror without a checkpoint"
        for step in there:
            layout.verify(store.fetch(step, folder / "fetched"))  # what counts there is whole
        shutil.rmtree(folder / "fetched")
        assert resumed(live) >= max(there)
        shutil.rmtree(live / "run")
        assert resumed(live) >= max(there)
        if status == 0:
            assert there == [3, 2]
            return kills
        kills += 1
    raise AssertionError("no end")


def mirrored(live, step, model, optimizer):
    cfg = config({"checkpoint.keep_last": 2, "checkpoint.mirror": str(live / "mirror")})
    checkpointer = Checkpointer(live / "run", cfg.checkpoint, timeout_seconds=30, lock_wait_seconds=0)
    checkpointer.find_resume()
    checkpointer.save(step, model, optimizer, {"step": step}, config=cfg)
    checkpointer.close()


def reopen(live):
    """Resume a run with a mirror, as far as its checkpoint; the exit code of this process is its step."""
    cfg = config({"checkpoint.keep_last": 2, "checkpoint.mirror": str(live / "mirror")})
    checkpointer = Checkpointer(live / "run", cfg.checkpoint, timeout_seconds=30, lock_wait_seconds=0)
    path = checkpointer.find_resume()
    layout.verify(path)
    checkpointer.close()
    os._exit(10 + layout.step_of(path))


def resumed(live):
    """The step that a resume takes."""
    return forked(lambda: reopen(live)) - 10


def kill_fetches(folder, every):
    """A run on an empty disk fetches from its mirror, killed before every so many-th operation."""
    model, optimizer = build_stand_in()
    start, live = folder / "start", folder / "live"
    mirrored(live, 1, model, optimizer)
    shutil.rmtree(live / "run")
    live.rename(start)
    for kills, number in enumerate(range(1, 1000, every)):
        shutil.rmtree(live, ignore_errors=True)
        shutil.copytree(start, live)

        def attempt(number=number):
            die_before_operation(number, live / "run")
            reopen(live)

        status = forked(attempt)
        assert status in (11, -signal.SIGKILL), status
        assert resumed(live) == 1
        if status == 11:
            return kills
    raise AssertionError("no end")


def kill_caches(folder, starter_dir, every):
    """A source is tokenised, killed before every so many-th operation on the cache; then again, to the same batches."""
    from transformers import AutoTokenizer

    from joint_train.config import load
    from joint_train.data import build_loader

    source = folder / "rows.jsonl"
    source.write_text("".join((starter_dir / "train.jsonl").read_text().splitlines(keepends=True)[:20]))
    overrides = ["+experiment=starter", f"pair={starter_dir}", f"data.train=[{{path: {source}}}]", "data.num_workers=0"]
    cfg = load([*overrides, f"data.cache_dir={folder}/cache", "data.max_length=64"])
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.base)

    def first_batch():
        return next(iter(build_loader(cfg, tokenizer, "train", 0, 1)))["input_ids"]

    expected = first_batch()
    for kills, number in enumerate(range(1, 1000, every)):
        shutil.rmtree(folder / "cache")

        def attempt(number=number):
            die_before_operation(number, folder / "cache")
            first_batch()

        status = forked(attempt)
        assert status in (0, -signal.SIGKILL), status
        assert torch.equal(first_batch(), expected)
        if status == 0:
            return kills
    raise AssertionError("no end")


def test_uploads_fetches_and_caches_killed_here_and_there(starter_dir, tmp_path):
    for name in ("mirror", "fetch", "cache"):
        (tmp_path / name).mkdir()
    assert in_child(kill_mirrored, tmp_path / "mirror", 41) > 2
    assert in_child(kill_fetches, tmp_path / "fetch", 19) > 1
    assert in_child(kill_caches, tmp_path / "cache", starter_dir, 11) > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills_outside_of_steps(starter_dir, tmp_path):
    """With those of saves and recoveries above, and of exports in tests/weights/test_export_whole.py."""
    for name in ("save", "recover", "mirror", "fetch", "cache"):
        (tmp_path / name).mkdir()
    kills = {
        "saving": len(in_child(kill_saves, tmp_path / "save", False)) - 1,
        "recovering": in_child(kill_recoveries, tmp_path / "recover") - 1,
        "saving and uploading": in_child(kill_mirrored, tmp_path / "mirror", 3),
        "fetching": in_child(kill_fetches, tmp_path / "fetch", 1),
        "tokenising": in_child(kill_caches, tmp_path / "cache", starter_dir, 1),
    }
    print(f"{sum(kills.values())} kills outside of steps: {kills}")
    assert sum(kills.values()) >= 100


def kill_recoveries(folder):
    """A run that left everything a run can leave, opened again and killed before each operation in turn."""
    model, optimizer = build_stand_in()
    start, run = folder / "start", folder / "run"
    for step in (1, 2, 3):
        cfg, checkpointer = open_run(start)
        checkpointer.cfg.keep_last = 0
        checkpointer.save(step, model, optimizer, {"step": step}, config=cfg)
        checkpointer.close()
    checkpoints = start / "checkpoints"
    (checkpoints / "step_00000003").rename(checkpoints / "step_00000003.tmp-aa")  # whole, without its name yet
    (checkpoints / "step_00000001").rename(checkpoints / "step_00000001.trash-aa")
    shutil.copytree(checkpoints / "step_00000002", checkpoints / "step_00000004.tmp-aa")
    (checkpoints / "step_00000004.tmp-aa" / layout.MANIFEST).unlink()
    for number in range(1, 1000):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(start, run)

        def attempt(number=number):
            die_before_operation(number, run)
            open_run(run)[1].close()

        status = forked(attempt)
        assert status in (0, -signal.SIGKILL), status
        assert assert_survived(run, 3, 3) == 3
        if status == 0:
            return number
    raise AssertionError("no end")


def test_a_recovery_killed_at_every_point_of_it(tmp_path):
    assert in_child(kill_recoveries, tmp_path) > 20


# --- the real job ---------------------------------------------------------------------------------------------------

SETTINGS = [
    "+experiment=starter",
    "data.max_length=32",
    "data.micro_batch_size=1",
    "data.num_workers=0",
    "optim.schedule=constant",
    "optim.warmup_steps=2",
    "drafter.num_steps=2",
    "eval.every=0",
    "eval.batches=1",
    "eval.prompts=0",
    "tracking.wandb=disabled",
    "checkpoint.every=1",
    "checkpoint.keep_last=2",
    "parallel.timeout_seconds=60",
    "model.export.at_end=false",
]


def run_rank(rank, store, log, overrides):
    from joint_train.config import load
    from joint_train.train import trainer

    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    trainer.run(load(overrides))


class Job:
    """Two ranks of the main job."""

    def __init__(self, folder, *overrides):
        self.scratch = tempfile.mkdtemp(dir=folder)
        self.log = f"{self.scratch}/log"
        self.processes = [
            CONTEXT.Process(target=run_rank, args=(rank, f"{self.scratch}/store", self.log, [*SETTINGS, *overrides]))
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def kill(self, ranks) -> None:
        """SIGKILL some ranks; the others notice, or are killed too as a launcher would do."""
        for rank in ranks:
            self.processes[rank].kill()
        for process in self.processes:
            process.join(1)
            process.kill()
            process.join()

    def finish(self, code: int = 0) -> None:
        for process in self.processes:
            process.join(240)
        codes = [process.exitcode for process in self.processes]
        self.kill([])
        with open(self.log) as log:
            assert codes == [code, code], f"{codes}: {log.read()[-4000:]}"


MOMENTS = {
    "start-up": lambda names, before: True,
    "writing": lambda names, before: any(".tmp-" in name for name in names - before),
    "renamed": lambda names, before: any(name.startswith("step_") and "." not in name for name in names - before),
    "removing": lambda names, before: any(".trash-" in name for name in names - before),
}


def wait_for(moment, checkpoints, job, occurrence) -> bool:
    """Until the folder has shown the moment so many times; False if the job ended before."""
    before = set(os.listdir(checkpoints)) if checkpoints.exists() else set()
    deadline = time.monotonic() + 120
    while job.running() and time.monotonic() < deadline:
        names = set(os.listdir(checkpoints)) if checkpoints.exists() else set()
        if MOMENTS[moment](names, before):
            occurrence -= 1
            if occurrence <= 0:
                return True
        before |= names
        time.sleep(0.0005)
    return False


def newest_good(checkpoints) -> int:
    """The newest step a resume could take, read to the last byte, in the folder as the kill left it."""
    for path in layout.list_steps(checkpoints):
        layout.verify(path)  # raises: whatever has a checkpoint's name is whole
        return layout.step_of(path)
    return 0


def torture(starter_dir, folder, kills, seed) -> None:
    chance = random.Random(seed)
    run = folder / "run"
    checkpoints = run / "checkpoints"
    counts = dict.fromkeys(MOMENTS, 0)
    reached, killed = 0, 0
    while killed < kills:
        background = chance.choice(["true", "false"])
        job = Job(
            folder, f"pair={starter_dir}", f"output_dir={run}", f"checkpoint.background={background}", "max_steps=9999"
        )
        moment = list(MOMENTS)[killed % len(MOMENTS)]
        found = wait_for(moment, checkpoints, job, chance.randint(1, 3))
        time.sleep(chance.uniform(0, 3) if moment == "start-up" else chance.choice([0, 0.002, 0.02, 0.2]))
        if not (found and job.running()):
            job.kill([0, 1])
            with open(job.log) as log:
                raise AssertionError(f"attempt {killed} ended by itself: {log.read()[-4000:]}")
        job.kill(chance.choice([[0, 1], [1, 0], [0], [1]]))
        killed += 1
        counts[moment] += 1
        newest = newest_good(checkpoints) if checkpoints.exists() else 0
        assert newest >= reached, f"a kill at {moment} lost step {reached}: the newest is {newest}"
        reached = newest
    assert reached > 0

    job = Job(folder, f"pair={starter_dir}", f"output_dir={run}", "checkpoint.background=true", "max_steps=9999")
    assert wait_for("renamed", checkpoints, job, 2)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        os.kill(job.processes[1].pid, number)
        time.sleep(0.02)
    job.finish(PREEMPTED)
    assert newest_good(checkpoints) == max(losses(run))  # the step that was under way is saved, none is repeated

    steps = newest_good(checkpoints) + 3
    Job(folder, f"pair={starter_dir}", f"output_dir={run}", f"max_steps={steps}").finish()
    Job(folder, f"pair={starter_dir}", f"output_dir={folder / 'whole'}", f"max_steps={steps}").finish()
    print(f"{killed} kills ({counts}), {steps} steps")
    assert losses(run) == losses(folder / "whole")
    assert len(losses(run)) == steps + 1
    last = layout.folder_name(steps)
    for part in layout.PARTS:
        a, b = (contents(where / "checkpoints" / last / part) for where in (run, folder / "whole"))
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def losses(run) -> dict[int, dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({record["step"] for record in records}) == len(records)
    return {r["step"]: {name: x for name, x in r.items() if "loss" in name or name == "grad_norm"} for r in records}


def contents(folder) -> dict[str, np.ndarray]:
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in stored_tensors(folder).items()
    }
    load_tensors(Reader(folder), tensors)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def test_a_job_killed_again_and_again(starter_dir, tmp_path):
    torture(starter_dir, tmp_path, kills=8, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_job_killed_sixty_times(starter_dir, tmp_path):
    torture(starter_dir, tmp_path, kills=60, seed=2)
