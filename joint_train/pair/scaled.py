"""A gradient that only a share of passes: ``drafter.base_grad_scale``."""

import torch
from torch import Tensor


class _ScaleGradient(torch.autograd.Function):
    """The same values; the gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """``x``, through which only ``scale`` of a gradient passes; with 0 there is none."""
    if scale == 1 or not x.requires_grad:
        return x
    return x.detach() if scale == 0 else _ScaleGradient.apply(x, scale)
