"""What each optimizer keeps of a weight: which moments, in which form, in how many bytes."""

from collections.abc import Iterable
from math import prod

import torch
from torch import nn

_BLOCK, _SMALLEST_BLOCK, _SMALLEST_WEIGHT = 256, 32, 4096


def block_size(shape: Iterable[int]) -> int:
    """Values of ``adamw_8bit`` that share a scale: neighbours in the last dimension; 0 where moments stay in fp32.

    A block never crosses the last dimension and depends on the whole weight's shape alone, so that any number of ranks
    has the same blocks. As in bitsandbytes, weights of less than 4096 values aren't quantised.
    """
    shape = tuple(shape)
    if len(shape) < 2 or prod(shape) < _SMALLEST_WEIGHT:
        return 0
    block = _BLOCK
    while shape[-1] % block:
        block //= 2
    return block if block >= _SMALLEST_BLOCK else 0


def weights_without_decay(module: nn.Module) -> set[int]:
    """``id`` of each weight that has no decay: norms, biases, scales and embedding tables (and heads tied to them), of
    tokens as well as of an image's positions. A head of its own is decayed as any matrix."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(p) for name, p in module.named_parameters() if "embedding_table" in name}
    return {id(p) for p in module.parameters() if p.ndim <= 1 or id(p) in tables}


def moved_by_muon(module: nn.Module) -> list[nn.Parameter]:
    """The trained weights that ``optim.name=muon`` moves by Muon: matrices of linear layers.

    Not tables and heads (tied or not), not the routing of ordered embeddings, which is a head as well, and not experts,
    which are three-dimensional.
    """
    spared = weights_without_decay(module)
    matrices = [(n, p) for n, p in module.named_parameters() if p.requires_grad and p.ndim == 2 and id(p) not in spared]
    return [p for n, p in matrices if "lm_head" not in n and "centroids" not in n]


def state_bytes(name: str, shape: Iterable[int], numel: int, dtype: torch.dtype) -> int:
    """Bytes of optimizer state for `numel` values (of a shard, say) of a weight of this whole shape.

    Args:
        name: of the optimizer, or ``momentum`` for a weight that Muon moves.
        dtype: of the weight.
    """
    shape = tuple(shape)
    if name == "momentum":
        return numel * dtype.itemsize
    if name == "adamw_bf16":
        return 4 * numel
    if name == "adamw_8bit":
        block = block_size(shape)
        return 2 * (numel + 4 * numel // block) if block else 8 * numel
    return 2 * numel * dtype.itemsize
