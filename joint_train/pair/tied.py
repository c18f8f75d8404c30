"""One gradient tensor for a head that is tied to the input embedding.

Autograd makes the embedding's gradient as a second ``[V, H]`` tensor, mostly zeros, and adds it to the head's: with a
vocabulary of 262,144 that is the largest allocation of a backward. Here the loss leaves the head's gradient with a
:class:`TiedGradient`, and the look-up's backward, which comes later, adds its few rows to it and hands it on.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextScaledWordEmbedding


class TiedGradient:
    """Where a head's gradient waits for the look-up's backward, in one forward and backward.

    >>> tied = TiedGradient()
    >>> with tied.lookups_of(embedding):
    ...     hidden = base(input_ids)
    >>> loss, _ = joint_loss(hidden, embedding.weight, ..., tied=tied)

    The hidden states of the loss must depend on the rows looked up, or the weight would not get the head's part.
    A look-up that finds nothing waiting makes a dense gradient of its own.
    """

    def __init__(self):
        self.waiting: Tensor | None = None

    def take(self) -> Tensor | None:
        waiting, self.waiting = self.waiting, None
        return waiting

    @contextmanager
    def lookups_of(self, embedding: Gemma4TextScaledWordEmbedding) -> Iterator[None]:
        """Within it, rows that `embedding` looks up belong to this gradient."""

        def forward(ids: Tensor) -> Tensor:
            weight = embedding.weight
            return _LookUp.apply(weight, ids, embedding.padding_idx, self) * embedding.embed_scale.to(weight.dtype)

        # An attribute of this module: it hides its class's method until it is deleted.
        embedding.forward = forward  # type: ignore[method-assign, assignment]  # the base calls it with ids alone
        try:
            yield
        finally:
            del embedding.forward


class _LookUp(torch.autograd.Function):
    """Rows of a table, whose gradient is added to the one that waits."""

    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor, padding_idx: int | None, tied: TiedGradient) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_idx, ctx.tied = weight.shape, padding_idx, tied
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (ids,) = ctx.saved_tensors
        total = ctx.tied.take()
        if total is None:
            total = grad.new_zeros(ctx.shape)
        return (
            total.index_add_(0, *_sum_by_token(ids.flatten(), grad.flatten(0, -2), ctx.padding_idx)),
            None,
            None,
            None,
        )


def _sum_by_token(ids: Tensor, grad: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
    """Each token once: `[N]` tokens and `[N, H]` sums of its rows, taken in fp32; unused entries are 0 for token 0.

    A frequent token has hundreds of rows: added one by one to a bf16 total, most of them would round away.
    """
    order = ids.argsort(stable=True)
    ids = ids[order]
    group = torch.cat([ids.new_zeros(1), (ids[1:] != ids[:-1]).cumsum(0)])
    sums = torch.zeros_like(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    sums.index_add_(0, group, grad[order].to(sums.dtype))
    tokens = torch.zeros_like(ids).index_copy_(0, group, ids)
    if padding_idx is not None:
        sums.masked_fill_((tokens == padding_idx)[:, None], 0)
    return tokens, sums.to(grad.dtype)
