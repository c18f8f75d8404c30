"""Leftovers and files that are no checkpoints, or not any more: set aside and named, and the run goes on."""

import json
import os
import shutil

import pytest
from checkpoint_run import build_stand_in, config

from joint_train.checkpoint import Checkpointer, layout

NESTED = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    cfg, run = open_run(folder)
    model, optimizer = build_stand_in()
    for step in (1, 2):
        run.save(step, model, optimizer, {"step": step}, config=cfg)
    run.close()
    return folder


def open_run(folder, **overrides):
    cfg = config({f"checkpoint.{name}": value for name, value in overrides.items()})
    return cfg, Checkpointer(folder, cfg.checkpoint, timeout_seconds=30, lock_wait_seconds=0)


def rewrite(folder, **changes):
    """Another manifest, whose own checksum is right."""
    manifest = layout.read_manifest(folder)
    for name, value in changes.items():
        setattr(manifest, name, value)
    (folder / layout.MANIFEST).write_bytes(manifest.to_bytes())


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


def folder_instead(path):
    path.unlink()
    path.mkdir()


def file_instead(folder):
    shutil.rmtree(folder)
    folder.write_text("no folder")


def without(name):
    def harm(folder):
        files = layout.read_manifest(folder).files
        rewrite(folder, files={key: value for key, value in files.items() if key != name})

    return harm


HARM = {
    "a loop of links": lambda f: loop(f / layout.MANIFEST),
    "a folder": lambda f: folder_instead(f / layout.MANIFEST),
    "a torn manifest": lambda f: os.truncate(f / layout.MANIFEST, 100),
    "an empty manifest": lambda f: os.truncate(f / layout.MANIFEST, 0),
    "nested": lambda f: (f / layout.MANIFEST).write_text(NESTED),
    "other JSON": lambda f: (f / layout.MANIFEST).write_text("[1, 2]"),
    "bytes": lambda f: (f / layout.MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "files of another kind": lambda f: rewrite(f, files={"config.json": 3}),
    "unknown keys": lambda f: rewrite(f, files=["config.json"]),
    "a file": file_instead,
    "no manifest": lambda f: (f / layout.MANIFEST).unlink(),
    "a data file that is a loop": lambda f: loop(f / "base/model/__0_0.distcp"),
    "state.json not named": without("state.json"),
    "a description not named": without("optimizer/.metadata"),
    "a pipe": lambda f: ((f / layout.MANIFEST).unlink(), os.mkfifo(f / layout.MANIFEST)),
    "another pipe": lambda f: ((f / "state.json").unlink(), os.mkfifo(f / "state.json")),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_whatever_the_newest_has_become_the_one_before_it_is_taken(saved, tmp_path, caplog):
    for number, (name, harm) in enumerate(HARM.items()):
        run = tmp_path / str(number)
        shutil.copytree(saved, run)
        harm(run / "checkpoints/step_00000002")
        caplog.clear()
        cfg, checkpointer = open_run(run)
        model, optimizer = build_stand_in()
        path, state = checkpointer.resume("auto", model, optimizer, config=cfg)
        assert (path.name, state) == ("step_00000001", {"step": 1}), name
        assert "step_00000002" in caplog.text and "an older one is tried" in caplog.text, name
        checkpointer.save(2, model, optimizer, {"step": 2}, config=cfg)  # and its name can be used again
        checkpointer.close()
        layout.verify(run / "checkpoints/step_00000002")
        assert len(list((run / "checkpoints").glob("step_00000002.damaged-*"))) == 1, name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_without_checksums_too(saved, tmp_path):
    """What reading finds is damage where nothing was compared before."""
    for number, name in enumerate(("base/model/__0_0.distcp", "random.pt", "state.json", "optimizer/.metadata")):
        run = tmp_path / str(number)
        shutil.copytree(saved, run)
        file = run / "checkpoints/step_00000002" / name
        file.write_bytes(bytes(file.stat().st_size))
        cfg, checkpointer = open_run(run, checksums=False)
        path, _ = checkpointer.resume("auto", *build_stand_in(), config=cfg)
        assert path.name == "step_00000001", name
        checkpointer.close()


def test_bad_leftovers_are_set_aside_and_named(saved, tmp_path, caplog):
    for number, (name, harm) in enumerate(HARM.items()):
        run = tmp_path / str(number)
        shutil.copytree(saved, run)
        leftover = run / "checkpoints/step_00000006.tmp-ab12"
        shutil.copytree(saved / "checkpoints/step_00000002", leftover)
        harm(leftover)
        if name == "a data file that is a loop":
            (leftover / "base/model/__0_0.distcp").unlink()  # a file is missing
        caplog.clear()
        _, checkpointer = open_run(run)
        assert checkpointer.find_resume().name == "step_00000002", name
        checkpointer.close()
        assert "step_00000006" in caplog.text or name in ("state.json not named", "a description not named"), name
        assert not leftover.exists(), name


def test_what_cannot_be_removed_is_named_and_left(saved, tmp_path, caplog, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    (run / "checkpoints/step_00000001.trash-ab12").mkdir()

    def refused(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(layout.shutil, "rmtree", refused)
    _, checkpointer = open_run(run)
    assert checkpointer.find_resume().name == "step_00000002"
    checkpointer.close()
    assert "step_00000001.trash-ab12, left by a killed run, could not be finished or removed" in caplog.text


def test_the_lock_of_a_file_of_bytes(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    (run / "run.lock").write_bytes(b"\xff\xfe")
    _, checkpointer = open_run(run)
    assert json.loads((run / "run.lock").read_text())["pid"] == os.getpid()
    checkpointer.close()
