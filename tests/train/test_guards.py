"""Guards: bad steps, loss spikes, hangs, profiles."""

import gzip
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from joint_train.errors import ConfigError
from joint_train.train import guards


def test_bad_steps_count_what_is_not_finite():
    norms = [1.0, math.nan, math.inf, 2.0, -math.inf, 0.0]
    bad = guards.BadSteps(3, "cpu")
    for norm in norms:
        bad.observe(torch.tensor(norm))
    assert bad.read() == {"bad_steps": sum(not math.isfinite(norm) for norm in norms)}
    assert not bad.exhausted()


@pytest.mark.parametrize(("pattern", "stops"), [("bbb", True), ("bbgbb", False), ("gbbbg", True), ("bgbgbg", False)])
def test_the_limit_is_on_steps_in_a_row_and_is_not_forgotten_between_reads(pattern, stops):
    bad = guards.BadSteps(3, "cpu")
    for step in pattern:
        bad.observe(torch.tensor(math.nan if step == "b" else 1.0))
    assert bad.exhausted() == stops


def test_a_dump_names_the_bad_parameter_first_and_keeps_the_batches(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    batches = [{"input_ids": torch.arange(6).reshape(2, 3)}, {"input_ids": torch.ones(2, 3)}]
    model(torch.full((1, 3), 1.0)).sum().backward()
    model[1].weight.grad[0, 2] = math.nan
    folder = guards.dump(tmp_path, rank=1, step=7, batches=batches, model=model)
    report = json.loads((folder / "rank_1.json").read_text())
    assert report["step"] == 7
    name, facts = next(iter(report["parameters"].items()))
    assert (name, facts["gradient_nonfinite"], facts["gradient_norm"]) == ("1.weight", 1, None)
    assert report["parameters"]["0.weight"]["weight_norm"] == pytest.approx(model[0].weight.norm().item())
    assert report["parameters"]["0.weight"]["gradient_norm"] == pytest.approx(model[0].weight.grad.norm().item())
    for kept, batch in zip(torch.load(folder / "rank_1.pt"), batches, strict=True):
        assert torch.equal(kept["input_ids"], batch["input_ids"])


def test_a_spike_is_told_from_noise_and_descent():
    rng = random.Random(0)
    losses = [8 * math.exp(-step / 100) + 2 + rng.gauss(0, 0.1) for step in range(500)]
    spikes = guards.LossSpikes()
    assert not any(spikes.observe(loss) for loss in losses)
    assert spikes.observe(losses[-1] + 2)
    assert not spikes.observe(losses[-1])
    assert not spikes.observe(math.nan)


@pytest.mark.parametrize(
    ("recent", "limit"),
    [([1.0, 2.0] * 10, 1.5 + 8 * 1.4826 * 0.5 + 0.15), ([2.0] * 20, 2.2), ([-2.0] * 20, -1.8)],
)
def test_a_spike_is_eight_deviations_and_a_tenth_above_the_median(recent, limit):
    for loss, spike in ((limit - 0.001, False), (limit + 0.001, True)):
        spikes = guards.LossSpikes()
        assert not any(spikes.observe(x) for x in recent)
        assert spikes.observe(loss) == spike
    spikes = guards.LossSpikes()
    assert not any(spikes.observe(x) for x in [*recent[:19], limit + 0.001])  # 19 don't tell yet


def test_a_spike_in_the_first_steps_only_teaches():
    spikes = guards.LossSpikes()
    assert not any(spikes.observe(loss) for loss in [8.0] * 10 + [80.0])


def test_a_rank_that_ends_itself_leaves_the_others_time_for_their_stacks(monkeypatch, capfd):
    done = []
    monkeypatch.setattr(guards.sys, "__stderr__", sys.stderr)
    monkeypatch.setattr(guards.time, "sleep", lambda seconds: done.append(("sleep", seconds)))
    monkeypatch.setattr(guards.os, "_exit", lambda code: done.append(("exit", code)))
    guards.Watchdog(600, rank=1)._end(550.0)
    assert done == [("sleep", 2), ("exit", guards.HUNG)]
    assert "test_a_rank_that_ends_itself" in capfd.readouterr().err


def test_the_watchdog_works_in_a_process_without_standard_error(monkeypatch):
    done = []
    monkeypatch.setattr(guards.sys, "__stderr__", None)
    monkeypatch.setattr(guards.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(guards.os, "_exit", done.append)
    with guards.Watchdog(600, rank=1) as watchdog:
        watchdog._end(550.0)
    assert done == [guards.HUNG]


SCENARIOS = """
import ctypes, os, sys, tempfile, time, json
from joint_train.train.guards import Watchdog

def stuck_here():
    time.sleep(600)

def hang():
    with Watchdog(12, rank=3) as watchdog:  # its thread has 1.2 s before faulthandler ends the process
        watchdog.beat()
        stuck_here()

def hang_with_the_lock():
    with Watchdog(1, rank=0):
        ctypes.PyDLL(None).sleep(600)  # PyDLL keeps Python's lock

def slow():
    with Watchdog(6, rank=0) as watchdog:
        for _ in range(5):
            time.sleep(1.6)
            watchdog.beat()
    time.sleep(7)
    os.write(2, b"alive")

results = {}
for scenario in (hang, hang_with_the_lock, slow):
    with tempfile.TemporaryFile("w+") as said:
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            scenario()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - started
        said.seek(0)
        results[scenario.__name__] = [os.waitstatus_to_exitcode(status), said.read(), seconds]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def scenarios():
    """What each scenario's process said: {name: (exit code, standard error, seconds)}."""
    done = subprocess.run([sys.executable, "-c", SCENARIOS], capture_output=True, text=True, timeout=500, check=True)
    return json.loads(done.stdout)


def test_a_hang_ends_with_its_stack_on_screen_inside_the_timeout(scenarios):
    code, said, seconds = scenarios["hang"]
    assert code == guards.HUNG
    assert "stuck_here" in said and "parallel.timeout_seconds=12" in said
    assert all(line.startswith("[rank 3] ") for line in said.splitlines())
    assert 1.5 < seconds < 300  # 11 on a machine with nothing else to do


def test_a_hang_that_holds_pythons_lock_ends_too(scenarios):
    code, said, seconds = scenarios["hang_with_the_lock"]
    assert code == 1 and "Timeout" in said and "hang_with_the_lock" in said
    assert seconds < 300


def test_heartbeats_keep_a_slow_run_alive_and_nothing_fires_afterwards(scenarios):
    code, said, _ = scenarios["slow"]
    assert (code, said) == (0, "alive")


@pytest.mark.parametrize(("spec", "steps"), [(None, []), ("10-12", [10, 11, 12]), ("7", [7]), ("3-3", [3])])
def test_profiled_steps(spec, steps):
    assert list(guards.parse_steps(spec)) == steps


@pytest.mark.parametrize("spec", ["12-10", "0-3", "a-b", "3-", "-3", "1-2-3", ""])
def test_steps_that_make_no_sense_are_refused(spec):
    with pytest.raises(ConfigError, match="profile.steps"):
        guards.parse_steps(spec)


def test_a_profile_holds_the_chosen_steps_only(tmp_path):
    profiler = guards.StepProfiler("2-3", tmp_path / "profile", rank=0)
    for step in range(1, 5):
        with profiler.step(step):
            torch.ones(4, 4) @ torch.ones(4, 4)
    with gzip.open(tmp_path / "profile" / "rank_0.trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"step 2", "step 3", "aten::mm"} <= names
    assert not {"step 1", "step 4"} & names


def test_a_profile_of_a_resumed_run_starts_inside_its_steps(tmp_path):
    profiler = guards.StepProfiler("2-3", tmp_path, rank=0)
    with profiler.step(3):
        pass
    assert (tmp_path / "rank_0.trace.json.gz").exists()


def test_flight_recorder_leaves_a_users_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "5")
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE", raising=False)
    monkeypatch.delenv("TORCH_NCCL_DUMP_ON_TIMEOUT", raising=False)
    guards.flight_recorder(tmp_path)
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "5"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"].startswith(str(tmp_path))
