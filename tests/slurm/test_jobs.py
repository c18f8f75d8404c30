"""The starter pair's job on a real Slurm of two nodes: submitted, preempted, requeued, resumed, killed, cancelled."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, missing_programs
from omegaconf import OmegaConf

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmctld and slurmd have to be started by root"),
]

STEPS = 12
TRAINING = [
    "+experiment=starter", f"max_steps={STEPS}", "data.max_length=64", "data.micro_batch_size=1", "data.num_workers=0",
    "optim.warmup_steps=2", "eval.every=4", "eval.batches=1", "eval.prompts=0", "model.export.at_end=false",
    "checkpoint.every=1000", "checkpoint.grace_seconds=20", "tracking.wandb=disabled", "parallel.timeout_seconds=300",
]  # fmt: skip
STARTED = 180  # seconds within which a job makes its first step, on a busy machine


@pytest.fixture(scope="session")
def cluster():
    cluster = Cluster(kill_wait=20).start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("starter") / "pair"
    subprocess.run([sys.executable, "-m", "joint_train.starter", folder], check=True, capture_output=True, timeout=120)
    return folder


class Job:
    """A submitted job and what it leaves."""

    def __init__(self, cluster: Cluster, pair: Path, output_dir: Path, *overrides: str, submit: tuple[str, ...] = ()):
        self.cluster, self.output_dir = cluster, output_dir
        command = [sys.executable, "-m", "launch.submit", "nodes=2", "gpus_per_node=0", "time=10", "preflight=false"]
        training = [*TRAINING, f"pair={pair}", f"output_dir={output_dir}", *overrides]
        self.submitted = cluster.run(*command, *submit, "--", *training, check=False, timeout=60)
        found = re.match(r"job (\d+):", self.submitted.stdout)
        self.id = found[1] if found else None

    @property
    def log(self) -> str:
        file = self.output_dir / "slurm" / f"{self.id}.log"
        return file.read_text() if file.exists() else ""

    @property
    def steps(self) -> list[dict]:
        file = self.output_dir / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(path.parent.name[5:]) for path in self.output_dir.glob("checkpoints/step_*/COMPLETE"))

    def state(self) -> str:
        """Empty where a busy controller doesn't answer: it is asked again."""
        shown = self.cluster.run("scontrol", "show", "job", self.id, check=False).stdout
        found = re.search(r"JobState=(\w+)", shown)
        return found[1] if found else ""

    def processes(self, rank: int | None = None) -> list[int]:
        """Processes of the job on this machine (of one rank), by their environment: also orphans."""
        wanted = {f"SLURM_JOB_ID={self.id}", f"SLURM_CONF={self.cluster.root}/slurm.conf"}
        wanted |= {f"RANK={rank}"} if rank is not None else set()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if wanted <= set((folder / "environ").read_bytes().decode(errors="replace").split("\0")):
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def wait(self, condition: Callable[[], object], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s; {self.state()}\n{self.log[-6000:]}"
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.steps and self.steps[-1]["step"] >= step, STARTED)

    def wait_for_end(self, state: str, seconds: float = 300) -> None:
        """Until the job is over, in the expected state and with no process left."""
        self.wait(lambda: self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), seconds)
        assert self.state() == state, self.log[-6000:]
        self.wait(lambda: not self.processes(), 10)


def curve(job: Job) -> list[dict]:
    """What must not depend on interruptions, of every step: all that isn't a time, a speed or a size of memory."""
    learned = re.compile("loss|_ce|accuracy|agreement|acceptance|accepted|grad_norm|lr$|^step$")
    return [{name: value for name, value in step.items() if learned.search(name)} for step in job.steps]


@pytest.fixture(scope="session")
def undisturbed(cluster, pair, tmp_path_factory) -> Job:
    job = Job(cluster, pair, tmp_path_factory.mktemp("undisturbed") / "run", submit=("preflight=true",))
    assert job.id, job.submitted.stderr
    job.wait_for_end("COMPLETED", STARTED + 60)
    return job


def test_a_job_on_two_nodes_ends_well(undisturbed):
    assert [step["step"] for step in undisturbed.steps] == list(range(STEPS + 1))
    assert undisturbed.checkpoints == [STEPS]
    assert "preflight passed on 2 ranks: room for" in undisturbed.log
    assert "requeued 0 times" in undisturbed.log and undisturbed.log.rstrip().endswith("finished")
    kept = undisturbed.output_dir / "slurm"
    assert sorted(path.name for path in kept.iterdir()) == sorted(
        ["job.sh", "config.yaml", "code.json", "code.patch", f"{undisturbed.id}.log"]
    )


def test_requeued_in_the_middle(cluster, pair, tmp_path, undisturbed):
    job = Job(cluster, pair, tmp_path / "run", "tracking.wandb=offline")
    job.wait_for_step(2)
    cluster.run("scontrol", "requeue", job.id)
    job.wait_for_end("COMPLETED")
    assert "requeued 1 times" in job.log
    saved, last = job.checkpoints
    assert 2 <= saved < last == STEPS
    assert curve(job) == curve(undisturbed)
    runs = list((job.output_dir / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len({run.name.rsplit("-", 1)[1] for run in runs}) == 1


def test_out_of_time_in_the_middle(cluster, pair, tmp_path, undisturbed):
    job = Job(cluster, pair, tmp_path / "run", submit=("time=2",))
    job.wait_for_step(2)
    # Rank 1 stands still, so that rank 0 waits for it in the middle of the run until the limit comes near.
    [rank1] = job.processes(rank=1)
    os.kill(rank1, signal.SIGSTOP)
    job.wait(lambda: "signalled to stop" in job.log, 120)
    os.kill(rank1, signal.SIGCONT)
    job.wait_for_end("COMPLETED")
    assert job.log.count("preempted: back to the queue") == 1 and "requeued 1 times" in job.log
    saved, last = job.checkpoints
    assert 2 <= saved < last == STEPS
    assert curve(job) == curve(undisturbed)


def test_a_killed_rank_is_restarted(cluster, pair, tmp_path, undisturbed):
    job = Job(cluster, pair, tmp_path / "run", "checkpoint.every=3")
    job.wait_for_step(4)
    [rank1] = job.processes(rank=1)
    os.kill(rank1, signal.SIGKILL)
    job.wait_for_end("COMPLETED")
    assert "crashed; 0 of 3 restarts used" in job.log and "first failure: rank 1 on node" in job.log
    assert "killed by SIGKILL" in job.log and "requeued 1 times" not in job.log
    assert curve(job) == curve(undisturbed)


def test_a_crash_that_stays_fails_with_the_first_reason_at_the_end(cluster, pair, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": 1}\n')
    bad = f"data.train=[{{path: {tmp_path}/bad.jsonl}}]"
    job = Job(cluster, pair, tmp_path / "run", bad, submit=("max_restarts=1",))
    job.wait_for_end("FAILED")
    assert job.log.count("crashed;") == 2
    end = job.log.split("crashed; 1 of 1 restarts used")[1]
    assert re.search(r"first failure: rank [01] on node[01], exit code 2: .*/bad\.jsonl:1: messages is a number", end)


def test_cancelled_leaves_nothing(cluster, pair, tmp_path):
    job = Job(cluster, pair, tmp_path / "run")
    job.wait_for_step(2)
    assert len(job.processes()) >= 4  # the batch shell, srun, and two agents with a rank each
    cluster.run("scancel", job.id)
    job.wait_for_end("CANCELLED", 60)
    assert "requeued 1 times" not in job.log and len(job.checkpoints) == 1


def test_a_bad_override_is_refused_before_queuing(cluster, pair, tmp_path):
    job = Job(cluster, pair, tmp_path / "run", "optim.learning_rate=1")
    assert job.submitted.returncode == 2 and job.id is None
    assert "optim.learning_rate" in job.submitted.stderr
    assert cluster.run("squeue", "--noheader").stdout == "" and not job.output_dir.exists()


def test_a_sweep_is_an_array_of_runs(cluster, pair, tmp_path):
    command = [sys.executable, "-m", "launch.submit", "--multirun", "gpus_per_node=0", "preflight=false", "--"]
    sweep = [f"pair={pair}", f"output_dir={tmp_path}/sweep", "optim.lr=1e-3,2e-3", "max_steps=2"]
    submitted = cluster.run(*command, *TRAINING, *sweep, timeout=60).stdout
    job = re.match(r"job (\d+): 2 x 1 node", submitted)[1]
    deadline = time.monotonic() + STARTED + 30
    while cluster.run("squeue", "--noheader", "--states=pending,running,completing", "-j", job).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    runs = [tmp_path / "sweep" / str(number) for number in range(2)]
    logs = [next(run.glob(f"slurm/{job}_*.log")).read_text() for run in runs]
    assert all(log.rstrip().endswith("finished") for log in logs), logs
    assert [OmegaConf.load(run / "config.yaml").optim.lr for run in runs] == [1e-3, 2e-3]
    table = cluster.run(sys.executable, "-m", "launch.summary", str(tmp_path / "sweep")).stdout
    assert "optim.lr" in table and table.count("2 of 2") == 2
