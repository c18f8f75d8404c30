"""Jobs for Kubernetes and SkyPilot: the files are what their APIs take, and a pod ends with its run's exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from joint_train.config import load
from launch import pod, submit

ROOT = Path(__file__).parents[2]
SCHEMAS = Path(__file__).parent / "schemas"  # the projects' own, each with its source and licence
RUN = ["model=gemma4_e4b", "data.train=/data/train.jsonl", "output_dir=/data/run"]


def problems(value, schema: dict, path: str = "") -> list[str]:
    """What a Kubernetes API server would refuse: unknown fields, missing ones, other types, other choices."""
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    if schema.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, (int, str)) else [f"{path}: neither a number nor a text"]
    if not isinstance(value, types[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return [f"{path}: {value!r} is no {schema['type']}"]
    found = [] if value in schema.get("enum", [value]) else [f"{path}: {value!r} is none of {schema['enum']}"]
    if isinstance(value, list):
        return found + [p for i, item in enumerate(value) for p in problems(item, schema["items"], f"{path}[{i}]")]
    if not isinstance(value, dict):
        return found
    found += [f"{path}.{name} is missing" for name in schema.get("required", []) if name not in value]
    known, others = schema.get("properties"), schema.get("additionalProperties")
    for name, child in value.items():
        if known and name in known:
            found += problems(child, known[name], f"{path}.{name}")
        elif isinstance(others, dict):
            found += problems(child, others, f"{path}.{name}")
        elif known:
            found.append(f"{path}.{name} is unknown")
    return found


def written(capsys, *arguments: str) -> list[dict]:
    assert submit.main(["--dry-run", *arguments]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


def check(made: dict, schema: str) -> None:
    known = json.loads((SCHEMAS / f"{schema}.json").read_text())
    assert made["apiVersion"] == known["apiVersion"] and known["licence"] == "Apache-2.0"
    metadata = {"type": "object", "properties": {name: {"type": "string"} for name in ("name", "namespace")}}
    properties = known["schema"]["properties"] | {"metadata": metadata}
    assert problems(made, {**known["schema"], "properties": properties}) == []


def pods(jobs: dict) -> dict:
    (replicated,) = jobs["replicatedJobs"]
    return replicated["template"]["spec"]


@pytest.fixture
def own_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: gemma4_e4b\ndata: {train: /data/train.jsonl}\noptim: {lr: 3e-5}\n")
    return file


def test_a_jobset_is_one_of_the_published_schema(capsys, own_file):
    job = [
        "--to",
        "kubernetes",
        "image=registry/joint-train:1",
        "pvc=runs",
        "claim_size=2Ti",
        "nodes=2",
        "memory=900Gi",
    ]
    claim, config, jobset = written(
        capsys, *job, "env_from=keys", "--", "--config", str(own_file), "output_dir=/data/run", "optim.lr=1e-5",
        "checkpoint.grace_seconds=300",
    )  # fmt: skip
    check(jobset, "jobset")
    assert (claim["kind"], claim["metadata"]["name"], claim["spec"]["accessModes"]) == (
        "PersistentVolumeClaim", "runs", ["ReadWriteMany"]
    )  # fmt: skip
    assert config["data"]["mine.yaml"] == own_file.read_text()
    job = pods(jobset["spec"])
    assert job["completions"] == job["parallelism"] == 2 and job["backoffLimit"] == 0
    spec = job["template"]["spec"]
    (container,) = spec["containers"]
    assert container["args"] == ["--config=/etc/joint-train/mine.yaml", "output_dir=/data/run", "optim.lr=1e-5"] + [
        "checkpoint.grace_seconds=300"
    ]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "memory": "900Gi"}
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {"/dev/shm": "shm", "/data": "data", "/etc/joint-train": "config"}
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    # The save's time, then torchrun's, then Kubernetes'.
    assert 300 < int(environment["PET_SHUTDOWN_TIMEOUT"]) < spec["terminationGracePeriodSeconds"]
    assert environment["JOINT_TRAIN_ADDRESS"].startswith("joint-train-train-0-0.joint-train:")


def test_which_ends_start_a_job_again(capsys):
    (jobset,) = written(capsys, "--to=kubernetes", "image=i", "pvc=runs", "--", *RUN)
    job, policy = pods(jobset["spec"]), jobset["spec"]["failurePolicy"]

    def action(code: int) -> str:
        """What a container's exit code leads to, by Kubernetes' and JobSet's rules: the first that matches decides."""
        for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
            if code in rule.get("onExitCodes", {}).get("values", []):
                assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "In"
                message = (
                    f"Container train for pod a/b failed with exit code {code} matching FailJob rule at index {index}"
                )
                return next(of["action"] for of in policy["rules"] if of["onJobFailureMessagePatterns"][0] in message)
        return f"restart, at most {policy['maxRestarts']} times"

    assert action(85) == action(86) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(2) == "FailJobSet"  # a mistake in the configuration stays one
    assert action(1) == action(70) == action(137) == "restart, at most 3 times"
    names = [rule["name"] for rule in policy["rules"]]
    assert names == ["preempted", "refused", "disrupted"] and all(
        rule["onJobFailureReasons"] == ["PodFailurePolicy"] for rule in policy["rules"]
    )


def test_a_trainjob_has_a_runtime_and_both_are_of_the_published_schemas(capsys):
    job = ["--to", "trainjob", "image=i", "pvc=runs", "nodes=4", "name=second"]
    runtime, trainjob = written(capsys, *job, "--", *RUN)
    check(runtime, "trainingruntime")
    check(trainjob, "trainjob")
    assert trainjob["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"] == "second"
    assert trainjob["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"] == 4
    (container,) = pods(runtime["spec"]["template"]["spec"])["template"]["spec"]["containers"]
    addresses = [one["value"] for one in container["env"] if one["name"] == "JOINT_TRAIN_ADDRESS"]
    assert container["name"] == "node" and addresses[0].startswith("second-node-0-0.second:")


def test_a_task_of_skypilot(capsys, own_file, tmp_path):
    arguments = ["--to", "skypilot", "accelerators=H200", "nodes=2", "--", "--config", str(own_file)]
    (task,) = written(capsys, *arguments, f"checkpoint.mirror={tmp_path}/mirror", "output_dir=/tmp/run")
    assert task["resources"]["accelerators"] == "H200:8" and task["num_nodes"] == 2
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [85, 86]
    assert task["file_mounts"] == {"~/joint-train/mine.yaml": str(own_file)}
    assert "--config=~/joint-train/mine.yaml" in task["run"]
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    (task,) = written(capsys, "--to", "skypilot", "bucket=s3://runs", "image=reg/jt:1", "--", *RUN)
    assert task["file_mounts"] == {"/data": {"source": "s3://runs", "mode": "MOUNT"}} and "setup" not in task


def test_skypilots_own_parser_reads_a_task(capsys):
    sky = pytest.importorskip("sky", reason="SkyPilot isn't installed")
    (task,) = written(capsys, "--to", "skypilot", "bucket=s3://runs", "nodes=2", "--", *RUN)
    del task["file_mounts"]  # it would look for the bucket
    assert sky.Task.from_yaml_config(task).num_nodes == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--to", "kubernetes", "pvc=a", "--", *RUN], "image= is not set"),
        (["--to", "kubernetes", "image=i", "--", *RUN], "pvc= is not set and checkpoint.mirror neither"),
        (["--to", "kubernetes", "image=i", "pvc=a", "--", *RUN[:2], "output_dir=/runs"], "is not below mount=/data"),
        (
            ["--to", "kubernetes", "image=i", "pvc=a", "name=Big_Run", "--", *RUN],
            "name=Big_Run: up to 40 small letters",
        ),
        (["--to", "kubernetes", "image=i", "pvc=a", "nods=2", "--", *RUN], "did you mean nodes?"),
        (["--to", "kubernetes", "image=i", "pvc=a", "--", *RUN, "optim.lrr=1"], "Did you mean optim.lr?"),
        (["--to", "nomad", "--", *RUN], "--to nomad: choose one of slurm, kubernetes"),
        (["--to", "skypilot", "--multirun", "bucket=s3://a", "--", *RUN], "write a file for each run"),
    ],
)
def test_a_mistake_is_refused_before_a_file_is_written(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert submit.main(arguments) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_file_is_written_and_what_to_do_with_it_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert submit.main(["--to", "kubernetes", "image=i", "pvc=a", "--", *RUN]) == 0
    assert "kubectl apply -f joint-train.yaml" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "joint-train.yaml").read_text())["kind"] == "JobSet"


@pytest.mark.parametrize(
    "does, code",
    [
        ("(state / 'preempted').touch()", 85),
        ("(state / 'failure-0.json').write_text('{\"exit_code\": 2}'); sys.exit(1)", 2),
        ("(state / 'failure-0.json').write_text('{\"exit_code\": -9}'); sys.exit(1)", 1),
        ("os.kill(os.getpid(), 9)", 137),
        ("pass", 0),
    ],
)
def test_a_pods_exit_code_is_its_runs(monkeypatch, tmp_path, does, code):
    """``launch.node`` is replaced by what it leaves behind."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").touch()
    (tmp_path / "launch" / "node.py").write_text(
        f"import os, pathlib, sys\nstate = pathlib.Path(sys.argv[1])\n{does}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert pod.run(["-m", "joint_train"]) == code


def test_a_pod_passes_on_the_signal_that_ends_it(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").touch()
    (tmp_path / "launch" / "node.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n    (pathlib.Path(sys.argv[1]) / 'preempted').touch()\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\npathlib.Path('ready').touch()\ntime.sleep(60)\n"
    )
    code = f"import sys; sys.path.append({str(ROOT)!r}); from importlib.util import spec_from_file_location as s\n"
    code += f"from importlib.util import module_from_spec as m; spec = s('pod', {str(ROOT / 'launch' / 'pod.py')!r})\n"
    code += "pod = m(spec); spec.loader.exec_module(pod); sys.exit(pod.run([]))"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    until = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < until:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 85


def test_recipes_are_submitted_with_their_ranks(capsys):
    (jobset,) = written(
        capsys, "--to", "kubernetes", "image=i", "pvc=a", "nodes=2", "--", "+recipe=gemma4_e4b_full_2x8gpu", *RUN[1:]
    )
    (container,) = pods(jobset["spec"])["template"]["spec"]["containers"]
    assert load(container["args"], 16, 8).parallel.dp_replicate == 2
