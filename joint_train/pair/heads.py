"""A head, the hidden states that it reads, and the gradients of both, a chunk of rows at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor


class States:
    """Hidden states `[B, S, H]` and their gradients; None where none is wanted."""

    def __init__(self, hidden: Sequence[Tensor], trained: bool = True):
        self.hidden = [h.detach().flatten(0, -2) for h in hidden]
        trained = trained and torch.is_grad_enabled()
        # Contiguous whatever h's strides are: `add` writes through a flattened view.
        self.grads = [h.new_zeros(h.shape) if trained and h.requires_grad else None for h in hidden]

    def add(self, index: int, rows: Tensor, grad: Tensor | None) -> None:
        """Add `grad` `[n, H]`, if there is one, to that of state `index`. Each valid row comes once: its own dtype is
        enough."""
        if grad is None:
            return
        total = self.grads[index]
        assert total is not None, "a head returns a gradient only where one is wanted"
        total.flatten(0, -2).index_add_(0, rows, grad.to(total.dtype))


class Head:
    """A head, its gradient (None where none is wanted) and the states that it reads."""

    def __init__(self, weight: Tensor, states: States, softcap: float | None = None, trained: bool = True):
        self.weight, self.states, self.softcap = weight.detach(), states, softcap
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        trained = trained and torch.is_grad_enabled() and weight.requires_grad
        self.total = weight.new_empty(weight.shape, dtype=self.dtype) if trained else None
        self.written = False

    def needs_backward(self, index: int) -> bool:
        return self.total is not None or self.states.grads[index] is not None

    def product(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits `[n, V]` of `hidden` `[n, H]`, before a softcap."""
        return _matmul(hidden, self.weight.t(), out)

    def backward(self, grad: Tensor, hidden: Tensor, index: int, others: Tensor | None = None) -> Tensor | None:
        """Take `grad` `[n, V]` of the product to the weight, and return that of `hidden` `[n, H]`, of state `index`.

        Args:
            others: what other heads' products gave for `hidden`, to which this one's is added in place.

        Returns:
            None where `hidden` needs no gradient.
        """
        grad = grad.to(self.weight.dtype)
        if self.total is not None:
            _add_matmul(self.total, grad.t(), hidden, beta=int(self.written))
            self.written = True
        if self.states.grads[index] is None:
            return None
        if others is None:
            return _matmul(grad, self.weight, narrow=True)
        _add_matmul(others, grad, self.weight, beta=1)
        return others

    def gradient(self) -> Tensor | None:
        """The weight's gradient, in the weight's dtype."""
        if self.total is None:
            return None
        return self.total.to(self.weight.dtype) if self.written else torch.zeros_like(self.weight)


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """c·tanh(logits/c), in place."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def before_softcap(grad: Tensor, logits: Tensor, cap: float | None, scratch: Tensor | None = None) -> Tensor:
    """From the gradient by the softcapped `logits` to that by the logits before the softcap, in place."""
    return grad if cap is None else grad.addcmul_(grad, torch.div(logits, cap, out=scratch).square_(), value=-1)


def _matmul(a: Tensor, b: Tensor, out: Tensor | None = None, narrow: bool = False) -> Tensor:
    """a @ b, in fp32 for half-precision inputs; `narrow`: rounded to their dtype, on a GPU in the product itself."""
    if a.dtype.itemsize >= 4:
        return torch.mm(a, b, out=out)
    if not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    # Tensor cores accumulate in fp32: keep what they have, or round it once.
    return torch.mm(a, b) if narrow else torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta·total + a @ b, total being fp32 for half-precision inputs, or on a GPU what `narrow` made; beta 0
    reads nothing of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=beta)
