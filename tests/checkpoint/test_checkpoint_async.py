"""Checkpoints of every step, written in the background to a slow disk, are those of a run that waits for each."""

import time

import numpy as np
from checkpoint_run import TIMEOUT, build, config, seed_all, train_step
from ranks import run_ranks

from joint_train.checkpoint import Checkpointer, layout, state

STEPS = 5
DISK_SECONDS = 0.4  # that a part of a checkpoint takes longer


def save_every_step(rank, folder, background: bool):
    """Train and save each step; for each save, up to which step the run had come when its last part was written."""
    cfg = config({"checkpoint.background": background, "checkpoint.every": 1, "checkpoint.keep_last": 0})
    seed_all(rank)
    model, optimizer = build(cfg)
    trained, written, write = 0, [], state.save_tensors

    def slow(*args, **kwargs):
        time.sleep(DISK_SECONDS)
        written.append(trained)
        return write(*args, **kwargs)

    state.save_tensors = slow
    checkpointer = Checkpointer(folder, cfg.checkpoint, timeout_seconds=TIMEOUT)
    position = {"epoch": 0, "documents": []}  # of the data; it goes on in place
    for step in range(1, STEPS + 1):
        loss = train_step(model, optimizer)
        trained = step
        position["documents"].append(int(np.random.randint(1000)))
        checkpointer.save(step, model, optimizer, {"step": step, "data": position}, config=cfg, metrics={"loss": loss})
    checkpointer.close()
    return written


def test_checkpoints_of_every_step_are_those_of_a_run_that_waits(tmp_path):
    behind = {}
    for name, background in (("waits", False), ("goes_on", True)):
        behind[name] = run_ranks(save_every_step, 2, tmp_path / name, background)
    parts = len(layout.PARTS)
    saves = np.repeat(np.arange(1, STEPS + 1), parts)
    for rank in range(2):
        assert behind["waits"][rank] == saves.tolist()
        ahead = np.array(behind["goes_on"][rank]) - saves
        assert ahead.min() >= 0 and ahead[:-parts].max() == 1  # the next step was trained while this one was written
    for step in range(1, STEPS + 1):
        a, b = (tmp_path / name / "checkpoints" / layout.folder_name(step) for name in behind)
        files = {str(file.relative_to(a)) for file in a.rglob("*") if file.is_file()}
        assert files == {str(file.relative_to(b)) for file in b.rglob("*") if file.is_file()}
        # Weights, moments and AdamW's steps; the position in the data; random states: the bytes of their files.
        exact = {name for name in files if name.endswith(".distcp")} | {"state.json", "random.pt"}
        assert len(exact) == 2 + 2 * parts
        for name in exact:
            assert (a / name).read_bytes() == (b / name).read_bytes(), f"step {step}: {name}"
