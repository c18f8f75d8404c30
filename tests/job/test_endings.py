"""How a run and the commands end, with real processes: exit codes, Ctrl-C, and who ends with whom."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from joint_train import command
from joint_train.checkpoint import layout

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "+experiment=starter", "data.max_length=32", "data.micro_batch_size=1", "optim.warmup_steps=2",
    "drafter.num_steps=1", "eval.every=0", "eval.batches=1", "eval.prompts=0", "tracking.wandb=disabled",
    "tracking.log_every=1", "checkpoint.every=100000", "max_steps=100000", "optim.schedule=constant",
]  # fmt: skip


def start(log: Path, *arguments: str) -> subprocess.Popen:
    """A command in a process group of its own, as a shell starts it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PET_SHUTDOWN_TIMEOUT": "120"}
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=file, stderr=file, env=environment, process_group=0
        )


def family(pid: int) -> set[int]:
    """A process and all that come from it, while they run."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(file.parent.name)] = int(parent)
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found & parents.keys()


def soon(condition, seconds: float = 240) -> bool:
    """Whether it comes true; a machine may be busy, so only what never comes fails."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(condition())


def steps(folder: Path) -> list[int]:
    file = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def saved(folder: Path) -> int:
    newest = layout.find_newest(folder / "checkpoints")
    layout.verify(newest)
    return layout.step_of(newest)


linux = pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_run_with_loader_processes_saves_it_and_the_code_is_true(starter_dir, tmp_path, number):
    """To the whole group, as a terminal sends Ctrl-C."""
    run, log = tmp_path / "run", tmp_path / "log"
    overrides = [*SMALL, f"pair={starter_dir}", f"output_dir={run}", "data.num_workers=4"]
    process = start(log, "joint_train", *overrides)
    try:
        assert soon(lambda: len(steps(run)) > 2 or process.poll() is not None) and process.poll() is None, (
            log.read_text()
        )
        processes = family(process.pid)
        assert len(processes) >= 5
        os.killpg(process.pid, number)
        assert process.wait(240) == command.PREEMPTED, log.read_text()
        assert soon(lambda: not any(map(family, processes)), 30)
    finally:
        process.kill()
    assert saved(run) == max(steps(run)) and "Traceback" not in log.read_text()


@linux
def test_ranks_save_and_end_when_torchrun_is_killed(starter_dir, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    overrides = [*SMALL, f"pair={starter_dir}", f"output_dir={run}", "data.num_workers=1"]
    arguments = ["--standalone", "--nproc-per-node=2", "-m", "joint_train", *overrides]
    process = start(log, "torch.distributed.run", *arguments)
    processes = set()
    try:
        assert soon(lambda: len(steps(run)) > 2 or process.poll() is not None) and process.poll() is None, (
            log.read_text()
        )
        processes = family(process.pid) - {process.pid}
        assert len(processes) >= 4  # two ranks with a loader process each
        process.kill()
        assert soon(lambda: not any(map(family, processes))), log.read_text()
    finally:
        process.kill()
        for pid in processes:
            if family(pid):
                os.kill(pid, signal.SIGKILL)
    assert saved(run) == max(steps(run)), log.read_text()


def test_a_sweep_is_refused_with_the_ways_to_do_it(tmp_path):
    log = tmp_path / "log"
    process = start(log, "joint_train", "-m", *SMALL, "pair=/nowhere", f"output_dir={tmp_path / 'run'}", "optim.lr=1,2")
    assert process.wait(240) == command.EXPLAINED_ERROR
    assert "launch.submit --multirun" in log.read_text() and "output_dir=" in log.read_text()
    assert "Traceback" not in log.read_text() and not (tmp_path / "run").exists()


def test_an_export_of_a_damaged_checkpoint_ends_with_2_and_writes_nothing(tmp_path):
    step, out, log = tmp_path / "run/checkpoints/step_00000010", tmp_path / "out", tmp_path / "log"
    (step / "base/model").mkdir(parents=True)
    weights = step / "base/model/__0_0.distcp"
    weights.write_bytes(bytes(1000))
    files = {"base/model/__0_0.distcp": list(layout.file_checksum(weights))}
    layout.write_file(step / layout.MANIFEST, layout.Manifest(10, 1, "", "", {}, files=files).to_bytes())
    layout.verify(step)
    weights.write_bytes(bytes(999) + b"\1")  # as the disk might: the size stays
    process = start(log, "joint_train.export", str(step), str(out))
    assert process.wait(240) == command.EXPLAINED_ERROR, log.read_text()
    assert "base/model/__0_0.distcp has checksum" in log.read_text() and "Traceback" not in log.read_text()
    assert not out.exists()


def test_the_documentation_has_every_code():
    table = dict(re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "docs/exit-codes.md").read_text(), re.M))
    assert {int(code): meaning for code, meaning in table.items()} == command.EXIT_CODES


def raising(error: BaseException):
    def work():
        raise error

    return work


def test_codes_of_a_command(capsys):
    assert command.start("name", lambda: None) == command.DONE
    assert command.start("name", lambda: command.NO) == command.NO
    assert command.start("name", raising(command.JointTrainError("why"))) == command.EXPLAINED_ERROR
    assert capsys.readouterr().err == "name: why\n"
    assert command.start("name", raising(KeyboardInterrupt())) == command.INTERRUPTED
    with pytest.raises(ZeroDivisionError):
        command.start("name", raising(ZeroDivisionError()))


@pytest.mark.parametrize(
    "main, arguments, code",
    [
        ("joint_train.checkpoint.__main__", ["ls", "/nowhere"], 2),
        ("joint_train.plan.__main__", ["model=gemma4_31b", "--gpus", "1"], 3),
        ("joint_train.plan.__main__", ["model=gemma4_31b", "optim.lr=fast"], 2),
        ("joint_train.export", ["/nowhere", "/nowhere/out"], 2),
        ("joint_train.evaluate.__main__", ["/nowhere", "/nowhere", "--prompts", "general"], 2),
        ("joint_train.data.__main__", ["check", "/nowhere.jsonl"], 2),
        ("joint_train.starter", ["/proc/nowhere"], 2),
        ("launch.submit", ["nodes=0"], 2),
    ],
)
def test_codes_of_the_commands(main, arguments, code, capsys):
    """1 is in the tests of what is damaged or bad, 70, 85 and 86 in those of the watchdog and of signals."""
    import importlib

    assert importlib.import_module(main).main(arguments) == code, capsys.readouterr().err
