"""Checkpoints and exports in object storage: complete and verified, or not there; and a run that goes on from there."""

import dataclasses
import logging
import re
import socket
import sys
import threading
import time
import zlib

import fsspec
import numpy as np
import pytest
from checkpoint_run import TIMEOUT, build_stand_in, config, train
from ranks import run_ranks

from joint_train import progress
from joint_train.checkpoint import Checkpointer, CheckpointError, layout, search, store
from joint_train.checkpoint.layout import DamagedCheckpoint
from joint_train.checkpoint.store import Store
from joint_train.config import ConfigError, validate

NAMES = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")


@pytest.fixture(scope="module")
def server():
    """A real S3 server on loopback; everything finds it by the environment, as a user's run would."""
    pytest.importorskip("moto")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    url = "http://{}:{}".format(*running.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(NAMES, (url, "key", "secret", "us-east-1"), strict=True):
            patch.setenv(name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield url
    running.stop()


@pytest.fixture(params=["s3", "file", "memory"])
def url(request, server, tmp_path):
    return {
        "s3": f"s3://bucket/{tmp_path.name}",
        "file": f"file://{tmp_path}/mirror",
        "memory": f"memory://{tmp_path.name}",
    }[request.param]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(store, "PAUSE_SECONDS", 0.01)


def open_run(folder, **overrides):
    return Checkpointer(
        folder,
        config({f"checkpoint.{name}": value for name, value in overrides.items()}).checkpoint,
        timeout_seconds=TIMEOUT,
        lock_wait_seconds=0,
    )


def save(run, model, optimizer, *steps):
    for step in steps:
        run.save(step, model, optimizer, {"step": step}, config=config(), metrics={"loss": float(step)})


@pytest.fixture(scope="module")
def pair():
    return build_stand_in()


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def objects(url):
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {name[len(root) + 1 :]: fs.cat_file(name) for name in fs.find(root)}


def uploaded(run):
    """Wait until nothing is left to upload."""
    run._mirror.finish(TIMEOUT)


def test_a_mirror_is_the_run_and_a_fresh_machine_goes_on_from_it(tmp_path, url, pair, monkeypatch, caplog):
    run = open_run(tmp_path / "run", mirror=url, keep_last=2, keep_every=10)
    assert run.find_resume() is None
    for step in (10, 20, 21, 22, 23):
        save(run, *pair, step)
        uploaded(run)
    export = tmp_path / "run" / "export"
    (export / "base").mkdir(parents=True)
    (export / "base" / "model.safetensors").write_bytes(b"weights")
    run.upload(export)
    uploaded(run)
    assert "export/base/model.safetensors" in objects(url)
    (export / "base" / "model.safetensors").rename(export / "base" / "model-00001-of-00001.safetensors")
    run.upload(export)  # anew: what only the old one had goes
    run.close()
    there, here = objects(url), contents(tmp_path / "run")
    assert {name for name in there if name.startswith("checkpoints/")} == {n for n in here if n.startswith("checkp")}
    assert {name.split("/")[1] for name in there if name.startswith("checkpoints/")} == {
        layout.folder_name(step) for step in (10, 20, 22, 23)
    }
    assert all(there[name] == data for name, data in here.items() if name.startswith(("checkpoints/", "export/")))
    assert {name for name in there if name.startswith("export/")} == {
        "export/COMPLETE", "export/base/model-00001-of-00001.safetensors"
    }  # fmt: skip
    assert f"{zlib.crc32(b'weights'):08x}".encode() in there["export/COMPLETE"]
    assert b"host" in there["mirror.json"]

    lose_disk(tmp_path / "run", tmp_path / "old")
    fresh = open_run(tmp_path / "run", mirror=url, keep_last=2, keep_every=10)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    with caplog.at_level("INFO"):
        path = fresh.find_resume("auto")
    assert re.search(r"fetching \S+, step 23: 0.0 of 0.0 GB, 0 s", caplog.text)
    assert path == tmp_path / "run" / "checkpoints" / layout.folder_name(23)
    assert contents(path) == contents(tmp_path / "old" / "checkpoints" / path.name)
    attempt, requests = Store._try, []
    monkeypatch.setattr(Store, "_try", lambda *given: (requests.append(given[1]), attempt(*given))[1])
    layout.write_metrics(path, {"val/base_loss": 1.0})  # weights that are there already aren't sent again
    fresh.upload(path)
    uploaded(fresh)
    assert not [request for request in requests if request.startswith("uploading checkpoints")]
    assert layout.parse_manifest(objects(url)[f"checkpoints/{path.name}/COMPLETE"], "x").metrics == {"val/base_loss": 1}
    save(fresh, *pair, 24)
    fresh.close()
    kept = {name.split("/")[1] for name in objects(url) if name.startswith("checkpoints/")}
    assert kept == {layout.folder_name(step) for step in (10, 20, 23, 24)}  # also what was never fetched

    other = open_run(tmp_path / "other")
    by_url = other.find_resume(f"{url}/checkpoints/{layout.folder_name(20)}")
    assert by_url == tmp_path / "other" / "fetched" / layout.folder_name(20)
    assert other.find_resume(url).name == layout.folder_name(24)
    with pytest.raises(CheckpointError, match="no complete checkpoint is there"):
        other.find_resume(f"{url}/export")
    save(other, *pair, 1)
    assert other.find_resume(url) == tmp_path / "other" / "checkpoints" / layout.folder_name(1)
    other.close()
    lose_disk(tmp_path / "run", tmp_path / "old2")
    never = open_run(tmp_path / "run", mirror=url)
    with pytest.raises(CheckpointError, match="resume=never, but .* has checkpoints .step 24."):
        never.find_resume("never")
    never.close()


def lose_disk(run, aside):
    """The run's machine is replaced by one with an empty disk."""
    run.rename(aside)


class Killed(BaseException):
    """Ends an upload where a killed process would: nothing cleans up after it."""


def test_a_killed_upload_is_no_checkpoint(tmp_path, server, pair, monkeypatch):
    url = f"s3://bucket/{tmp_path.name}"
    run = open_run(tmp_path / "run", keep_last=0)
    save(run, *pair, 1, 2)
    run.close()
    first, second = (tmp_path / "run" / "checkpoints" / layout.folder_name(step) for step in (1, 2))
    mirror = Store(url)

    def upload(folder):
        manifest = layout.read_manifest(folder)
        mirror.upload(folder, f"checkpoints/{folder.name}", manifest.files, (folder / layout.MANIFEST).read_bytes())

    upload(first)
    put, sent = mirror._fs.put_file, []

    def dying(source, target):
        if len(sent) == len(layout.read_manifest(second).files) - 1:
            raise Killed
        sent.append(target)
        put(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(mirror._fs, "put_file", dying)
        with pytest.raises(Killed):
            upload(second)
        assert sent and mirror.steps() == [1]
        # The same where a complete one was being replaced: it is none from the first byte on.
        manifest = layout.read_manifest(first)
        name = min(manifest.files)
        other = {name: [*layout.write_file(first / name, (first / name).read_bytes() + b" ")]}
        manifest = dataclasses.replace(manifest, files=manifest.files | other)
        layout.write_file(first / layout.MANIFEST, manifest.to_bytes())
        sent.clear()
        with pytest.raises(Killed):
            upload(first)
        assert mirror.steps() == []
    upload(first)
    lose_disk(tmp_path / "run", tmp_path / "old")
    fresh = open_run(tmp_path / "run", mirror=url)
    assert layout.step_of(fresh.find_resume("auto")) == 1
    save(fresh, *pair, 3)
    fresh.close()
    assert mirror.steps() == [3, 1]
    assert not [name for name in objects(url) if layout.folder_name(2) in name]  # what was left of it is gone


def test_a_corrupted_object_is_found_and_an_older_checkpoint_taken(tmp_path, server, pair, quick, caplog):
    url = f"s3://bucket/{tmp_path.name}"
    run = open_run(tmp_path / "run", mirror=url)
    save(run, *pair, 1)
    uploaded(run)
    save(run, *pair, 2)
    run.close()
    fs = fsspec.filesystem("s3")
    victim = next(name for name in fs.find(f"bucket/{tmp_path.name}/checkpoints/{layout.folder_name(2)}/base/model"))
    data = bytearray(fs.cat_file(victim))
    data[len(data) // 2] ^= 1
    fs.pipe_file(victim, bytes(data))  # the same size: only its checksum tells
    with pytest.raises(DamagedCheckpoint, match="base/model/.* has checksum"):
        Store(url).fetch(2, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["run"]
    lose_disk(tmp_path / "run", tmp_path / "old")
    fresh = open_run(tmp_path / "run", mirror=url)
    assert layout.step_of(fresh.find_resume("auto")) == 1
    assert "has checksum" in caplog.text and "an older one is tried" in caplog.text
    fresh.close()
    fs.rm_file(next(name for name in fs.find(f"bucket/{tmp_path.name}/checkpoints/{layout.folder_name(1)}/optimizer")))
    lose_disk(tmp_path / "run", tmp_path / "old2")
    none = open_run(tmp_path / "run", mirror=url)
    with pytest.raises(CheckpointError, match="none of the checkpoints in .*checkpoint.mirror is usable.*optimizer/"):
        none.find_resume("auto")
    none.close()


def test_a_damaged_local_checkpoint_is_not_uploaded(tmp_path, pair, quick):
    url = f"memory://{tmp_path.name}"
    run = open_run(tmp_path / "run")
    save(run, *pair, 1)
    run.close()
    folder = tmp_path / "run" / "checkpoints" / layout.folder_name(1)
    state = folder / "state.json"
    state.write_bytes(state.read_bytes().replace(b"1", b"2"))
    with pytest.raises(DamagedCheckpoint, match="state.json has checksum"):
        Store(url).upload(folder, "checkpoints/x", layout.read_manifest(folder).files, b"marker")
    assert "checkpoints/x/COMPLETE" not in objects(url)


def test_training_goes_on_without_the_server_and_says_so_once(tmp_path, pair, server, quick, monkeypatch, caplog):
    with socket.socket() as closed:  # a port that nobody answers
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        fsspec.filesystem("s3").clear_instance_cache()
        url = f"s3://bucket/{tmp_path.name}"
        with pytest.raises(CheckpointError, match="mirror.json .*checkpoint.mirror=null"):
            open_run(tmp_path / "run", mirror=url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    fsspec.filesystem("s3").clear_instance_cache()
    caplog.set_level(logging.INFO, "joint_train")
    run = open_run(tmp_path / "run", mirror=url)
    put = type(run._mirror.store._fs).put_file
    monkeypatch.setattr(run._mirror.store._fs, "put_file", lambda *a: (_ for _ in ()).throw(ConnectionError("down")))
    for step in (1, 2):
        save(run, *pair, step)
        deadline = time.monotonic() + TIMEOUT
        while layout.folder_name(step) not in {f.name for f in run._mirror._failed} and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caplog.text.count("Training goes on") == 1
    run._mirror.finish(TIMEOUT)
    assert "0 folders are complete" in caplog.text and "2 of this run are missing there" in caplog.text
    assert "down" in caplog.text
    monkeypatch.setattr(run._mirror.store._fs, "put_file", put.__get__(run._mirror.store._fs))
    save(run, *pair, 3)
    run.close()  # it is back: also what failed before is uploaded
    assert "3 folders are complete" in caplog.text and "none is missing" in caplog.text
    assert Store(url).steps() == [3, 2, 1]


def test_rotation_spares_what_is_uploaded_and_the_end_waits_a_bounded_time(tmp_path, pair, monkeypatch, caplog):
    url = f"memory://{tmp_path.name}"
    run = open_run(tmp_path / "run", mirror=url, keep_last=1)
    fs = run._mirror.store._fs
    put, hold, started = fs.put_file, threading.Event(), threading.Event()

    def slow(source, target):
        started.set()
        hold.wait(TIMEOUT)
        put(source, target)

    monkeypatch.setattr(fs, "put_file", slow)
    save(run, *pair, 1)
    assert started.wait(TIMEOUT)
    save(run, *pair, 2, 3)
    folder = tmp_path / "run" / "checkpoints"
    assert [f.name for f in layout.list_steps(folder)] == [layout.folder_name(3), layout.folder_name(1)]
    begun = time.monotonic()
    run._mirror.finish(0.2)
    assert time.monotonic() - begun < TIMEOUT / 2
    assert "step_00000001: not finished within 0 s" in caplog.text and "step_00000003: not begun" in caplog.text
    hold.set()
    run.close()
    assert [f.name for f in layout.list_steps(folder)] == [layout.folder_name(3)]
    assert Store(url).steps() == [3]


def on_two_machines(rank, folder, url):
    """The uninterrupted run, one that ends early, and one on a machine that has nothing but the mirror."""
    settings = {"checkpoint.mirror": url, "checkpoint.background": True}
    whole = train(rank, folder / "whole", {}, 4)
    train(rank, folder / "run", settings, 2)
    if rank == 0:
        lose_disk(folder / "run", folder / "old")
    return whole, train(rank, folder / "run", settings, 4)


def test_a_resume_on_a_fresh_machine_is_the_uninterrupted_run(tmp_path, server):
    url = f"s3://bucket/{tmp_path.name}"
    for (losses, everything), (losses_after, everything_after) in run_ranks(on_two_machines, 2, tmp_path, url):
        assert losses_after == {step: loss for step, loss in losses.items() if step > 2}
        assert everything.keys() == everything_after.keys()
        for name, value in everything.items():
            assert np.array_equal(value, everything_after[name]), name
    assert Store(url).steps() == [4, 2]


def slow_fetch(rank, folder):
    """What a rank says whose rank 0 fetches for longer than it may."""
    search.fetch_url = lambda *args: time.sleep(3)
    run = Checkpointer(folder / "run", config().checkpoint, timeout_seconds=1)
    try:
        run.find_resume(f"file://{folder}/mirror")
    except CheckpointError as error:
        return str(error)
    finally:
        run.close(0)


def test_the_other_ranks_wait_a_bounded_time_for_a_fetch(tmp_path):
    said = run_ranks(slow_fetch, 2, tmp_path)[1]
    assert "fetching a checkpoint (parallel.timeout_seconds bounds" in said and "waited 1 s" in said


def test_storage_whose_package_is_missing_is_refused_before_the_run(monkeypatch):
    def refused(**overrides):
        with pytest.raises(ConfigError) as error:
            validate(config({"data.train": [{"path": "x.jsonl"}], **overrides}), 1)
        return str(error.value)

    assert "no protocol s4" in refused(**{"checkpoint.mirror": "s4://bucket/run"})
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it weren't installed
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    assert "pip install 'joint-train[mirror]'" in refused(**{"checkpoint.mirror": "s3://bucket/run"})
    assert "resume=s3://" in refused(resume="s3://bucket/run")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert refused(**{"checkpoint.mirror": "gs://bucket/run"}).endswith("pip install gcsfs")
    for url in (None, "file:///mnt/run", "/mnt/run", "memory://run"):
        validate(config({"data.train": [{"path": "x.jsonl"}], "checkpoint.mirror": url}), 1)
