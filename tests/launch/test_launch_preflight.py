"""The health check between two ranks on two (named) hosts, sound and with one thing wrong at a time."""

import json
import multiprocessing
import os
import resource
import socket
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from configs import compose

HOSTS = ("good", "bad")
PATIENCE = 120.0  # only what never comes is late


def break_versions(preflight):
    whole = preflight.versions
    preflight.versions = lambda: whole() | {"torch": "2.12.0"}


def break_clock(preflight):
    preflight.clock = lambda: time.time() - 60


def break_device(preflight):
    preflight.check_device = lambda *_: "a matrix product is wrong"


def break_writing(preflight):
    preflight.write_probe = lambda folder, name: "can't write to output_dir: read-only file system"


def break_folder(preflight):
    preflight.wait_for_file = lambda file, seconds: False


def break_space(preflight):
    preflight.shutil = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=2 * 10**9))


def break_files(preflight):
    preflight.resource = SimpleNamespace(
        getrlimit=lambda _: (64, 256), RLIMIT_NOFILE=resource.RLIMIT_NOFILE, RLIM_INFINITY=resource.RLIM_INFINITY
    )


def break_bandwidth(preflight):
    preflight.bandwidth = lambda group, device: {"all-gather": 30.0, "reduce-scatter": 290.0}


def break_sum(preflight):
    whole = preflight.all_reduce
    preflight.all_reduce = lambda group, value, device: whole(group, value, device) + 1


def break_network(preflight):
    preflight.all_reduce = lambda *_: time.sleep(60)


def break_program(preflight):
    preflight.check_device = lambda *_: time.sleep(60)


def break_clock_reading(preflight):
    """A rank that is too busy to look at the clock when it is asked to."""
    whole = preflight.Preflight._set_since

    def slow(self, key, seconds):
        found = whole(self, key, seconds)
        if key == "clock":
            time.sleep(1)
        return found

    preflight.Preflight._set_since = slow


def break_sum_for_good(preflight):
    def failing(group, value, device):
        raise RuntimeError("connection reset")

    preflight.all_reduce = failing


# "network" and "program" leave a thread or a process that hangs. A check is asked again after each that failed.
CASES = {
    "sound": (None, None),
    "versions": (break_versions, "rank 1 on bad: torch is 2.12.0"),
    "device": (break_device, "rank 1 on bad: a matrix product is wrong"),
    "writing": (break_writing, "rank 1 on bad: can't write to output_dir"),
    "clock": (break_clock, "rank 1 on bad: its clock is -"),
    "folder": (break_folder, "rank 1 on bad: doesn't see a file that rank 0 wrote"),
    "space": (break_space, "rank 1 on bad: 2.0 GB are free in"),
    "busy": (break_clock_reading, None),
    "reset": (break_sum_for_good, "rank 1 on bad: RuntimeError: connection reset"),
    "again": (None, None),
    "sum": (break_sum, "rank 1 on bad: all-reduce over 1 ranks gave 3 instead of 2"),
    "files": (break_files, "rank 1 on bad: 256 files may be open at most (ulimit -Hn), 2 ranks need about 520"),
    "bandwidth": (break_bandwidth, "bad: all-gather inside it reaches 30 GB/s a GPU, 300 on most hosts"),
    "network": (break_network, "rank 1 on bad: no answer on 'node' within 2 s"),
    "after a hang": (None, None),
    "program": (break_program, "rank 1 on node 1 of a[1-2]: no answer on 'device' within 2 s"),
}


def rank_main(rank: int, port: int, folder: Path) -> None:
    """Every case in one process, because importing torch takes longer than all of them."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"SLURMD_NODENAME": HOSTS[rank], "SLURM_JOB_NODELIST": "a[1-2]", "OMP_NUM_THREADS": "1"}
    import importlib

    import torch.distributed as dist

    from launch import preflight

    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=PATIENCE))
    found = {}
    for name, (break_it, _) in CASES.items():
        importlib.reload(preflight)
        preflight.ANSWER_SECONDS = 2.0 if name == "program" else PATIENCE
        preflight.COLLECTIVE_SECONDS = 2.0 if name == "network" else PATIENCE
        preflight.MAX_SKEW_SECONDS = 0.5 if name == "busy" else preflight.MAX_SKEW_SECONDS
        preflight.MEASURED = name in ("bandwidth", "sound")
        if name == "bandwidth":
            preflight.bandwidth = lambda group, device: {"all-gather": 300.0, "reduce-scatter": 290.0}
        if name == "network":  # only the rank that hangs is to be late, however busy the machine is
            gather = preflight.Preflight._gather

            def after_its_own(self, topic, seconds, gather=gather):
                self._wait(f"{topic}/0", PATIENCE)
                return gather(self, topic, seconds)

            preflight.Preflight._gather = after_its_own
        if rank == 1 and break_it:
            break_it(preflight)
        if rank == 0 and name == "program":
            store.wait(["break"])
        if rank == 1 and name == "program":
            store.set("break", "now")
            os._exit(0)
        found[name] = preflight.Preflight(store, folder / "run", 3 * 10**9, key=name).run()
    (folder / "found.json").write_text(json.dumps(found))
    os._exit(0)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("preflight")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_main, args=(rank, port, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(300)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
    assert not list((folder / "run").iterdir())  # no probe is left behind
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_the_host_at_fault_is_named(found, case):
    message = CASES[case][1]
    if message is None:
        assert found[case] == []
    else:
        assert len(found[case]) == 1 and found[case][0].startswith(message), found[case]


def test_room_for_a_checkpoint(tmp_path):
    from launch.preflight import checkpoint_bytes

    for name, size in (("base", 600), ("drafter", 40)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
    cfg = compose({"model.base": str(tmp_path / "base"), "model.drafter": str(tmp_path / "drafter")})
    assert checkpoint_bytes(cfg) == 320 * 4 * 3  # 320 parameters of two bytes: master weights and two moments
    cfg.model.base = "google/gemma-4-E2B"
    assert checkpoint_bytes(cfg) is None
