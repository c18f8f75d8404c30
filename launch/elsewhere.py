"""``joint-train submit --to kubernetes|trainjob|skypilot``: the file that runs a job there. Nothing is submitted.

    joint-train submit --to kubernetes image=IMAGE pvc=CLAIM nodes=2 -- model=gemma4_e4b output_dir=/data/run …
    joint-train submit --to skypilot accelerators=H100 nodes=2 -- model=gemma4_e4b checkpoint.mirror=s3://… …

Before ``--`` stand the options below, after it the overrides of ``python -m joint_train``, which are composed and
checked here for the job's ranks. ``--dry-run`` prints the file.
"""

import dataclasses
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from joint_train.command import OVERRUN, PREEMPTED
from joint_train.config import Config
from joint_train.files import replace
from launch.options import Plain, SubmitError, option, parse_options

MARGIN_SECONDS = 30  # between checkpoint.grace_seconds and the kill
PORT = 29400
CONFIG_FOLDER = "/etc/joint-train"  # of a pod, where files of --config are


@dataclass
class Cluster(Plain):
    nodes: int = option(1, "nodes of the job")
    gpus_per_node: int = option(8, "GPUs and ranks of a node; 0: one rank a node, on CPU")
    name: str = option("joint-train", "name of the job")
    max_restarts: int = option(3, "restarts after crashes; preemptions don't count")
    preflight: bool = option(True, "health check before the first step and after a restart (launch/preflight.py)")
    file: str | None = option(None, "file to write; NAME.yaml by default")


@dataclass
class Kubernetes(Cluster):
    image: str = option("", "image with joint-train, see docker/README.md (needed)")
    pvc: str | None = option(None, "claim of a volume that all nodes mount; needed unless checkpoint.mirror is set")
    claim_size: str | None = option(None, "also write that claim, with this much storage, e.g. 2Ti")
    storage_class: str | None = option(None, "of the claim that is written")
    mount: str = option("/data", "where the volume is in the pods; output_dir has to be below it")
    env_from: str | None = option(None, "secret whose entries are environment variables, e.g. HF_TOKEN, WANDB_API_KEY")
    cpus: str | None = option(None, "cores of a pod, e.g. 90")
    memory: str | None = option(None, "memory of a pod, e.g. 900Gi")
    shm: str = option("64Gi", "shared memory of a pod, for NCCL and the loaders")
    python: str = option("python", "the Python of the image")
    gpu: str = option("nvidia.com/gpu", "the resource that a GPU is")


@dataclass
class SkyPilot(Cluster):
    accelerators: str = option("H100", "kind of GPU, as `sky show-gpus` names it")
    spot: bool = option(True, "use instances that may be taken away; the run is recovered on others")
    image: str | None = option(None, "docker image with joint-train; without one the package is installed in `setup`")
    setup: str = option("pip install joint-train", "what installs the package, where there is no image")
    bucket: str | None = option(None, "bucket to mount at `mount`, e.g. s3://runs; needed without checkpoint.mirror")
    mount: str = option("/data", "where the bucket is on the nodes")


def kubernetes(options: Kubernetes, overrides: list[str], cfg: Config, kind: str) -> str:
    """The objects of a job, as YAML: a JobSet, or a TrainJob of Kubeflow with its runtime; with the claim if it is
    wanted, and the files of ``--config`` in a ConfigMap.

    Args:
        overrides: with ``--config=FILE`` as one word each.

    Raises:
        SubmitError: naming the option.
    """
    if not options.image:
        raise SubmitError("image= is not set: an image with joint-train, see docker/README.md")
    _check_name(options.name)
    _check_storage(cfg, options.pvc, "pvc", options.mount)
    files, overrides = _config_files(overrides, CONFIG_FOLDER)
    head = "train" if kind == "kubernetes" else "node"
    grace = cfg.checkpoint.grace_seconds + MARGIN_SECONDS
    limits: dict[str, Any] = {options.gpu: options.gpus_per_node} if options.gpus_per_node else {}
    limits |= {name: value for name, value in (("cpu", options.cpus), ("memory", options.memory)) if value}
    volumes: list[dict] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}}]
    mounts: list[dict] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if options.pvc:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": options.pvc}})
        mounts.append({"name": "data", "mountPath": options.mount})
    if files:
        volumes.append({"name": "config", "configMap": {"name": f"{options.name}-config"}})
        mounts.append({"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True})
    label = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"}}
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    environment: list[dict[str, Any]] = [
        {"name": "JOINT_TRAIN_NODES", "value": str(options.nodes)},
        {"name": "JOINT_TRAIN_RANKS", "value": str(options.gpus_per_node or 1)},
        {"name": "JOINT_TRAIN_NODE", "valueFrom": index},
        {"name": "JOINT_TRAIN_ADDRESS", "value": f"{options.name}-{head}-0-0.{options.name}:{PORT}"},
        {"name": "JOINT_TRAIN_ATTEMPT", "valueFrom": label},
        {"name": "JOINT_TRAIN_PREFLIGHT", "value": str(int(options.preflight))},
        {"name": "PET_SHUTDOWN_TIMEOUT", "value": str(grace - MARGIN_SECONDS // 3)},
        {"name": "PYTHONUNBUFFERED", "value": "1"},
        {"name": "TOKENIZERS_PARALLELISM", "value": "false"},
        {"name": "NCCL_DEBUG", "value": "WARN"},
    ]
    container = {
        "name": head,
        "image": options.image,
        "command": [options.python, "-m", "launch.pod", options.name],
        "args": overrides,
        "env": environment,
        "resources": {"limits": limits} if limits else {},
        "volumeMounts": mounts,
        **({"envFrom": [{"secretRef": {"name": options.env_from}}]} if options.env_from else {}),
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace,
        "securityContext": {"fsGroup": 1000},  # of the image's user, who has to write into the volume
        "containers": [container],
        "volumes": volumes,
    }
    jobs = _jobs(options, head, pod, kind)
    metadata = {"name": options.name}
    objects: list[dict[str, Any]] = []
    if options.pvc and options.claim_size:
        claim: dict[str, Any] = {
            "accessModes": ["ReadWriteMany" if options.nodes > 1 else "ReadWriteOnce"],
            "resources": {"requests": {"storage": options.claim_size}},
        }
        claim |= {"storageClassName": options.storage_class} if options.storage_class else {}
        objects.append(
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": options.pvc}, "spec": claim}
        )
    if files:
        name = {"name": f"{options.name}-config"}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": name, "data": files})
    if kind == "kubernetes":
        objects.append({"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": jobs})
    else:
        kubeflow = "trainer.kubeflow.org/v1alpha1"
        runtime = {"mlPolicy": {"numNodes": options.nodes}, "template": {"spec": jobs}}
        objects.append({"apiVersion": kubeflow, "kind": "TrainingRuntime", "metadata": metadata, "spec": runtime})
        reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": options.name}
        trainer = {"image": options.image, "numNodes": options.nodes}
        spec = {"runtimeRef": reference, "trainer": trainer}
        objects.append({"apiVersion": kubeflow, "kind": "TrainJob", "metadata": metadata, "spec": spec})
    return "---\n".join(_yaml(one) for one in objects)


def _jobs(options: Kubernetes, head: str, pod: dict, kind: str) -> dict[str, Any]:
    """The spec of a JobSet: one Job with a pod for each node, all of which start again together."""
    # The first rule that matches decides. What no rule matches, a crash, fails the Job by backoffLimit.
    told = [
        {"action": "FailJob", "onExitCodes": {"containerName": head, "operator": "In", "values": [PREEMPTED, OVERRUN]}},
        {"action": "FailJob", "onExitCodes": {"containerName": head, "operator": "In", "values": [2]}},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    again = "RestartJobSetAndIgnoreMaxRestarts"
    # Kubernetes' message: "Container train for pod … failed with exit code 85 matching FailJob rule at index 0".
    rules = [
        {
            "name": name,
            "action": action,
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [f"FailJob rule at index {number}"],
        }
        for number, (name, action) in enumerate((("preempted", again), ("refused", "FailJobSet"), ("disrupted", again)))
    ]
    job = {
        "completionMode": "Indexed",
        "completions": options.nodes,
        "parallelism": options.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": told},
        "template": {"spec": pod},
    }
    replicated: dict[str, Any] = {"name": head, "replicas": 1, "template": {"spec": job}}
    if kind == "trainjob":  # by which Kubeflow finds the job that trains
        labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
        replicated["template"] = {"metadata": {"labels": labels}, "spec": job}
    return {
        "failurePolicy": {"maxRestarts": options.max_restarts, "rules": rules},
        "replicatedJobs": [replicated],
    }


def skypilot(options: SkyPilot, overrides: list[str], cfg: Config) -> str:
    """A task of SkyPilot, as YAML, to run as a managed job.

    Raises:
        SubmitError: naming the option.
    """
    _check_name(options.name)
    _check_storage(cfg, options.bucket, "bucket", options.mount)
    ranks = options.gpus_per_node or 1
    files, overrides = _config_files(overrides, "~/joint-train")
    paths = {f"~/joint-train/{name}": str(Path(text).absolute()) for name, text in files.items()} if files else {}
    resources: dict[str, Any] = {
        "use_spot": options.spot,
        "job_recovery": {
            "max_restarts_on_errors": options.max_restarts,
            "recover_on_exit_codes": [PREEMPTED, OVERRUN],
        },
    }
    if options.gpus_per_node:
        resources["accelerators"] = f"{options.accelerators}:{options.gpus_per_node}"
    if options.image:
        resources["image_id"] = f"docker:{options.image}"
    run = "\n".join(
        [
            f"export JOINT_TRAIN_NODES=$SKYPILOT_NUM_NODES JOINT_TRAIN_RANKS={ranks}",
            "export JOINT_TRAIN_NODE=$SKYPILOT_NODE_RANK JOINT_TRAIN_ATTEMPT=$SKYPILOT_TASK_ID",
            f'export JOINT_TRAIN_ADDRESS=$(echo "$SKYPILOT_NODE_IPS" | head -n1):{PORT}',
            f"export JOINT_TRAIN_PREFLIGHT={int(options.preflight)} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false",
            f"export PET_SHUTDOWN_TIMEOUT={cfg.checkpoint.grace_seconds + MARGIN_SECONDS * 2 // 3} NCCL_DEBUG=WARN",
            f"python -m launch.pod {options.name} {' '.join(map(_quoted, overrides))}",
        ]
    )
    mounts: dict[str, Any] = dict(paths)
    if options.bucket:
        mounts[options.mount] = {"source": options.bucket, "mode": "MOUNT"}
    task = {
        "name": options.name,
        "num_nodes": options.nodes,
        "resources": resources,
        **({"file_mounts": mounts} if mounts else {}),
        **({} if options.image else {"setup": options.setup}),
        "run": run + "\n",
    }
    return _yaml(task)


def _quoted(override: str) -> str:
    """For the shell; ``~`` at the beginning of a ``--config``'s path stays one."""
    return override if re.fullmatch(r"--config=~/[\w./-]+", override) else shlex.quote(override)


def _config_files(overrides: list[str], folder: str) -> tuple[dict[str, str], list[str]]:
    """The files of ``--config`` by their names (in a pod's folder their texts, for SkyPilot their paths), and the
    overrides that name them there."""
    files: dict[str, str] = {}
    there = []
    for word in overrides:
        if word.startswith("--config="):
            file = Path(word.removeprefix("--config="))
            if file.name in files:
                raise SubmitError(f"{file}: two files of --config have the same name")
            files[file.name] = str(file) if folder.startswith("~") else file.read_text()
            word = f"--config={folder}/{file.name}"
        there.append(word)
    return files, there


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise SubmitError(f"name={name}: up to 40 small letters, digits and dashes, the first of them a letter")


def _check_storage(cfg: Config, given: str | None, key: str, mount: str) -> None:
    """What a run leaves has to outlive its pods."""
    if given is None and cfg.checkpoint.mirror is None:
        raise SubmitError(
            f"{key}= is not set and checkpoint.mirror neither: what the run writes would be gone with its node. Give a "
            f"volume with {key}=, or an object storage with checkpoint.mirror=s3://…"
        )
    if given is None:
        return
    if not os.path.isabs(mount):
        raise SubmitError(f"mount={mount}: give the path in the pod, from the root, such as /data")
    inside = os.path.commonpath([os.path.abspath(cfg.output_dir), mount]) == os.path.normpath(mount)
    if not inside:
        raise SubmitError(f"output_dir={cfg.output_dir} is not below mount={mount}, where {key}={given} is")


class _Text(yaml.SafeDumper):
    """YAML for people: texts of several lines as they are read, no references."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Text.add_representer(str, _Text.represent_str)


def _yaml(value: object) -> str:
    return yaml.dump(value, Dumper=_Text, sort_keys=False, allow_unicode=True, width=10_000)


KINDS: dict[str, type[Cluster]] = {"kubernetes": Kubernetes, "trainjob": Kubernetes, "skypilot": SkyPilot}


def usage() -> str:
    lines = [__doc__.strip()]
    for kind, of in KINDS.items():
        lines += ["", f"Options of --to {kind}:"]
        for field in dataclasses.fields(of):
            lines.append(f"  {field.name:<14} {str(field.default):<14} {field.metadata['help']}")
    return "\n".join(lines)


def main(to: str, arguments: list[str], overrides: list[str], dry_run: bool) -> int:
    """Write the file.

    Raises:
        SubmitError, ConfigError: as :func:`kubernetes` and :func:`skypilot`.
    """
    from joint_train import config

    if to not in KINDS:
        raise SubmitError(f"--to {to}: choose one of slurm, {', '.join(KINDS)}")
    options = parse_options(arguments, KINDS[to])
    overrides = config.join_options(overrides)
    ranks = options.gpus_per_node or 1
    cfg = config.load(overrides, options.nodes * ranks, ranks)
    if isinstance(options, Kubernetes):
        text, then = kubernetes(options, overrides, cfg, to), "kubectl apply -f"
    else:
        assert isinstance(options, SkyPilot)
        text, then = skypilot(options, overrides, cfg), "sky jobs launch"
    if dry_run:
        print(text, end="")
        return 0
    file = Path(options.file or f"{options.name}.yaml")
    replace(file, text)
    print(f"written: {file}; start it with: {then} {shlex.quote(str(file))}", file=sys.stderr)
    return 0
