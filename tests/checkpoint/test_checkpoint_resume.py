"""A resume in one pass: each file is read once, damage is found before anything is trained, one replica reads."""

import logging
import os
import shutil
import sys

import pytest
import torch
from checkpoint_run import TIMEOUT, build, config, everything, seed_all, train_step
from ranks import run_ranks
from test_checkpoint import same

from joint_train.checkpoint import Checkpointer, CheckpointError, layout

HSDP = {"parallel.dp_replicate": 2}


def save_twice(rank, folder, overrides):
    """Checkpoints of steps 1 and 2; everything after each."""
    cfg = config(overrides)
    seed_all(rank)
    model, optimizer = build(cfg)
    checkpointer = Checkpointer(folder, cfg.checkpoint, timeout_seconds=TIMEOUT)
    found = []
    for step in (1, 2):
        train_step(model, optimizer)
        checkpointer.save(step, model, optimizer, {"step": step}, config=cfg)
        found.append(everything(model, optimizer))
    checkpointer.close()
    return found


def resume_all(rank, runs, overrides):
    """Resume each run, into one pair: (checkpoint's name, state, everything, what was said, files opened)."""
    cfg = config(overrides)
    model, optimizer = build(cfg, seed=7)
    results, said, opened = [], [], []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("joint_train").addHandler(handler)
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    for run in runs:
        checkpointer = Checkpointer(run, cfg.checkpoint, timeout_seconds=TIMEOUT, lock_wait_seconds=5)
        said.clear()
        opened.clear()
        try:
            path, state = checkpointer.resume("auto", model, optimizer, config=cfg)
        except CheckpointError as error:
            path, state = error, None
        files = [os.path.relpath(name, path) for name in opened if name.endswith(".distcp")] if state else []
        results.append((state and path.name or str(path), state, everything(model, optimizer), " ".join(said), files))
        checkpointer.close()
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "run"
    return folder, run_ranks(save_twice, 2, folder, {})[0]


def flip(path, where):
    """One bit, at this share of the file."""
    content = bytearray(path.read_bytes())
    content[int((len(content) - 1) * where)] ^= 0x10
    path.write_bytes(content)


HARM = {
    "base/model/__1_0.distcp": (0.5, "base/model/__1_0.distcp has checksum"),
    "base/model/__0_0.distcp": (0.0, "base/model/__0_0.distcp has checksum"),  # no zip any more: it can't be read
    "optimizer/__0_0.distcp": (1.0, "optimizer/__0_0.distcp has checksum"),
    "drafter/model/.metadata": (0.5, "drafter/model/.metadata has checksum"),
    "random.pt": (0.5, "random.pt has checksum"),
    "state.json": (0.5, "state.json has checksum"),
}


def test_damage_is_found_while_loading_and_an_older_checkpoint_is_loaded(tmp_path, saved):
    folder, (first, second) = saved
    runs = [tmp_path / str(number) for number in range(len(HARM) + 2)]
    for run in runs:
        shutil.copytree(folder, run)
    for run, (name, (where, _)) in zip(runs, HARM.items(), strict=False):
        flip(run / "checkpoints/step_00000002" / name, where)
    for step in (1, 2):
        flip(runs[-1] / f"checkpoints/step_0000000{step}/drafter/model/__1_0.distcp", 0.5)
    of_ranks = run_ranks(resume_all, 2, runs, {})
    for results in of_ranks:
        for (name, state, loaded, _, _), _ in zip(results, HARM, strict=False):
            assert name == "step_00000001" and state == {"step": 1}
            same(first, loaded)
        name, state, loaded, said, files = results[-2]  # nothing is wrong with this one
        assert name == "step_00000002" and state == {"step": 2} and said == ""
        same(second, loaded)
        assert files and len(files) == len(set(files))  # none is read a second time for its checksum
        assert "is usable (2 damaged)" in results[-1][0]
    for (_, words), (_, _, _, said, _) in zip(HARM.values(), of_ranks[0], strict=False):  # rank 0 says it
        assert words in said and "step_00000002 is damaged" in said and "an older one is tried" in said


def test_with_other_shards_what_no_rank_reads_whole_is_verified_all_the_same(tmp_path, saved):
    folder, (first, second) = saved
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    shutil.copytree(folder, whole)
    shutil.copytree(folder, damaged)
    flip(damaged / "checkpoints/step_00000002/base/model/__1_0.distcp", 0.5)
    for ranks, overrides in ((1, {}), (4, {}), (4, HSDP)):
        results = run_ranks(resume_all, ranks, [whole, damaged], overrides)
        for rank, ((name, _, loaded, _, files), (older, _, loaded_older, _, _)) in enumerate(results):
            assert (name, older) == ("step_00000002", "step_00000001")
            same(second, loaded)
            same(first, loaded_older)
            if overrides:  # ranks 2 and 3 are the second replica: they read nothing to load it
                again = len(files) != len(set(files))
                assert not again and bool(files) == (rank < 2)
    # Without their optimizer's state, files of frozen parameters are read by none: they are verified nevertheless.
    cfg = config({"freeze.base": True})
    model, optimizer = build(cfg)
    checkpointer = Checkpointer(whole, cfg.checkpoint, timeout_seconds=TIMEOUT, lock_wait_seconds=5)
    path = checkpointer.folder / "step_00000002"
    flip(path / "optimizer/__0_0.distcp", 0.5)
    path, _ = checkpointer.resume("auto", model, optimizer, config=cfg)
    assert path.name == "step_00000001"
    checkpointer.close()


def test_without_checksums_and_with_a_model_that_does_not_fit(tmp_path, saved, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(saved[0], run)
    cfg = config({"checkpoint.checksums": False})
    checkpointer = Checkpointer(run, cfg.checkpoint, timeout_seconds=TIMEOUT, lock_wait_seconds=5)
    model, optimizer = build(cfg)
    path = checkpointer.folder / "step_00000002"
    flip(path / "random.pt", 0.999)
    monkeypatch.setattr(layout, "file_checksum", lambda *_: pytest.fail("a checksum was asked for"))
    found = checkpointer.resume("auto", model, optimizer, config=cfg)
    assert found is not None and found[0] == path
    checkpointer.close()
    monkeypatch.undo()

    cfg = config({})
    small = build(cfg, "31b")
    checkpointer = Checkpointer(tmp_path / "other", cfg.checkpoint, timeout_seconds=TIMEOUT)
    with pytest.raises(CheckpointError, match="was saved from other models than"):
        checkpointer.resume(
            str(checkpointer.folder.parent.parent / "run/checkpoints/step_00000001"), *small, config=cfg
        )
    assert checkpointer.resume("auto", *small, config=cfg) is None
    checkpointer.close()
    assert torch.isfinite(next(small[0].parameters())).all()
