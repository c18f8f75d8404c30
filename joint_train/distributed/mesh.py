"""The device mesh: which ranks shard the weights, and which replicate them."""

from datetime import timedelta

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from joint_train.config import ConfigError

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")

REFUSED = {
    "pp": "the drafter reads the keys and values of the base's last layers in the same forward, so the pair can't be "
    "split into pipeline stages",
    "cp": "the drafter's rows attend to the base's whole key/value sequence, so the sequence can't be split",
    "tp": "the drafter and the loss read the base's embedding and head whole, which tensor parallelism splits",
}


def mesh_shape(parallel: DictConfig, world_size: int | None) -> tuple[int, int, int, int, int]:
    """Sizes of :data:`DIMENSIONS`.

    Args:
        parallel: the ``parallel`` configuration group.
        world_size: number of ranks; ``None`` where it isn't known yet (``dp_shard=-1`` stays -1 then).

    Raises:
        ConfigError: for pp, cp or tp above 1, and for a mesh that doesn't fit the world size.
    """
    for name, why in REFUSED.items():
        if parallel[name] != 1:
            raise ConfigError(
                f"parallel.{name}={parallel[name]} is not supported: {why}. Set parallel.{name}=1 and use "
                "parallel.dp_shard (FSDP2) and parallel.dp_replicate (HSDP) instead."
            )
    replicate, shard = parallel.dp_replicate, parallel.dp_shard
    if replicate < 1 or (shard < 1 and shard != -1):
        raise ConfigError(
            f"parallel.dp_replicate={replicate}, parallel.dp_shard={shard}: sizes are at least 1; only dp_shard may "
            "be -1, for all the ranks that are left."
        )
    if world_size is not None:
        if shard == -1 and world_size % replicate == 0:
            shard = world_size // replicate
        if shard == -1 or replicate * shard != world_size:
            product = f"{replicate} x {'?' if shard == -1 else shard}"
            fit = (
                f"{replicate} x {shard} = {replicate * shard}"
                if shard != -1
                else f"{world_size} / {replicate} isn't whole"
            )
            raise ConfigError(
                f"parallel: dp_replicate x dp_shard = {product} doesn't fit {world_size} ranks ({fit}). Set "
                f"parallel.dp_shard=-1 and a parallel.dp_replicate that divides {world_size}."
            )
    return 1, replicate, shard, 1, 1


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
