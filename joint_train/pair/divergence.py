"""The distances between the drafter's distribution and the base's that ``loss.drafter`` can name.

What a kind of ``loss.drafter`` maximises
-----------------------------------------
p is the base's next-token distribution (the teacher), q the drafter's, both at ``loss.temperature`` (no T^2 factor).

Sampled speculative decoding keeps a token x ~ q with probability min(1, p(x)/q(x)), so the acceptance rate is
``alpha = sum_v min(p, q) = 1 - TV(p, q)`` (Leviathan et al., arXiv 2211.17192, theorem 3.5; Chen et al., arXiv
2302.01318). Greedy decoding keeps argmax q if and only if it is a* = argmax p.

========== ================================ ===========================================================================
kind       loss of a row                    why
========== ================================ ===========================================================================
ce         -log q(data token)               likelihood of the data; right for acceptance only as far as the base has
                                            learned the data. The published joint recipe.
ce_argmax  -log q(a*)                       greedy: if argmax q is not a*, then q(a*) <= 1/2, so the probability of a
                                            rejection is at most ce_argmax / log 2
kl         KL(p || q)                       alpha >= 1 - sqrt(KL/2) (Pinsker) and alpha >= exp(-KL)/2 (Bretagnolle and
                                            Huber); its gradient q - p never vanishes before q = p
reverse_kl KL(q || p)                       the same two bounds; prefers q inside the support of p
js         (KL(p||m) + KL(q||m)) / 2,       TV(p, m) = TV(p, q)/2, with Pinsker: alpha >= 1 - sqrt(2 JS); bounded by
           m = (p + q)/2                    log 2, so hopeless rows don't dominate
tv         1 - alpha                        the acceptance rate itself; its gradient vanishes where alpha is near 0
nla        -log alpha                       log-probability that every draft of the batch is accepted; TV's gradient
                                            times 1/alpha, so it doesn't vanish (arXiv 2602.23881, "LK-alpha")
lk_hybrid  l KL(p||q) + (1-l) TV,           KL far from the base, acceptance itself near it; l is a constant to the
           l = exp(-3 alpha)                gradient (arXiv 2602.23881, "LK-lambda", eta = 3, here for each row)
========== ================================ ===========================================================================

A new kind is one entry of :data:`DISTANCES` (and its name in :data:`joint_train.config.KINDS`).
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from joint_train.pair.distribution import Distribution, dot, lazy

LK_ETA = 3.0  # as published implementations of arXiv 2602.23881 have it
SMALLEST_ALPHA = 1e-20  # below it nla's 1/alpha would overflow against its own numerator

Coefficients = Mapping[str, Tensor | float]


class Distance(NamedTuple):
    """A kind of loss that has the whole of the teacher p as its target."""

    value: Callable[["Pair"], Tensor]  # [n]
    # By which the gradients of KL(p||q), KL(q||p), JS and -alpha are multiplied: numbers, or [n] constants of the rows.
    coefficients: Callable[["Pair"], Coefficients]
    temporaries: int = 0  # [n, V] tensors that it allocates


class Pair:
    """A teacher p, a student q and what more than one kind needs of them; ``alpha`` is sum_v min(p, q), ``[n]``."""

    def __init__(self, p: Distribution, q: Distribution, alpha: Tensor):
        self.p, self.q, self.alpha = p, q, alpha

    @lazy
    def kl(self) -> Tensor:
        return _kl(self.p, self.q)

    @lazy
    def reverse_kl(self) -> Tensor:
        return _kl(self.q, self.p)

    @lazy
    def positive_alpha(self) -> Tensor:
        return self.alpha.clamp(min=SMALLEST_ALPHA)

    @lazy
    def share(self) -> Tensor:
        """lk_hybrid's weight of KL."""
        return torch.exp(-LK_ETA * self.alpha)

    @lazy
    def js(self) -> Tensor:
        """Leaves log m in ``log_mean``, for the gradient."""
        log_p, log_q = (d.logits - d.logsumexp[:, None] for d in (self.p, self.q))
        self.log_mean = torch.logaddexp(log_p, log_q).sub_(math.log(2))
        of_p, of_q = (dot(d.probs, log.sub_(self.log_mean)) for d, log in ((self.p, log_p), (self.q, log_q)))
        return (of_p + of_q) / 2


def _kl(a: Distribution, b: Distribution) -> Tensor:
    return a.negative_entropy - dot(a.probs, b.logits) + b.logsumexp


DISTANCES = {
    "kl": Distance(lambda pair: pair.kl, lambda pair: {"kl": 1.0}),
    "reverse_kl": Distance(lambda pair: pair.reverse_kl, lambda pair: {"reverse_kl": 1.0}, 1),
    "js": Distance(lambda pair: pair.js, lambda pair: {"js": 1.0}, 3),
    "tv": Distance(lambda pair: 1 - pair.alpha, lambda pair: {"alpha": 1.0}, 1),
    "nla": Distance(lambda pair: -pair.positive_alpha.log(), lambda pair: {"alpha": 1 / pair.positive_alpha}, 1),
    "lk_hybrid": Distance(
        lambda pair: pair.share * pair.kl + (1 - pair.share) * (1 - pair.alpha),
        lambda pair: {"kl": pair.share, "alpha": 1 - pair.share},
        1,
    ),
}


def temporaries(mix: Mapping[str, float]) -> int:
    """The ``[n, V]`` tensors that a mix of kinds allocates at a time."""
    return max((DISTANCES[kind].temporaries for kind in mix), default=0)


class Divergence:
    """A mix of distances of a student q from its teacher p.

    The gradient with respect to the logits of either ("own"; "other" is the other one) has one form for all kinds:
    ``own·(f - sum_v own·f) + cross·(own - other)``. The second term is that of KL(other||own). The first is that of a
    loss with derivative f by own: log(own/other) for KL(own||other), log(own/m)/2 for JS, -[own < other] for -alpha.
    Adding a constant of the row to f changes nothing, so logits serve for log-probabilities. p's gradient is q's with
    the two KL exchanged.

    Attributes:
        value: ``[n]``.
    """

    def __init__(self, mix: Mapping[str, float], p: Distribution, q: Distribution, alpha: Tensor):
        self.pair = Pair(p, q, alpha)
        self.value = sum(weight * DISTANCES[kind].value(self.pair) for kind, weight in mix.items())
        self.terms: dict[str, Tensor | float] = {}
        for kind, weight in mix.items():
            for term, coefficient in DISTANCES[kind].coefficients(self.pair).items():
                self.terms[term] = self.terms.get(term, 0.0) + weight * coefficient

    def teacher_gradient(self, scale: Tensor, out: Tensor | None) -> Tensor:
        """`scale` `[n]` times the gradient with respect to p's logits, `[n, V]`, in `out` or a new tensor."""
        return self._gradient(self.pair.p, self.pair.q, "reverse_kl", "kl", scale, out)

    def student_gradient(self, scale: Tensor, out: Tensor | None) -> Tensor:
        """`scale` `[n]` times the gradient with respect to q's logits, `[n, V]`, in `out` or a new tensor."""
        return self._gradient(self.pair.q, self.pair.p, "kl", "reverse_kl", scale, out)

    def _gradient(
        self,
        own: Distribution,
        other: Distribution,
        cross_term: str,
        ratio_term: str,
        scale: Tensor,
        out: Tensor | None,
    ) -> Tensor:
        def column(term):  # [n, 1], or None if the mix has no such term
            return (scale * self.terms[term])[:, None] if term in self.terms else None

        cross, ratio, js, overlap = column(cross_term), column(ratio_term), column("js"), column("alpha")
        if ratio is js is overlap is None:
            return torch.sub(own.probs, other.probs, out=out).mul_(cross)
        if overlap is None:
            out = torch.zeros_like(own.probs) if out is None else out.zero_()
        else:
            out = torch.mul(own.probs < other.probs, -overlap, out=out)
        if ratio is not None:
            out.add_((own.logits - other.logits).mul_(ratio))
        if js is not None:
            out.add_((own.logits - self.pair.log_mean).mul_(js / 2))
        out.sub_(dot(own.probs, out)[:, None])
        if cross is None:
            return out.mul_(own.probs)
        return out.add_(cross).mul_(own.probs).addcmul_(other.probs, cross, value=-1)
