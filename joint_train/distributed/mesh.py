"""The device mesh: which ranks shard the weights, and which replicate them."""

from datetime import timedelta

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from joint_train.config import DIMENSIONS, mesh_shape


def init_distributed(timeout_seconds: int) -> torch.device:
    """Join the process group that torchrun announced (or one of a single rank) and choose this rank's device."""
    timeout = timedelta(seconds=timeout_seconds)
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if dist.is_torchelastic_launched():
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
    torch.cuda.set_device(device)
    return device


def init_mesh(parallel: DictConfig) -> DeviceMesh:
    """The mesh of :data:`DIMENSIONS` over all ranks; every group has ``parallel.timeout_seconds``."""
    shape = mesh_shape(parallel, dist.get_world_size())
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=DIMENSIONS)
    for name in DIMENSIONS:
        # A mesh makes its groups with torch's default time-out; there is no public way to say another (torch 2.13).
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=parallel.timeout_seconds), mesh.get_group(name))
    return mesh


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What ``fully_shard`` takes: one dimension for FSDP, two for HSDP."""
    return mesh["dp_replicate", "dp_shard"] if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]


def data_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """(rank, size) among the data-parallel ranks, which are all of them."""
    replicate, shard = mesh["dp_replicate"], mesh["dp_shard"]
    return replicate.get_local_rank() * shard.size() + shard.get_local_rank(), replicate.size() * shard.size()
