"""The file system and the ranks fail: a clear error or a clean fall-back within a bounded time, never a silent loss."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_run import build_stand_in, config
from ranks import CONTEXT

from joint_train.checkpoint import Checkpointer, CheckpointError, layout, state
from joint_train.checkpoint import checkpointer as checkpointer_module

BOUND = 90  # seconds for a whole scenario on a busy machine; the time-outs under test are far shorter


def outcomes(function, folder, *args, ranks=2) -> list[tuple[int, str]]:
    """(exit code, what the function returned) of each rank; a rank may die, none may hang."""
    scratch = Path(tempfile.mkdtemp())
    processes = [
        CONTEXT.Process(target=run_rank, args=(function, rank, ranks, scratch, folder, *args)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + BOUND
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    hang = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hang, f"ranks {hang} hang"
    files = [scratch / f"result{rank}" for rank in range(ranks)]
    results = [(p.exitcode, f.read_text() if f.exists() else "") for p, f in zip(processes, files, strict=True)]
    shutil.rmtree(scratch)
    return results


def run_rank(function, rank, ranks, scratch, *args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=ranks)
    (scratch / f"result{rank}").write_text(str(function(rank, *args)))
    os._exit(0)


def save_twice(rank, folder, background, before_second=None, timeout=30):
    """Save step 1, which works, then step 2; returns the error of the second, in either way of saving."""
    cfg = config({"checkpoint.background": background})
    model, optimizer = build_stand_in()
    checkpointer = Checkpointer(folder, cfg.checkpoint, timeout_seconds=timeout)
    checkpointer.save(1, model, optimizer, {"step": 1}, config=cfg)
    checkpointer.wait()
    if before_second:
        before_second(rank)
    started = time.monotonic()
    try:
        checkpointer.save(2, model, optimizer, {"step": 2}, config=cfg)
        while checkpointer.saving:
            checkpointer.poll()
            time.sleep(0.01)
    except CheckpointError as error:
        return f"{error} after {time.monotonic() - started:.0f} s"
    return "saved"


def assert_only_step_1(folder):
    """A resume takes what was there before, and nothing half-written is left."""
    assert [path.name for path in layout.list_steps(folder / "checkpoints")] == ["step_00000001"]
    assert outcomes(resume, folder) == [(0, "step_00000001")] * 2
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000001"]


def resume(rank, folder):
    checkpointer = Checkpointer(folder, config().checkpoint, timeout_seconds=20)
    path = checkpointer.find_resume()
    checkpointer.close()
    return path and path.name


@contextlib.contextmanager
def mounted(folder, *arguments):
    """A file system of our own, to be filled or made read-only."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", *arguments, folder], capture_output=True).returncode:
        pytest.skip("this user can't mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_no_space(tmp_path, background):
    assert outcomes(save_twice, tmp_path / "probe", background) == [(0, "saved")] * 2
    size = layout.read_manifest(tmp_path / "probe/checkpoints/step_00000001").nbytes
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", f"size={int(1.6 * size)}", "tmpfs") as folder:
        for code, said in outcomes(save_twice, folder, background):
            assert code == 0 and "No space left on device" in said and "step_00000002" in said
        assert_only_step_1(folder)


def save_then_read_only(rank, folder):
    def make_read_only(rank):
        if rank == 0:
            checkpoints = folder / "checkpoints"
            subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", checkpoints], check=True)
        dist.barrier()

    return save_twice(rank, folder, False, make_read_only)


def open_only(rank, folder):
    try:
        Checkpointer(folder, config().checkpoint, timeout_seconds=20)
    except CheckpointError as error:
        return error


def test_a_read_only_folder(tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "tmpfs") as disk:
        try:
            for code, said in outcomes(save_then_read_only, disk):
                assert code == 0 and "Read-only file system" in said and "step_00000002" in said
        finally:
            subprocess.run(["umount", "-l", disk / "checkpoints"], check=True)
        assert_only_step_1(disk)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for folder in (disk, disk / "new"):
            for code, said in outcomes(open_only, folder):
                assert code == 0 and "can't be written" in said and "Read-only file system" in said


def break_writes_of(rank_to_break, action):
    """From now on that rank does ``action`` in the middle of writing the optimizer."""

    def arm(rank):
        if rank == rank_to_break:
            write = state._ChecksumFile.write

            def broken(self, data):
                if "optimizer" in str(self.name):
                    action()
                return write(self, data)

            state._ChecksumFile.write = broken

    return arm


def input_output_error():
    raise OSError(5, "Input/output error")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(1000)


def save_while(rank, folder, background, victim, action, timeout):
    return save_twice(rank, folder, background, break_writes_of(victim, action), timeout)


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_one_rank_cannot_write(tmp_path, background):
    for code, said in outcomes(save_while, tmp_path / "run", background, 1, input_output_error, 30):
        assert code == 0 and "rank 1: [Errno 5] Input/output error" in said and "optimizer" in said
    assert_only_step_1(tmp_path / "run")


@pytest.mark.parametrize(("background", "victim"), [(False, 1), (True, 1), (True, 0)])
def test_a_rank_dies_while_saving(tmp_path, background, victim):
    results = outcomes(save_while, tmp_path / "run", background, victim, die, 30)
    assert results[victim][0] == -signal.SIGKILL
    code, said = results[1 - victim]
    assert code == 0 and ("step_00000002" in said or "saving step 2" in said)
    assert "lost another rank" in said or "Connection" in said
    assert_only_step_1(tmp_path / "run")


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_a_rank_hangs_while_saving(tmp_path, background):
    (_, said), (code, hanging) = outcomes(save_while_hanging, tmp_path / "run", background)
    assert "step_00000002" in said or "saving step 2" in said
    assert int(said.split()[-2]) < 10
    assert_only_step_1(tmp_path / "run")


def save_while_hanging(rank, folder, background):
    if rank == 1:
        # The hanging rank is ended by its launcher once the other has failed.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(9))
        signal.alarm(9)
    return save_while(rank, folder, background, 1, hang, 3)


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: flip_bit(folder / "base/model/__1_0.distcp"), "__1_0.distcp has checksum"),
        (lambda folder: flip_bit(folder / "drafter/model/.metadata"), ".metadata has checksum"),
        (lambda folder: flip_bit(folder / "state.json"), "state.json has checksum"),
        (lambda folder: os.truncate(folder / "random.pt", 10), "random.pt has 10 bytes instead of"),
        (lambda folder: (folder / "optimizer/__1_0.distcp").unlink(), "optimizer/__1_0.distcp is missing"),
        (lambda folder: shutil.rmtree(folder / "drafter"), "drafter/config.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_on_every_rank(tmp_path, both_saved, harm, words):
    run = tmp_path / "run"
    shutil.copytree(both_saved, run)
    damaged = run / "checkpoints/step_00000002"
    harm(damaged)
    results = outcomes(resume_and_tell, run)
    for code, said in results:
        assert code == 0 and said.startswith("step_00000001")
    assert words in results[0][1] and "an older one is tried" in results[0][1]
    assert damaged.exists()


@pytest.fixture(scope="module")
def both_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "run"
    assert outcomes(save_twice, folder, False) == [(0, "saved")] * 2
    return folder


def resume_and_tell(rank, folder):
    import logging

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("joint_train").addHandler(handler)
    return f"{resume(rank, folder)} {said}"


def save_at_different_steps(rank, folder):
    cfg = config()
    model, optimizer = build_stand_in()
    checkpointer = Checkpointer(folder, cfg.checkpoint, timeout_seconds=20)
    try:
        checkpointer.save(5 + rank, model, optimizer, {"step": 5}, config=cfg)
    except CheckpointError as error:
        return error


def test_ranks_that_do_not_belong_together(tmp_path):
    for code, said in outcomes(save_at_different_steps, tmp_path / "steps"):
        assert code == 0 and "the ranks are at different steps: [5, 6]" in said
    assert list((tmp_path / "steps/checkpoints").iterdir()) == []


def save_to_a_disk_of_its_own(rank, folder):
    if rank == 1:  # this process alone sees another disk there, as the second machine of a job would
        ctypes.CDLL(None, use_errno=True).unshare(0x00020000)  # CLONE_NEWNS
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    checkpointer_module._GRACE_SECONDS = 1
    cfg = config()
    model, optimizer = build_stand_in()
    checkpointer = Checkpointer(folder, cfg.checkpoint, timeout_seconds=20)
    try:
        checkpointer.save(1, model, optimizer, {"step": 1}, config=cfg)
    except CheckpointError as error:
        return error


def test_an_output_dir_that_the_machines_do_not_share(tmp_path):
    with mounted(tmp_path / "run", "-t", "tmpfs", "tmpfs") as folder:
        for code, said in outcomes(save_to_a_disk_of_its_own, folder):
            assert code == 0 and "rank 0 doesn't see what the other ranks wrote" in said
            assert "on a file system that all machines share?" in said
        assert list((folder / "checkpoints").iterdir()) == []
