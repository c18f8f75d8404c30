"""What is computed of one chunk's logits, row by row: losses, measures and the gradient by the logits.

One statement of the mathematics in two ways to run it. :class:`Buffered` keeps its ``[n, V]`` tensors in buffers that
all chunks share. :class:`Compiled` (``loss.compile``) has ``torch.compile`` make few kernels of it: probabilities are
then no tensors but computed where they are read, and the gradient is written once, in the dtype of the head.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from joint_train.pair.centroids import Centroids, routed
from joint_train.pair.distribution import Distribution, add_label_gradient, overlap, pick
from joint_train.pair.divergence import Divergence
from joint_train.pair.heads import before_softcap, softcapped
from joint_train.torch_private import mark_rows_dynamic


@dataclass(frozen=True)
class Mix:
    """``loss.drafter``, parsed: weights of the distances from the teacher, of the data's token and of its argmax."""

    distances: Mapping[str, float]
    data_weight: float
    argmax_weight: float
    temperature: float
    teacher_grad: float
    centroid_weight: float = 0.0


class Part(NamedTuple):
    """What a chunk's rows give for the base, or for a round.

    Attributes:
        values: numbers of each row, ``[numbers, n]``: :data:`LOSSES`, and of a round the :data:`MEASURES` of the head
            that serves and, with centroids, those of all tokens and :data:`ROUTING`.
        grad: ``[n, V]``, of the loss by the head's product; None where none is wanted.
        routing_grad: ``[n, C]``, of the routing's loss by the centroids' logits; None where none is wanted.
    """

    values: Tensor
    grad: Tensor | None
    routing_grad: Tensor | None = None


LOSSES = ("loss", "ce", "top1")
MEASURES = ("agree", "acceptance_argmax", "acceptance_sampled")
ROUTING = ("ce", "hit")  # cross-entropy with the centroid of the data's token, and whether it is among the top k


def round_terms(
    mix: Mix,
    p: Distribution,
    teacher: Distribution,
    q: Distribution,
    labels: Tensor,
    scale: Tensor | None,
    scores: Tensor | None,
    centroids: Centroids | None,
    base_grad: Tensor | None,
    grad: Tensor | None,
    routing_scale: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A round of the drafter, as :class:`Part` has it, with the gradient by q's logits.

    Args:
        p, teacher: the base's distributions, at temperature 1 and at that of the losses.
        q: the drafter's, n rows.
        labels: ``[n]``, the data's tokens.
        scale: ``[n]``, of each row's gradient; None: no gradient is wanted of q.
        scores, centroids: with ordered embeddings, the logits ``[n, C]`` of the centroids.
        base_grad: ``[n, V]``, to which the gradient by the teacher's logits is added; None: it has none.
        grad: ``[n, V]``, overwritten; None: new tensors are made.
        routing_scale: ``[n]``, of each row's gradient of the routing; None: no gradient is wanted of it.
    """
    ce, alpha = q.cross_entropy(labels), overlap(p, q, grad)
    loss, distance = mix.data_weight * ce + mix.argmax_weight * q.cross_entropy(p.argmax), None
    if mix.distances:
        student = q.at(mix.temperature)
        alpha_t = alpha if student is q else overlap(teacher, student, grad)
        distance = Divergence(mix.distances, teacher, student, alpha_t)
        loss = loss + distance.value
        if base_grad is not None:
            assert scale is not None, "the teacher's gradient is scaled like the student's"
            base_grad.add_(distance.teacher_gradient(mix.teacher_grad * scale / mix.temperature, grad))
    values, routing_grad = [loss, ce, q.argmax == labels], None
    if centroids is None:
        values += _measures(p, q, alpha)
    else:
        assert scores is not None, "with ordered embeddings there are the logits of the centroids"
        served = routed(q, scores, centroids, grad)
        # `overlap` may write into a tensor that it reads: it works token by token.
        values += [*_measures(p, served, overlap(p, served, grad)), *_measures(p, q, alpha)]
        found, routing_grad = _routing(scores, centroids, labels, mix.centroid_weight, routing_scale)
        values += found
    if scale is None:
        return _rows(values), None, routing_grad
    if distance is not None:
        grad = distance.student_gradient(scale / mix.temperature, grad)
    else:
        grad = torch.zeros_like(q.logits) if grad is None else grad.zero_()
    for weight, tokens in ((mix.data_weight, labels), (mix.argmax_weight, p.argmax)):
        if weight:
            add_label_gradient(grad, q, tokens, weight * scale)
    return _rows(values), grad, routing_grad


def _routing(
    scores: Tensor, centroids: Centroids, labels: Tensor, weight: float, scale: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """:data:`ROUTING`, and the gradient of `weight` times the cross-entropy by the scores ``[n, C]``."""
    q, tokens = Distribution.of(scores), centroids.token_centroid[labels]
    rank = (scores > pick(scores, tokens)[:, None]).sum(-1)
    values = [q.cross_entropy(tokens), rank < centroids.top_k]
    if scale is None:
        return values, None
    grad = torch.zeros_like(scores)
    add_label_gradient(grad, q, tokens, weight * scale)
    return values, grad


def _measures(p: Distribution, q: Distribution, alpha: Tensor) -> list[Tensor]:
    """How drafts from q fare; ``alpha`` is sum_v min(p, q)."""
    return [q.argmax == p.argmax, pick(p.probs, q.argmax), alpha]


def _rows(values: list[Tensor]) -> Tensor:
    return torch.stack([value.to(values[0].dtype) for value in values])


class Buffered:
    """The terms of a chunk after the other, in the same buffers.

    Args:
        mix: of the drafter's losses.
        centroids: with ordered embeddings.
        caps: the softcaps of base and drafter.
        buffers: ``[5, n, V]``, or 6 where the teacher has a gradient.
    """

    def __init__(self, mix: Mix, centroids: Centroids | None, caps: tuple, buffers: Tensor):
        self.mix, self.centroids, self.caps, self.buffers = mix, centroids, caps, buffers

    def product_buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        """Where the products of base and drafter go, ``[rows, V]`` each; of all that follows as well."""
        self.base_logits, self.base_probs, self.logits, self.probs, self.grad = self.buffers[:5, :rows]
        self.base_grad = self.buffers[5, :rows] if len(self.buffers) > 5 else self.grad
        return self.base_logits, self.logits

    def gather(self, hidden: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
        """Rows ``[n, H]`` of hidden states. One that isn't valid reads as 0: nothing in it can reach a sum."""
        return hidden[rows].masked_fill_(~valid[:, None], 0)

    def base(self, product: Tensor, labels: Tensor, scale: Tensor | None) -> Part:
        """The base's cross-entropy. With a gradient of the teacher, it is that before the softcap's derivative, to
        which the rounds add and :meth:`base_gradient` does the rest."""
        self.p = p = Distribution.of(softcapped(product, self.caps[0]), self.base_probs)
        self.teacher = p.at(self.mix.temperature) if self.mix.distances else p
        ce, grad = p.cross_entropy(labels), None
        if scale is not None:
            grad = self.base_grad
            add_label_gradient(grad.zero_(), p, labels, scale)
        return Part(_rows([ce, ce, p.argmax == labels]), grad)

    def base_gradient(self, grad: Tensor | None) -> Tensor:
        assert grad is not None, "base() makes one where a scale is given"
        return before_softcap(grad, self.p.logits, self.caps[0], self.logits)

    def round(
        self,
        product: Tensor,
        labels: Tensor,
        scale: Tensor | None,
        scores: Tensor | None,
        base_grad: Tensor | None,
        routing_scale: Tensor | None = None,
    ) -> Part:
        q = Distribution.of(softcapped(product, self.caps[1]), self.probs)
        terms = self.p, self.teacher, q, labels, scale, scores, self.centroids, base_grad, self.grad, routing_scale
        values, grad, routing_grad = round_terms(self.mix, *terms)
        if grad is not None:
            grad = before_softcap(grad, q.logits, self.caps[1], self.probs)
        return Part(values, grad, routing_grad)


class Compiled:
    """The same by kernels of ``torch.compile``; arguments and methods as :class:`Buffered` has them.

    Args:
        buffers: ``[2, n, V]``, of the two products.
        dtypes: of the heads of base and drafter.
    """

    def __init__(self, mix: Mix, centroids: Centroids | None, caps: tuple, buffers: Tensor, dtypes: tuple):
        self.mix, self.caps, self.buffers, self.dtypes = mix, caps, buffers, dtypes
        self.centroids = None if centroids is None else replace(centroids, weight=centroids.weight.detach())

    def product_buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        self.product, other = self.buffers[:, :rows]
        return self.product, other

    def gather(self, hidden: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
        _any_number_of_rows(hidden, rows, valid)
        return compiled(_gather)(hidden, rows, valid)

    def base(self, product: Tensor, labels: Tensor, scale: Tensor | None) -> Part:
        _any_number_of_rows(product, labels, scale)
        dtype = None if self.mix.teacher_grad else self.dtypes[0]
        values, grad, *self.p = compiled(_base)(product, labels, scale, self.caps[0], dtype)
        return Part(values, grad)

    def base_gradient(self, grad: Tensor | None) -> Tensor:
        assert grad is not None, "base() makes one where a scale is given"
        if not self.mix.teacher_grad:
            return grad  # it is done already
        return compiled(_base_gradient)(grad, self.product, self.caps[0], self.dtypes[0])

    def round(
        self,
        product: Tensor,
        labels: Tensor,
        scale: Tensor | None,
        scores: Tensor | None,
        base_grad: Tensor | None,
        routing_scale: Tensor | None = None,
    ) -> Part:
        p, q = (self.product, *self.p), (product, labels, scale, scores)
        _any_number_of_rows(*p, *q, base_grad, routing_scale)
        settings = self.centroids, base_grad, routing_scale, self.caps, self.dtypes[1]
        return Part(*compiled(_round)(self.mix, *p, *q, *settings))


@functools.cache
def compiled(function: Callable) -> Callable:
    """One compiled function for all runs: its kernels are made for a configuration and kept."""
    return torch.compile(function, fullgraph=True)


def _any_number_of_rows(*tensors: Tensor | None) -> None:
    """The last chunk has fewer rows than the others, and each step other numbers: one kernel is for all of them."""
    for tensor in tensors:
        if tensor is not None:
            mark_rows_dynamic(tensor)


def _capped(product: Tensor, cap: float | None) -> Tensor:
    return softcapped(product.clone(), cap)


def _gather(hidden: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid[:, None], hidden[rows], 0)


def _base(
    product: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    cap: float | None,
    dtype: torch.dtype | None,  # of the gradient; None: the rounds add to it first
):
    p, grad = Distribution.of(_capped(product, cap)), None
    ce = p.cross_entropy(labels)
    if scale is not None:
        grad = torch.zeros_like(p.logits)
        add_label_gradient(grad, p, labels, scale)
        if dtype is not None:
            grad = before_softcap(grad, p.logits, cap).to(dtype)
    return _rows([ce, ce, p.argmax == labels]), grad, p.argmax, p.logsumexp


def _base_gradient(grad: Tensor, product: Tensor, cap: float | None, dtype: torch.dtype) -> Tensor:
    return before_softcap(grad.clone(), _capped(product, cap), cap).to(dtype)


def _round(
    mix: Mix,
    base_product: Tensor,
    argmax: Tensor,
    logsumexp: Tensor,
    product: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    scores: Tensor | None,
    centroids: Centroids | None,
    base_grad: Tensor | None,
    routing_scale: Tensor | None,
    caps: tuple,
    dtype: torch.dtype,
):
    logits = _capped(base_product, caps[0])
    p = Distribution(logits, (logits - logsumexp[:, None]).exp(), argmax, logsumexp)
    teacher = p.at(mix.temperature) if mix.distances else p
    q = Distribution.of(_capped(product, caps[1]))
    terms = p, teacher, q, labels, scale, scores, centroids, base_grad, None, routing_scale
    values, grad, routing_grad = round_terms(mix, *terms)
    if grad is not None:
        grad = before_softcap(grad, q.logits, caps[1]).to(dtype)
    return values, grad, None if routing_grad is None else routing_grad.to(dtype)
