"""A mirror is one run's: another run is refused by name, and two processes of one run don't overwrite each other."""

import json
import shutil

import pytest
from checkpoint_run import TIMEOUT, build_stand_in, config

from joint_train.checkpoint import Checkpointer, CheckpointError, layout
from joint_train.checkpoint.store import Store, without_secrets
from joint_train.config import ConfigError, validate


@pytest.fixture(scope="module")
def pair():
    return build_stand_in()


def open_run(folder, mirror, **overrides):
    overrides = {f"checkpoint.{name}": value for name, value in overrides.items()}
    cfg = config({"checkpoint.mirror": str(mirror), **overrides})
    return Checkpointer(folder, cfg.checkpoint, timeout_seconds=TIMEOUT, lock_wait_seconds=0)


def save(run, pair, *steps):
    for step in steps:
        run.save(step, *pair, {"step": step}, config=config())
        run._mirror.finish(TIMEOUT)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_another_run_is_refused_by_name(tmp_path, pair):
    first = open_run(tmp_path / "a", tmp_path / "mirror")
    save(first, pair, 1)
    with pytest.raises(CheckpointError, match=f"the mirror of another run: output_dir {tmp_path}/a on .*process"):
        open_run(tmp_path / "b", tmp_path / "mirror")  # which has nothing: it would have gone on from a's weights
    first.close()
    second = open_run(tmp_path / "c", tmp_path / "other")
    save(second, pair, 2)
    second.close()
    with pytest.raises(CheckpointError, match="the mirror of another run"):
        open_run(tmp_path / "c", tmp_path / "mirror")
    assert Store(str(tmp_path / "mirror")).steps() == [1]
    again = open_run(tmp_path / "a", tmp_path / "mirror")
    assert layout.step_of(again.find_resume()) == 1
    again.close()
    shutil.copytree(tmp_path / "a", tmp_path / "copied")  # its id, too
    with pytest.raises(
        CheckpointError, match=f"the mirror of the run in {tmp_path}/a, of which {tmp_path}/copied is a"
    ):
        open_run(tmp_path / "copied", tmp_path / "mirror")
    (tmp_path / "link").symlink_to("a")
    open_run(tmp_path / "link", tmp_path / "mirror").close()
    open_run(tmp_path / "a", tmp_path / "mirror").close()
    (tmp_path / "a").rename(tmp_path / "moved")  # the run is known by its id, wherever its folder is
    moved = open_run(tmp_path / "moved", tmp_path / "mirror")
    assert layout.step_of(moved.find_resume()) == 1
    moved.close()
    (tmp_path / "mirror/mirror.json").unlink()  # as the refusal says
    by_hand = open_run(tmp_path / "elsewhere", tmp_path / "mirror")
    assert layout.step_of(by_hand.find_resume()) == 1
    by_hand.close()


def test_a_mirror_of_before_there_were_ids_is_taken(tmp_path, pair):
    run = open_run(tmp_path / "run", tmp_path / "mirror")
    save(run, pair, 1)
    run.close()
    for text in ('{"host": "h", "pid": 1, "since": "then"}', "[" * 5000, ""):
        (tmp_path / "mirror/mirror.json").write_text(text)
        shutil.rmtree(tmp_path / "run")
        run = open_run(tmp_path / "run", tmp_path / "mirror")
        assert layout.step_of(run.find_resume()) == 1
        run.close()
        assert "run" in json.loads((tmp_path / "mirror/mirror.json").read_text())


def test_a_process_whose_mirror_was_taken_over_uploads_nothing_more(tmp_path, pair, caplog):
    """The same run on two machines: the first is cut off and lives on, the second goes on from the mirror."""
    first = open_run(tmp_path / "run", tmp_path / "mirror")
    save(first, pair, 1)
    first._lock.release()
    (tmp_path / "run").rename(tmp_path / "cut_off")
    first.folder = tmp_path / "cut_off/checkpoints"
    second = open_run(tmp_path / "run", tmp_path / "mirror")
    assert layout.step_of(second.find_resume()) == 1
    save(second, pair, 2)
    save(first, pair, 3)
    assert "was taken over by output_dir" in caplog.text and "nothing more is uploaded from here" in caplog.text
    assert Store(str(tmp_path / "mirror")).steps() == [2, 1]
    second.close()
    first.close()


def test_a_damaged_local_copy_is_replaced_from_the_mirror(tmp_path, pair, caplog):
    run = open_run(tmp_path / "run", tmp_path / "mirror", keep_last=1)
    save(run, pair, 1)
    run.close()
    folder = tmp_path / "run/checkpoints/step_00000001"
    good = (folder / "state.json").read_bytes()
    flip(folder / "base/model/__0_0.distcp")
    run = open_run(tmp_path / "run", tmp_path / "mirror", keep_last=1)
    assert run.find_resume() == folder
    layout.verify(folder)
    assert (folder / "state.json").read_bytes() == good
    assert "__0_0.distcp has checksum" in caplog.text and "The copy in checkpoint.mirror is tried" in caplog.text
    assert "set aside as step_00000001.damaged-" in caplog.text
    flip(folder / "random.pt")
    assert run.find_resume(str(folder)) == folder  # also where it is named
    layout.verify(folder)
    run.close()


def test_the_mirrors_older_one_is_taken_where_both_copies_of_the_newest_are_damaged(tmp_path, pair):
    run = open_run(tmp_path / "run", tmp_path / "mirror", keep_last=2)
    save(run, pair, 1, 2)
    run.close()
    for copy in ("run", "mirror"):
        flip(tmp_path / copy / "checkpoints/step_00000002/optimizer/__0_0.distcp")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000001")
    run = open_run(tmp_path / "run", tmp_path / "mirror", keep_last=2)
    assert layout.step_of(run.find_resume()) == 1
    run.close()


def test_records_of_the_run_are_mirrored_and_come_back_on_an_empty_disk(tmp_path, pair):
    run = open_run(tmp_path / "run", tmp_path / "mirror")
    (tmp_path / "run/config.yaml").write_text("seed: 1\n")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    save(run, pair, 1)
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 2}\n')
    save(run, pair, 2)
    run.close()
    shutil.rmtree(tmp_path / "run")
    run = open_run(tmp_path / "run", tmp_path / "mirror")
    assert (tmp_path / "run/config.yaml").read_text() == "seed: 1\n"
    assert (tmp_path / "run/metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    run.close()


def test_a_mirror_in_the_run_itself_is_refused(tmp_path):
    for mirror in (f"{tmp_path}/run", f"file://{tmp_path}/run/", f"{tmp_path}/run/copy"):
        overrides = {"checkpoint.mirror": mirror, "output_dir": f"{tmp_path}/run"}
        with pytest.raises(ConfigError, match="checkpoint.mirror=.* lies in output_dir"):
            validate(config({"data.train": [{"path": "x.jsonl"}], **overrides}), 1)


def test_storage_that_refuses_the_connection_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="checkpoint.mirror: ftp://….*can't be opened: ConnectionRefusedError"):
        open_run(tmp_path / "run", "ftp://me:secret@127.0.0.1:9/run")


def test_urls_are_logged_without_their_secrets():
    assert without_secrets("sftp://me:pass@host/run@2") == "sftp://…@host/run@2"
    assert without_secrets("s3://bucket/run@2") == "s3://bucket/run@2"
