"""Signals: every rank stops at the same step, saves within its time, and the exit code says so."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import CONTEXT, run_ranks
from torch.utils.data import DataLoader

from joint_train.command import INTERRUPTED, OVERRUN, PARENT_ENDED, PREEMPTED, end_with_parent
from joint_train.distributed.preemption import Preemption, stand_apart


def stop_step(rank, number, signalled):
    with Preemption(60, 60) as preemption:
        for step in range(1, 20):
            if step == 3 and rank in signalled:
                os.kill(os.getpid(), number)
            if preemption.should_stop():
                return step
            time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("signalled", [[1], [0, 1, 2]], ids=["one", "all"])
def test_all_ranks_stop_at_the_step_of_the_signal(number, signalled):
    assert run_ranks(stop_step, 3, number, signalled) == [3, 3, 3]


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption(60) as preemption:
        assert signal.getsignal(signal.SIGTERM) != before
        assert not preemption.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.should_stop()
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1


def ends(function, folder, *args, signals=(), timeout=120):
    """(exit code, standard error, seconds) of a process that runs the function and is signalled once it is ready."""
    process = CONTEXT.Process(target=run_logged, args=(function, folder, *args))
    started = time.monotonic()
    process.start()
    while signals and not (folder / "ready").exists():
        assert process.is_alive() and time.monotonic() - started < timeout
        time.sleep(0.01)
    started = time.monotonic()
    for delay, number in signals:
        time.sleep(delay)
        os.kill(process.pid, number)
    process.join(timeout)
    alive = process.is_alive()
    process.kill()
    assert not alive, "it hangs"
    return process.exitcode, (folder / "stderr").read_text(), time.monotonic() - started


def run_logged(function, folder, *args):
    log = os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 2)
    function(folder, *args)


def save_and_exit(folder, grace, save_seconds, blocked, hang_at_exit):
    with Preemption(grace) as preemption:
        (folder / "ready").touch()
        while not preemption.should_stop():
            if blocked:
                time.sleep(1000)  # Python's own handlers run, but this goes on, as in a collective that hangs
        time.sleep(save_seconds)
        (folder / "saved").touch()
        if hang_at_exit:
            import atexit

            atexit.register(time.sleep, 1000)
        preemption.exit()


def test_the_exit_code_of_a_saved_run_whatever_signals_follow(tmp_path):
    signals = [(0, signal.SIGUSR1), (0.2, signal.SIGTERM), (0.1, signal.SIGTERM), (0.1, signal.SIGUSR1)]
    code, said, _ = ends(save_and_exit, tmp_path, 30, 1.0, False, False, signals=signals)
    assert code == PREEMPTED and (tmp_path / "saved").exists()
    assert said.count("signalled to stop") == 1


def test_too_slow_a_save_ends_hard_and_says_so(tmp_path):
    code, said, seconds = ends(save_and_exit, tmp_path, 1, 1000, False, False, signals=[(0, signal.SIGTERM)])
    assert code == OVERRUN and 0.9 < seconds < 60
    assert "not saved within checkpoint.grace_seconds=1 s" in said


def test_the_countdown_runs_while_the_main_thread_is_stuck(tmp_path):
    code, said, _ = ends(save_and_exit, tmp_path, 1, 0, True, False, signals=[(0, signal.SIGTERM)])
    assert code == OVERRUN and "not saved" in said


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    signals = [(0, signal.SIGINT), (0.5, signal.SIGINT)]
    code, said, _ = ends(save_and_exit, tmp_path, 60, 1000, False, False, signals=signals)
    assert code == INTERRUPTED and not (tmp_path / "saved").exists()
    assert "Ctrl-C again ends at once" in said and "interrupted again" in said


def test_a_first_ctrl_c_after_another_signal_does_not_end_the_save(tmp_path):
    signals = [(0, signal.SIGTERM), (0.2, signal.SIGHUP), (0.2, signal.SIGINT)]
    code, said, _ = ends(save_and_exit, tmp_path, 60, 1.5, False, False, signals=signals)
    assert code == PREEMPTED and (tmp_path / "saved").exists(), said


@pytest.mark.parametrize("first", [signal.SIGINT, PARENT_ENDED])
def test_the_kernels_repeated_word_of_a_parents_end_does_not_end_the_save(tmp_path, first):
    """A dying torchrun hands its ranks on from thread to thread, and each time they are signalled."""
    signals = [(0, first), (0.2, PARENT_ENDED), (0.2, PARENT_ENDED)]
    code, said, _ = ends(save_and_exit, tmp_path, 60, 1.5, False, False, signals=signals)
    assert code == PREEMPTED and (tmp_path / "saved").exists(), said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_the_shell_ignores_stays_ignored(number):
    """``nohup``, and a job that a script started in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Preemption(60) as preemption:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN and not preemption.should_stop()
    finally:
        signal.signal(number, before)


def test_a_hang_after_the_save_is_no_failure(tmp_path):
    code, said, _ = ends(save_and_exit, tmp_path, 2, 0, False, True, signals=[(0, signal.SIGTERM)])
    assert code == PREEMPTED and "not saved" not in said


def idle(folder):
    (folder / "ready").touch()
    time.sleep(1000)


def test_a_forked_child_dies_of_its_signal_and_its_parent_does_not_notice(tmp_path):
    import multiprocessing

    with Preemption(60) as preemption:
        child = multiprocessing.get_context("fork").Process(target=idle, args=(tmp_path,))
        child.start()
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        child.terminate()
        child.join(10)
        assert child.exitcode == -signal.SIGTERM
        time.sleep(0.2)
        assert not preemption.should_stop()


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(0.05)
        return index


def load_data(folder):
    os.setpgid(0, 0)
    with Preemption(60) as preemption:
        seen = []
        loader = DataLoader(
            Slow(), batch_size=None, num_workers=2, worker_init_fn=stand_apart, multiprocessing_context="fork"
        )
        for item in loader:
            seen.append(int(item))
            if len(seen) == 3:
                os.killpg(0, signal.SIGTERM)  # as torchrun does
        assert seen == list(range(8)) and preemption.should_stop()
        preemption.exit()


def test_loader_processes_outlive_a_signal_to_the_group(tmp_path):
    code, said, _ = ends(load_data, tmp_path)
    assert code == PREEMPTED, said


def leave_with_busy_workers(folder, workers):
    from joint_train.__main__ import leave

    with pytest.raises(SystemExit) as end, Preemption(60) as preemption:
        context = "fork" if workers else None
        loader = DataLoader(Slow(), batch_size=None, num_workers=workers, multiprocessing_context=context)
        batches = iter(loader)
        next(batches)
        os.kill(os.getpid(), signal.SIGTERM)
        while not preemption.should_stop():
            pass
        preemption.exit()
    os.kill(os.getpid(), signal.SIGTERM)  # torchrun has seen another rank end
    leave(end.value.code)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_exit_code_is_true_with_any_number_of_loader_workers(tmp_path, workers):
    for _ in range(3):
        code, said, _ = ends(leave_with_busy_workers, tmp_path, workers)
        assert code == PREEMPTED and "Traceback" not in said, said


def signalled_while_forking(folder):
    os.setpgid(0, 0)
    done = threading.Event()

    def signals():
        while not done.is_set():
            os.killpg(0, signal.SIGTERM)  # as torchrun does

    with Preemption(60):
        threading.Thread(target=signals).start()
        statuses = []
        for _ in range(100):
            if not (pid := os.fork()):
                time.sleep(0.001)
                os._exit(0)
            statuses.append(os.waitpid(pid, 0)[1])
        done.set()
        os._exit(len([status for status in statuses if status]))


def test_a_signal_to_the_group_does_not_kill_a_loader_process_that_is_just_being_forked(tmp_path):
    code, said, _ = ends(signalled_while_forking, tmp_path, timeout=60)
    assert code == 0, said


class Endless(torch.utils.data.Dataset):
    """A batch that takes for ever: its worker doesn't look whether the rank is still there."""

    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return 8

    def __getitem__(self, index):
        (self.folder / f"worker-{os.getpid()}").touch()
        time.sleep(1000)


def busy_workers(folder, hooked):
    """With the hook that a run has, or only with the function that the loader is given."""
    with Preemption(60) if hooked else contextlib.nullcontext():
        init = None if hooked else stand_apart
        loader = DataLoader(
            Endless(folder), batch_size=None, num_workers=2, worker_init_fn=init, multiprocessing_context="fork"
        )
        next(iter(loader))


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def soon(condition, seconds: float = 60) -> bool:
    """Whether it comes true; a machine may be busy, so only what never comes fails."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("hooked", [True, False])
def test_loader_processes_end_with_their_rank_however_it_ends(tmp_path, hooked):
    rank = CONTEXT.Process(target=busy_workers, args=(tmp_path, hooked))
    rank.start()
    assert soon(lambda: len(list(tmp_path.glob("worker-*"))) == 2)
    workers = [int(file.name.partition("-")[2]) for file in tmp_path.glob("worker-*")]
    try:
        assert not any(map(gone, workers))
        rank.kill()
        assert soon(lambda: all(map(gone, workers)), 20)
    finally:
        for worker in workers:
            if not gone(worker):
                os.kill(worker, signal.SIGKILL)


def orphan(folder, before: bool):
    """A process whose parent ends before or after it asks to end with it."""
    ours, theirs = os.pipe()
    parent = os.getpid()
    if not (pid := os.fork()):
        if before:
            os.read(ours, 1)
            while os.getppid() == parent:
                time.sleep(0.01)
        end_with_parent(parent=parent)
        if not before:
            (folder / "asked").touch()
        time.sleep(1000)
    (folder / "pid").write_text(str(pid))
    while not before and not (folder / "asked").exists():
        time.sleep(0.01)
    os.write(theirs, b".")
    os._exit(0)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("before", [True, False])
def test_a_parent_that_is_gone_already_counts_as_well(tmp_path, before):
    code, _, _ = ends(orphan, tmp_path, before)
    assert code == 0 and soon(lambda: gone(int((tmp_path / "pid").read_text())), 20)


WORKER = """
import os, signal, sys, time
import torch.distributed as dist
from joint_train.distributed.preemption import Preemption
dist.init_process_group("gloo")
with Preemption(20, 20) as preemption:
    open(f"{sys.argv[1]}/pid{dist.get_rank()}", "w").write(str(os.getpid()))
    while not preemption.should_stop():
        time.sleep(0.05)
    time.sleep(0.5)
    dist.barrier()
    open(f"{sys.argv[1]}/saved{dist.get_rank()}", "w").close()
    preemption.exit()
"""


@pytest.mark.parametrize("target", ["torchrun", "worker"])
def test_under_torchrun(tmp_path, target):
    """What the module's documentation promises to launchers, with the real thing."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "PET_SHUTDOWN_TIMEOUT": "25"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*command, str(script), str(tmp_path)], stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + 90
        while len(list(tmp_path.glob("pid*"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        time.sleep(0.3)
        victim = process.pid if target == "torchrun" else int((tmp_path / "pid1").read_text())
        os.kill(victim, signal.SIGUSR1)
        assert process.wait(60) == 1
    finally:
        process.kill()
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
    log = (tmp_path / "log").read_text()
    assert ("SignalException" if target == "torchrun" else f"exitcode  : {PREEMPTED}") in log


def test_without_ranks_there_is_nothing_to_agree_on():
    assert not dist.is_initialized()
    with Preemption(60) as preemption:
        assert not preemption.should_stop()
