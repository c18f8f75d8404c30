"""FlexAttention's mask of a packed row, from what its blocks of 128 positions hold: no ``[S, S]`` tensor is made.

``create_block_mask`` asks the rule for every pair of positions. Here a block's lowest and highest document, image and
position tell whether any or all of its pairs are visible; in those of which that is not known the kernel asks the rule.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128


def block_mask(
    rule: Callable[..., Any],
    length: int,
    device: torch.device,
    window: int | None = None,
    document_ids: Tensor | None = None,
    images: Tensor | None = None,
) -> BlockMask:
    """The mask of :func:`joint_train.pair.visibility.attention_masks` for one attention type.

    Args:
        rule: ``(batch, head, q, kv) -> bool``: the rule itself, for the pairs of blocks that are visible in part.
        length: S, any.
        window: of sliding layers; ``None``: none.
        document_ids: ``[B, S]`` int64, 0 for padding; ``None``: one document a row, and one mask for all rows.
        images: ``[B, S]`` int64, the image of a position or -1; only with a window.
    """
    count = -(-length // BLOCK)
    first = torch.arange(count, device=device) * BLOCK
    last = (first + BLOCK - 1).clamp(max=length - 1)
    some = first[None, :] <= last[:, None]
    every = last[None, :] <= first[:, None]
    some, every = some[None], every[None]  # [B, queries, keys]
    if window is not None:
        if images is not None:
            lowest, highest = _bounds(images.masked_fill(images < 0, torch.iinfo(torch.int64).max), images)
            some = some | _meet(lowest, highest)
        some = some & (first[:, None] - last[None, :] < window)
        every = every & (last[:, None] - first[None, :] < window)
    if document_ids is not None:
        ordered = document_ids.masked_fill(document_ids == 0, torch.iinfo(torch.int64).max)  # padding comes last
        lowest, highest = _bounds(ordered, ordered)
        some = some & _meet(lowest, highest)
        one = lowest == highest
        every = every & (one[:, :, None] & one[:, None, :]) & (lowest[:, :, None] == lowest[:, None, :])
    whole = last - first == BLOCK - 1
    every = every & some & whole[:, None] & whole[None, :]
    partly = some & ~every
    return BlockMask.from_kv_blocks(
        *_order_blocks(partly), *_order_blocks(every), BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(length, length)
    )


def visible(length: int, window: int | None) -> float:
    """Keys that a row of one document computes scores with, in the mean: all those of the blocks that it sees."""
    count = -(-length // BLOCK)
    behind = [i - max(0, (i * BLOCK - (window or length) + 1) // BLOCK) for i in range(count)]
    return min(length, BLOCK * sum(blocks + 1 for blocks in behind) / count)


def _bounds(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest of `low` and highest of `high`, `[B, S]`, in each block: `[B, S / 128]`."""
    extra = -low.shape[1] % BLOCK
    low, high = (torch.cat([x, x[:, -1:].expand(-1, extra)], 1).unflatten(1, (-1, BLOCK)) for x in (low, high))
    return low.amin(-1), high.amax(-1)


def _meet(lowest: Tensor, highest: Tensor) -> Tensor:
    """Which pairs of blocks have ranges with something in common, `[B, queries, keys]`."""
    return (lowest[:, :, None] <= highest[:, None, :]) & (lowest[:, None, :] <= highest[:, :, None])


def _order_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and which: they come first."""
    number = blocks.sum(-1, dtype=torch.int32)
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True).int()
    return number[:, None], order[:, None]
