"""A checkpoint on disk: what counts as one, what is kept, what a killed run leaves, one live run a folder."""

import json
import math
import multiprocessing
import os
import signal
import time
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joint_train.checkpoint import __main__ as cli
from joint_train.checkpoint import layout, lock
from joint_train.checkpoint.lock import RunLock


def make(checkpoints, step, metrics=None, name=None):
    """A complete checkpoint with small made-up files."""
    folder = checkpoints / (name or layout.folder_name(step))
    files = {}
    for part in layout.PARTS:
        (folder / part).mkdir(parents=True)
        files[f"{part}/data"] = layout.write_file(folder / part / "data", os.urandom(200))
    config = json.dumps({"checkpoint": {"keep_last": 2, "keep_every": 0, "keep_best": None}}).encode()
    files["config.json"] = layout.write_file(folder / "config.json", config)
    manifest = layout.Manifest(
        step,
        2,
        "hash",
        "2026-01-01T00:00:00+00:00",
        {"torch": "2"},
        metrics or {},
        {k: list(v) for k, v in files.items()},
    )
    layout.write_file(folder / layout.MANIFEST, manifest.to_bytes())
    return folder


def steps(checkpoints):
    return sorted(layout.step_of(folder) for folder in layout.list_steps(checkpoints))


def test_a_manifest_survives_the_disk(tmp_path):
    folder = make(tmp_path, 7, {"loss": 1.5})
    manifest = layout.verify(folder)
    assert (manifest.step, manifest.world_size, manifest.metrics) == (7, 2, {"loss": 1.5})
    assert manifest.nbytes == sum((folder / name).stat().st_size for name in manifest.files)
    size, checksum = manifest.files["optimizer/data"]
    assert (size, int(checksum, 16)) == (200, zlib.crc32((folder / "optimizer/data").read_bytes()))


def test_every_flipped_bit_is_found(tmp_path):
    folder = make(tmp_path, 7)
    flipped = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        good = path.read_bytes()
        for position in range(0, len(good), 5):
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            path.write_bytes(bad)
            with pytest.raises((layout.DamagedCheckpoint, layout.NewerLayout)):
                layout.verify(folder)
            flipped += 1
        path.write_bytes(good)
    assert flipped > 200
    layout.verify(folder)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "optimizer/data").unlink(), "optimizer/data is missing"),
        (lambda f: os.truncate(f / "base/model/data", 150), "base/model/data has 150 bytes instead of 200"),
        (lambda f: os.truncate(f / layout.MANIFEST, 100), "not a manifest"),
        (lambda f: (f / layout.MANIFEST).write_bytes(b""), "not a manifest"),
    ],
)
def test_damage_is_named_without_reading_contents(tmp_path, harm, words):
    folder = make(tmp_path, 7)
    harm(folder)
    with pytest.raises(layout.DamagedCheckpoint, match=words):
        layout.verify(folder, contents=False)


def test_no_manifest_is_incomplete_and_a_newer_layout_says_so(tmp_path):
    folder = make(tmp_path, 7)
    manifest = layout.read_manifest(folder)
    manifest.layout = layout.LAYOUT + 1
    layout.write_file(folder / layout.MANIFEST, manifest.to_bytes())
    with pytest.raises(layout.NewerLayout, match="layout 2.*reads up to 1"):
        layout.verify(folder)
    (folder / layout.MANIFEST).unlink()
    with pytest.raises(layout.IncompleteCheckpoint, match="its save never finished"):
        layout.verify(folder)


@given(
    st.dictionaries(st.integers(1, 40), st.sampled_from([None, 0.5, 1.0, 2.0, math.nan])),
    st.integers(0, 4),
    st.integers(0, 5),
    st.sampled_from([None, "loss", "-loss"]),
)
def test_retention_keeps_what_it_says(found, keep_last, keep_every, keep_best):
    checkpoints = [(step, {} if value is None else {"loss": value}) for step, value in found.items()]
    kept = layout.steps_to_keep(checkpoints, keep_last, keep_every, keep_best)
    ordered = sorted(found)
    finite = [step for step in ordered if found[step] is not None and not math.isnan(found[step])]
    for step in ordered:
        among_last = keep_last == 0 or len([s for s in ordered if s > step]) < max(1, keep_last)
        multiple = keep_every > 0 and step % keep_every == 0
        best = False
        if keep_best and step in finite:
            better = [
                s for s in finite if (found[s] < found[step]) == (keep_best == "loss") and found[s] != found[step]
            ]
            newer_equal = [s for s in finite if found[s] == found[step] and s > step]
            best = not better and not newer_equal
        assert (step in kept) == (among_last or multiple or best)


def test_damaged_and_later_checkpoints_push_no_good_one_out(tmp_path):
    for step in (1, 2, 3, 4, 5):
        make(tmp_path, step)
    (tmp_path / "step_00000004" / layout.MANIFEST).unlink()  # incomplete
    os.truncate(tmp_path / "step_00000003/optimizer/data", 1)  # damaged
    names = [folder.name for folder in layout.prunable(tmp_path, 1, 0, None, newest_step=2)]
    assert names == ["step_00000001"]  # 5 is newer than what this run knows to be good
    names = [folder.name for folder in layout.prunable(tmp_path, 2, 0, None)]
    assert names == ["step_00000001"]


def test_removal_is_one_rename(tmp_path, monkeypatch):
    folder = make(tmp_path, 1)
    monkeypatch.setattr(layout.shutil, "rmtree", lambda *a, **k: None)  # killed right after the rename
    layout.remove(folder)
    assert steps(tmp_path) == []
    layout.remove(folder)  # somebody else was faster
    monkeypatch.undo()
    assert layout.recover(tmp_path) != []
    assert list(tmp_path.iterdir()) == []


def test_recovery_finishes_a_rename_and_removes_only_rests(tmp_path):
    make(tmp_path, 1)
    make(tmp_path, 2, name="step_00000002.tmp-0a1b")  # killed between manifest and rename
    make(tmp_path, 3, name="step_00000003.tmp-0a1b")
    (tmp_path / "step_00000003.tmp-0a1b" / layout.MANIFEST).unlink()
    make(tmp_path, 4, name="step_00000004.trash-0a1b")
    make(tmp_path, 5, name="step_00000005.damaged-0a1b")
    (tmp_path / "notes").mkdir()
    notes = layout.recover(tmp_path)
    assert len(notes) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "notes", "step_00000001", "step_00000002", "step_00000005.damaged-0a1b",
    ]  # fmt: skip
    layout.verify(tmp_path / "step_00000002")


def test_recovery_between_setting_aside_and_renaming(tmp_path):
    """A damaged step 2 was there when step 2 was saved anew, and the kill came between the two renames."""
    make(tmp_path, 2, name="step_00000002.damaged-0a1b")
    make(tmp_path, 2, {"loss": 3.0}, name="step_00000002.tmp-0a1b")
    layout.recover(tmp_path)
    assert layout.verify(tmp_path / "step_00000002").metrics == {"loss": 3.0}
    assert (tmp_path / "step_00000002.damaged-0a1b").is_dir()


def test_publishing_over_an_unusable_checkpoint_sets_it_aside(tmp_path):
    old = make(tmp_path, 2)
    (old / layout.MANIFEST).unlink()
    notes = layout.publish(make(tmp_path, 2, name="step_00000002.tmp-0a1b"), old)
    assert "set aside as step_00000002.damaged-" in notes[0]
    layout.verify(old)
    assert len(list(tmp_path.iterdir())) == 2


def test_locate_says_what_a_folder_is(tmp_path):
    run = tmp_path / "run"
    newest = [make(run / "checkpoints", step) for step in (1, 2)][-1]
    for path in (run, run / "checkpoints", newest):
        assert layout.locate(path) == newest
    hugging_face = tmp_path / "hf"
    hugging_face.mkdir()
    (hugging_face / "config.json").touch()
    (hugging_face / "model-00001-of-00002.safetensors").touch()
    base_only = tmp_path / "half"
    (base_only / "base/model").mkdir(parents=True)
    for path, words in (
        (tmp_path / "nowhere", "is not a folder"),
        (hugging_face, "is a Hugging Face folder.*model.base or model.drafter"),
        (base_only, "only part of a checkpoint .base/model.*step_XXXXXXXX"),
        (newest / "drafter", "only part of a checkpoint"),
        (tmp_path, "has no COMPLETE"),
    ):
        with pytest.raises(layout.CheckpointError, match=words):
            layout.locate(path)


def hold(folder, ready, fork):
    lock = RunLock(folder, 0)
    assert lock.held
    if fork and os.fork() == 0:
        time.sleep(30)  # a loader process that outlives its rank for a while
        os._exit(0)
    ready.set()
    time.sleep(30)


@pytest.mark.parametrize("fork", [False, True], ids=["alone", "with a child"])
def test_one_live_run_and_the_lock_of_a_killed_one_is_free(tmp_path, fork):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, fork))
    process.start()
    try:
        assert ready.wait(10)
        with pytest.raises(layout.CheckpointError, match=f"another run is writing to .*pid.*{process.pid}"):
            RunLock(tmp_path, 0)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    lock = RunLock(tmp_path, 5)
    assert lock.held
    lock.release()


def unsupported(*args):
    raise OSError(layout.errno.ENOLCK, "No locks available")


def hold_without_locks(folder, host, beat_seconds, said):
    """A run on another host of a shared file system without locks, that ends without a word after a while."""
    lock.fcntl.lockf, lock.BEAT_SECONDS = unsupported, beat_seconds
    lock.socket.gethostname = lambda: host
    try:
        held = RunLock(folder, 0)
    except layout.CheckpointError as error:
        said.put((host, str(error)))
        return
    said.put((host, "held"))
    time.sleep(2)
    os._exit(0 if held.held else 1)


def test_on_a_file_system_without_locks_one_of_two_hosts_is_refused(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    hosts = [context.Process(target=hold_without_locks, args=(tmp_path, host, 0.3, said)) for host in ("one", "two")]
    for process in hosts:
        process.start()
    answers = dict(said.get(timeout=20) for _ in hosts)
    for process in hosts:
        process.join(20)
    (winner,) = (host for host, answer in answers.items() if answer == "held")
    (refused,) = (answer for answer in answers.values() if answer != "held")
    assert "another run is writing to" in refused and f'"host": "{winner}"' in refused and "run.beat" in refused

    # The winner died without giving it up, and this host's clock is a day behind.
    monkeypatch.setattr(lock.fcntl, "lockf", unsupported)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.3)
    yesterday = time.time() - 86400
    monkeypatch.setattr(time, "time", lambda: yesterday)
    mine = RunLock(tmp_path, 0)
    assert mine.held
    mine.release()
    assert not (tmp_path / "run.beat").exists()


def run_cli(capsys, *args):
    code = cli.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    for step in (100, 200, 300, 400):
        make(tmp_path / "checkpoints", step, {"val_loss": 1000 / step})
    return tmp_path


def test_ls_and_verify(run, capsys):
    code, out, _ = run_cli(capsys, "ls", run)
    assert code == 0 and out.count("complete") == 4 and "val_loss=2.5" in out
    assert run_cli(capsys, "verify", run)[0] == 0
    victim = run / "checkpoints/step_00000300/optimizer/data"
    victim.write_bytes(bytes(200))
    assert run_cli(capsys, "ls", run)[0] == 0  # sizes only
    code, out, _ = run_cli(capsys, "verify", run)
    assert code == 1 and out.count("verified") == 3 and "optimizer/data has checksum" in out
    code, out, _ = run_cli(capsys, "verify", run, "--json")
    rows = json.loads(out)
    assert code == 1 and [row["good"] for row in rows].count(True) == 3
    assert {row.get("step") for row in rows if row["good"]} == {100, 200, 400} and all(row["path"] for row in rows)
    assert run_cli(capsys, "verify", run / "checkpoints/step_00000400")[0] == 0
    assert run_cli(capsys, "verify", victim.parents[1])[0] == 1
    code, _, err = run_cli(capsys, "ls", run / "nowhere")
    assert code == 2 and "is not a folder" in err


def test_ls_shows_whole_values_in_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = ("base_loss", "drafter_loss", "drafter_ce", "base_accuracy")
    make(tmp_path / "checkpoints", 11, {f"val/{name}": 0.01234 for name in names})
    out = run_cli(capsys, "ls", tmp_path)[1]
    assert all(f"{name}=0.01234" in out for name in names) and "…" not in out


def test_prune(run, capsys):
    code, out, _ = run_cli(capsys, "prune", run, "--dry-run")  # keep_last=2 of the run's own configuration
    assert code == 0 and out.count("would remove") == 2 and len(steps(run / "checkpoints")) == 4
    assert run_cli(capsys, "prune", run, "--keep-last", 1, "--keep-best=-val_loss")[0] == 0
    assert steps(run / "checkpoints") == [100, 400]
    assert "nothing to remove" in run_cli(capsys, "prune", run, "--keep-last", 0)[1]


def test_prune_reads_what_it_keeps_and_respects_a_live_run(run, capsys):
    (run / "checkpoints/step_00000400/optimizer/data").write_bytes(bytes(200))
    code, _, err = run_cli(capsys, "prune", run)
    assert code == 2 and "step_00000400 is damaged" in err and len(steps(run / "checkpoints")) == 4
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(run, ready, False))
    process.start()
    assert ready.wait(10)
    code, _, err = run_cli(capsys, "prune", run)
    process.kill()
    process.join()
    assert code == 2 and "another run is writing" in err
