"""softmax(logits) of a chunk of rows, and what is computed from one or two of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def lazy(method: Callable) -> property:
    """``functools.cached_property`` in a form that ``torch.compile`` can trace (that of Python 3.11 takes a lock)."""
    name = f"_{method.__name__}"

    def get(self):
        if not hasattr(self, name):
            setattr(self, name, method(self))
        return getattr(self, name)

    return property(get)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """sum_v a·b of each row, `[n]`, without a tensor for the products."""
    if torch.compiler.is_compiling():
        return (a * b).sum(-1)  # in one kernel with what makes a and b; a library's product would need both of them
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten()


def pick(table: Tensor, columns: Tensor) -> Tensor:
    """``table[i, columns[i]]`` of each row i."""
    return table.gather(1, columns[:, None]).squeeze(1)


@dataclass
class Distribution:
    """softmax(logits) of n rows."""

    logits: Tensor  # [n, V]
    probs: Tensor  # [n, V]
    argmax: Tensor  # [n]
    logsumexp: Tensor  # [n]

    @classmethod
    def of(cls, logits: Tensor, out: Tensor | None = None) -> "Distribution":
        largest, argmax = logits.max(-1)
        probs = torch.softmax(logits, -1, out=out)
        # The largest probability is at least 1/V: it has a logarithm, where that of a rare token may be 0.
        return cls(logits, probs, argmax, largest - pick(probs, argmax).log())

    def at(self, temperature: float) -> "Distribution":
        return self if temperature == 1 else self.of(self.logits / temperature)

    @lazy
    def negative_entropy(self) -> Tensor:
        return dot(self.probs, self.logits) - self.logsumexp

    def cross_entropy(self, tokens: Tensor) -> Tensor:
        return self.logsumexp - pick(self.logits, tokens)


def overlap(p: Distribution, q: Distribution, scratch: Tensor | None) -> Tensor:
    """alpha = sum_v min(p, q), `[n]`."""
    return torch.minimum(p.probs, q.probs, out=scratch).sum(-1)


def add_label_gradient(grad: Tensor, q: Distribution, tokens: Tensor, scale: Tensor) -> None:
    """grad += scale · the gradient of -log q(token) with respect to q's logits; `scale` is `[n]`."""
    if torch.compiler.is_compiling():
        is_token = tokens[:, None] == torch.arange(grad.shape[1], device=grad.device)
        grad.addcmul_(q.probs - is_token.to(grad.dtype), scale[:, None])
        return
    grad.addcmul_(q.probs, scale[:, None]).scatter_add_(1, tokens[:, None], -scale[:, None])
