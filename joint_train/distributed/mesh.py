"""The device mesh: which ranks shard the weights, and which replicate them."""

import logging
import os
import resource
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from joint_train.config import DIMENSIONS, ParallelConfig, mesh_shape
from joint_train.config.values import REFUSED, mesh_sentence
from joint_train.errors import ConfigError
from joint_train.torch_private import set_group_timeout

log = logging.getLogger(__name__)


def init_distributed(timeout_seconds: int) -> torch.device:
    """Join the process group that a launcher announced (or one of a single rank) and choose this rank's device.

    Raises:
        ConfigError: for a launcher that says how many ranks there are, and not which of them this is.
    """
    timeout = timedelta(seconds=timeout_seconds)
    # Each rank has a few connections to every other: raise the limit of open files as far as this process may.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):  # a system that has a lower limit for all processes: launch.preflight looks
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    cuda = torch.cuda.is_available()
    # torchrun and Slurm's launcher say which of the node's ranks this is.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # With the device named, NCCL connects at once, and the mesh's groups split this one instead of connecting anew.
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": device} if cuda else {"backend": "gloo"}
        if _launched():
            dist.init_process_group(timeout=timeout, **options)
        else:
            dist.init_process_group(timeout=timeout, store=dist.HashStore(), rank=0, world_size=1, **options)
    return device


def _launched() -> bool:
    """Whether a launcher started this rank: torchrun, or another that sets the same variables."""
    if dist.is_torchelastic_launched():
        return True
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set without {', '.join(missing)}, so this process can't find "
            "the other ranks: start the run with torchrun, or unset WORLD_SIZE for a run of one rank."
        )
    return True


def init_mesh(parallel: ParallelConfig) -> DeviceMesh:
    """The mesh of :data:`DIMENSIONS` over all ranks; every group has ``parallel.timeout_seconds``."""
    shape = mesh_shape(parallel, dist.get_world_size())
    if shape[1] != parallel.dp_replicate:
        log.info(mesh_sentence(parallel, dist.get_world_size()))
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=DIMENSIONS)
    for name in DIMENSIONS:
        # A mesh makes its groups with torch's default time-out; there is no public way to say another (torch 2.13).
        set_group_timeout(mesh.get_group(name), timedelta(seconds=parallel.timeout_seconds))
    return mesh


def check_mesh(mesh: DeviceMesh) -> None:
    """Refuse a mesh that isn't one of :func:`init_mesh`, and one that splits what the pair can't split.

    Raises:
        ConfigError: naming the dimension, the reason and what to set instead.
    """
    names = mesh.mesh_dim_names or ()
    for name in names:
        if name in REFUSED and mesh[name].size() != 1:
            raise ConfigError(
                f"device_mesh has {name} of size {mesh[name].size()}, which is not supported: {REFUSED[name]}. Make "
                f"{name} 1 and use dp_shard (FSDP2) and dp_replicate (HSDP) instead."
            )
    if not {"dp_replicate", "dp_shard"} <= set(names):
        raise ConfigError(
            f"device_mesh has the dimensions {', '.join(names) or '(without names)'}; dp_replicate and dp_shard are "
            "needed. Make it with joint_train.distributed.mesh.init_mesh, or with init_device_mesh(..., mesh_dim_names="
            "('dp_replicate', 'dp_shard'))."
        )
    if unknown := [name for name in names if name not in DIMENSIONS and mesh[name].size() != 1]:
        raise ConfigError(
            f"device_mesh has the unknown dimension {unknown[0]}: its ranks would never reduce their gradients. Known "
            f"are {', '.join(DIMENSIONS)}."
        )


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What ``fully_shard`` takes: one dimension for FSDP, two for HSDP."""
    return mesh["dp_replicate", "dp_shard"] if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]


def data_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """(rank, size) among the data-parallel ranks, which are all of them."""
    replicate, shard = mesh["dp_replicate"], mesh["dp_shard"]
    return replicate.get_local_rank() * shard.size() + shard.get_local_rank(), replicate.size() * shard.size()
