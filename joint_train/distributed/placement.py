"""How a weight is cut over the ranks that shard it, and what a rank has of it."""

import math
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from joint_train.torch_private import local_shape_and_offset

WASTE = 1 / 8  # of a weight, that padding may add before another dimension is cut


def shard_dim(shape: Sequence[int], shards: int) -> int:
    """The dimension of a weight that is cut over `shards` ranks.

    FSDP2 pads dimension 0 to a multiple of the shards: 128 experts over 512 ranks take the place of 512. Where padding
    adds more than :data:`WASTE`, the first other dimension that divides evenly is cut (FSDP2 can't pad another one);
    without one it stays dimension 0.
    """
    padded = -(-shape[0] // shards) * shards
    if padded <= (1 + WASTE) * shape[0]:
        return 0
    return next((d for d in range(1, len(shape)) if shape[d] % shards == 0), 0)


def local_numel(shape: Sequence[int], shards: int) -> int:
    """Elements of a shard, with what FSDP2 pads."""
    dim = shard_dim(shape, shards)
    numel = 1
    for d, size in enumerate(shape):
        numel *= -(-size // shards) if d == dim else size
    return numel


def padding(shapes: Sequence[Sequence[int]], shards: int) -> float:
    """What equal shards add to weights of these shapes, as a share of them: it is gathered and reduced as well."""
    return sum(shards * local_numel(shape, shards) for shape in shapes) / sum(math.prod(shape) for shape in shapes) - 1


def placement(shards: int) -> Callable[[nn.Parameter], Shard]:
    """``shard_placement_fn`` of ``fully_shard``, see :func:`shard_dim`."""
    return lambda parameter: Shard(shard_dim(parameter.shape, shards))


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard; the tensor itself where it isn't sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def counts_here(tensor: Tensor) -> bool:
    """Whether this rank's shard counts in a sum over all ranks, so that each element counts once.

    Of what is sharded that is so on one of the replicas, of what every rank has whole on rank 0.
    """
    if not isinstance(tensor, DTensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    mesh = tensor.device_mesh
    dimensions = [d for d, placed in enumerate(tensor.placements) if not placed.is_shard()]
    return all(mesh.get_local_rank(d) == 0 for d in dimensions)


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part, a view, of a tensor that every rank has whole, cut as `like` is; all of it if that is whole."""
    if not isinstance(like, DTensor):
        return whole
    shape, start = local_shape_and_offset(like.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))]


def sharded_like(shard: Tensor, like: DTensor) -> DTensor:
    """A shard as a tensor of the shape, mesh and placements of `like`. No communication."""
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
