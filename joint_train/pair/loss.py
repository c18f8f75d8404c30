"""The joint loss, a chunk of target positions at a time: no ``[P, V]`` tensor ever exists.

For each target position p the base's logits at row p-1 are made once. They give the base's own cross-entropy and they
are the teacher of every drafter round that predicts p. While a chunk's logits are alive its gradients are taken too, so
the memory is that of one chunk (``loss.memory_budget_mb``) and no logit is computed twice.

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

Libraries: liger-kernel's chunked distillation losses take one student and one teacher head without a softcap, and
cut-cross-entropy and liger's fused linear cross-entropy one head. All divide by a count of their own and return a
loss. Here the teacher's logits would then be made K + 1 times, and the agreement and acceptance of the pair would take
as many products with the heads again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:  # configuration checks import this module, and must not load transformers
    from joint_train.tied import TiedGradient

KINDS = ("ce", "ce_argmax", "kl", "reverse_kl", "js", "tv", "nla", "lk_hybrid")
LK_ETA = 3.0  # as published implementations of arXiv 2602.23881 have it
SMALLEST_ALPHA = 1e-20  # below it nla's 1/alpha would overflow against its own numerator
TEMPORARIES = {"reverse_kl": 1, "js": 3, "tv": 1, "nla": 1, "lk_hybrid": 1}  # [n, V] tensors that a kind allocates


# ---------------------------------------------------------------------------------------------------- configuration


def parse_drafter_loss(loss_cfg) -> dict[str, float]:
    """``loss.drafter`` as ``{kind: weight}`` without zero weights; ValueError if it isn't a kind or a mix of kinds."""
    choice = loss_cfg.drafter
    mix = {choice: 1.0} if isinstance(choice, str) else choice
    hint = f"one of {', '.join(KINDS)}, or a weighted mix of them such as {{ce: 0.1, nla: 0.9}}"
    if not isinstance(mix, Mapping) or any(kind not in KINDS for kind in mix):
        raise ValueError(f"loss.drafter={choice!r}: must be {hint}")
    for kind, weight in mix.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"loss.drafter: the weight of {kind} is {weight!r}, must be a number of 0 or more")
    mix = {kind: float(weight) for kind, weight in mix.items() if weight > 0}
    if not mix:
        raise ValueError(f"loss.drafter={choice!r} gives no loss a weight: set {hint}")
    return mix


def round_weights(loss_cfg, num_steps: int) -> list[float]:
    """``loss.round_weights`` as one number for each of the `num_steps` rounds; ValueError names the key."""
    choice = loss_cfg.round_weights
    if choice is None:
        return [1.0] * num_steps
    if isinstance(choice, Mapping):
        if set(choice) != {"decay"}:
            raise ValueError(f"loss.round_weights={choice!r}: a mapping has the one key decay, e.g. {{decay: 0.8}}")
        weights = [_number("loss.round_weights.decay", choice["decay"]) ** k for k in range(num_steps)]
    elif isinstance(choice, Sequence) and not isinstance(choice, str):
        if len(choice) != num_steps:
            raise ValueError(f"loss.round_weights has {len(choice)} numbers, drafter.num_steps is {num_steps}")
        weights = [_number(f"loss.round_weights[{k}]", weight) for k, weight in enumerate(choice)]
    else:
        raise ValueError(f"loss.round_weights={choice!r}: must be a list of drafter.num_steps numbers or {{decay: b}}")
    if not any(weights):
        raise ValueError("loss.round_weights are all 0: the drafter would not train; give a round a positive weight")
    return weights


def memory_budget_mb(loss_cfg, device_type: str) -> int:
    """``loss.memory_budget_mb``, by default 1024 on a GPU: every chunk reads the head and its fp32 gradient once, so a
    chunk of few rows waits for memory; a CPU is slow enough for 384."""
    if loss_cfg.memory_budget_mb is not None:
        return loss_cfg.memory_budget_mb
    return 384 if device_type == "cpu" else 1024


def _number(key: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{key} is {value!r}, must be a number of 0 or more")
    return float(value)


def sum_weights(counts: Tensor, rounds: Sequence[float], loss_weight: float) -> Tensor:
    """What each of the 1+K loss sums is multiplied by: 1/N_0 for the base, lambda·w_k/N_k for round k.

    Args:
        counts: `[1+K]` targets of the whole step (all ranks, all micro-batches). A count of 0 gives a weight of 0.
        rounds: w_k, from :func:`round_weights`.
        loss_weight: lambda.

    Returns:
        float32 `[1+K]`, on the device of `counts`.
    """
    scale = torch.tensor([1.0, *(loss_weight * w for w in rounds)], dtype=torch.float32).to(counts.device)
    return torch.where(counts > 0, scale / counts.clamp(min=1), 0.0)


# ---------------------------------------------------------------------------------------------------------- targets


@dataclass
class JointTargets:
    """The supervised positions of a batch, P of them, and which of the base and the K rounds each one counts for."""

    rows: Tensor  # int64 [P], base rows b*S + p - 1
    labels: Tensor  # int64 [P], target tokens
    valid: Tensor  # bool [P, 1+K], column 0 the base, column 1+k round k
    offset: int  # round k of a target is at row `rows - offset - k`
    batch_rows: int  # B*S

    @property
    def counts(self) -> Tensor:
        """int64 `[1+K]`: targets of the base and of each round."""
        return self.valid.sum(0)

    def to(self, device, non_blocking: bool = False) -> "JointTargets":
        rows, labels, valid = (x.to(device, non_blocking=non_blocking) for x in (self.rows, self.labels, self.valid))
        return JointTargets(rows, labels, valid, self.offset, self.batch_rows)


def joint_targets(labels: Tensor, document_ids: Tensor | None, num_steps: int, pairing: str) -> JointTargets:
    """Find the targets of a batch. Run it where the batch is made (CPU): P then is known without waiting for a device.

    Position p of a row is a target if ``labels[p] != -100`` and p-1 is in p's document. Round k predicts it from row
    ``p - 1 - offset - k`` (offset 1 for pairing "serving", 0 for "same_token"), if that row is in p's document too.

    Args:
        labels: int64 `[B, S]`, not shifted, -100 where nothing is supervised.
        document_ids: int64 `[B, S]`, 0 padding, else the contiguous documents of a row; None: one document a row.
        num_steps: K.
        pairing: ``serving`` or ``same_token``.
    """
    if pairing not in ("serving", "same_token"):
        raise ValueError(f"drafter.pairing={pairing!r}: must be serving or same_token")
    offset = 1 if pairing == "serving" else 0
    documents = torch.ones_like(labels) if document_ids is None else document_ids

    def in_document(back: int) -> Tensor:  # [B, S]: is the row `back` positions earlier in the same document?
        same = torch.zeros_like(labels, dtype=torch.bool)
        if back < labels.shape[1]:
            same[:, back:] = documents[:, back:] == documents[:, : labels.shape[1] - back]
        return same & (documents > 0)

    base = (labels != -100) & in_document(1)
    rounds = [base & in_document(1 + offset + k) for k in range(num_steps)]
    positions = base.flatten().nonzero().squeeze(1)
    valid = torch.stack([base, *rounds], dim=-1).flatten(0, 1)[positions]
    return JointTargets(positions - 1, labels.flatten()[positions], valid, offset, labels.numel())


# -------------------------------------------------------------------------------------------------------- centroids


@dataclass
class Centroids:
    """The routing of a drafter with ordered embeddings (`masked_embedding` of transformers' Gemma 4 assistant)."""

    weight: Tensor  # [C, H_d], `masked_embedding.centroids.weight`
    token_centroid: Tensor  # int64 [V], from :func:`token_centroids`
    top_k: int  # `centroid_intermediate_top_k`: centroids whose tokens generation scores


def token_centroids(token_ordering: Tensor, num_centroids: int) -> Tensor:
    """The centroid of each token, int64 `[V]`: ``token_ordering.view(C, V/C)`` lists the tokens of each centroid.

    Raises ValueError if `token_ordering` isn't a permutation of the vocabulary (in a drafter built from a
    configuration, not loaded, it is all zeros).
    """
    ordering = token_ordering.long().flatten()
    size = ordering.numel()
    if size % num_centroids or not torch.equal(ordering.sort().values, torch.arange(size, device=ordering.device)):
        raise ValueError(
            f"the drafter's token_ordering must hold each of its {size} tokens once, in {num_centroids} centroids of "
            "equal size: load a drafter with ordered embeddings, or set use_ordered_embeddings to false"
        )
    centroids = torch.empty_like(ordering)
    centroids[ordering] = torch.arange(size, device=ordering.device) // (size // num_centroids)
    return centroids


# ------------------------------------------------------------------------------------------------------------- loss


def joint_loss(
    base_hidden: Tensor,
    base_weight: Tensor,
    drafter_hidden: Sequence[Tensor],
    drafter_weight: Tensor,
    targets: JointTargets,
    weights: Tensor,
    loss_cfg,
    softcap: float | None = None,
    drafter_softcap: float | None = None,
    centroids: Centroids | None = None,
    train_base: bool = True,
    groups: Tensor | None = None,
    num_groups: int = 0,
    tied: "TiedGradient | None" = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``sum_i weights[i] * (loss sum of the base or of round i-1 over its targets)``, and what there is to report.

    Gradients are taken in the forward, chunk by chunk; the backward only scales them, so it can run once. Inputs that
    don't require a gradient cost nothing; under ``torch.no_grad`` there are none. Without a target the loss is 0 and
    every gradient is 0. Logits and sums are fp32 (fp64 for fp64 inputs), gradients have their input's dtype and those
    of the heads are accumulated in fp32 first.

    Args:
        base_hidden: `[B, S, H_b]`, after the final norm.
        base_weight: `[V, H_b]`, the whole (gathered) head.
        drafter_hidden: K tensors `[B, S, H_d]`, after the drafter's final norm.
        drafter_weight: `[V, H_d]`, the whole dense head.
        targets: of this batch, on the device of `base_hidden`.
        weights: `[1+K]`, see :func:`sum_weights`.
        loss_cfg: the ``loss`` configuration group.
        softcap: the base's ``final_logit_softcapping`` c: logits are c·tanh(logits/c).
        drafter_softcap: the same for the drafter (transformers' drafter applies none).
        centroids: for ordered embeddings; adds ``loss.centroid_weight`` times the cross-entropy of the centroid of the
            data's token to each round's loss.
        train_base: False treats `base_hidden` and `base_weight` as constants.
        tied: takes the gradient of `base_weight` on to the look-up in the embedding tied to it, which then returns it;
            only where that look-up's backward follows, so where `base_hidden` requires a gradient.
        groups, num_groups: int64 `[P]` below `num_groups`, e.g. the source of each target, for the `group_*` sums.

    Returns:
        The loss (0-dimensional) and detached sums, all on the device:

        ==================== ======= ====================================================================
        loss                 [1+K]   what is trained, without `weights` and without the routing loss
        ce                   [1+K]   cross-entropy with the data's token
        top1                 [1+K]   rows whose argmax is the data's token
        agree                [K]     rows whose argmax is the base's argmax
        acceptance           [K]     expected acceptance sum_v min(p, q) of sampled decoding at temperature 1
        count                [1+K]   rows in these sums
        accepted, full_rows  []      drafter rows with all K rounds valid: tokens accepted by greedy decoding
                                     (leading rounds that agree with the base), and how many such rows
        centroid_ce          [K]     with centroids: routing cross-entropy
        centroid_hit         [K]     with centroids: rows whose token's centroid is among the top k
        group_base_ce, group_drafter_ce, group_base_count, group_drafter_count: [G] with groups (rounds added)
        ==================== ======= ====================================================================
    """
    base_states, drafter_states = _States([base_hidden], train_base), _States(drafter_hidden)
    base = _Head(base_weight, base_states, softcap, train_base)
    drafter = _Head(drafter_weight, drafter_states, drafter_softcap)
    routing = None if centroids is None else _Head(centroids.weight, drafter_states)
    with torch.no_grad():
        run = _Pass(base, drafter, routing, centroids, targets, weights, loss_cfg, groups, num_groups)
        loss, stats = run.run()
        inputs = [base_weight, base_hidden, *drafter_hidden, drafter_weight]
        gradients = [base.gradient(), *base_states.grads, *drafter_states.grads, drafter.gradient()]
        if routing is not None:
            inputs, gradients = [*inputs, centroids.weight], [*gradients, routing.gradient()]
    if any(gradient is not None for gradient in gradients):
        leave = tied if base_states.grads[0] is not None else None
        loss = _WithGradients.apply(loss, gradients, leave, *inputs)
    return loss, stats


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are already there: backward multiplies them by the gradient of the loss, in place."""

    @staticmethod
    def forward(ctx, loss, gradients, tied, *inputs):
        ctx.gradients, ctx.tied = gradients, tied
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # A copy would be a second [V, H] tensor for each head; and if one were kept here, autograd would copy it too.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("joint_loss: a second backward through one forward; run the forward again")
        base_weight, *others = (g if g is None else g.mul_(grad) for g in gradients)
        if ctx.tied is not None:
            ctx.tied.waiting, base_weight = base_weight, None
        return None, None, None, base_weight, *others


class _States:
    """Hidden states `[B, S, H]` and their gradients; None where none is wanted."""

    def __init__(self, hidden: Sequence[Tensor], trained: bool = True):
        self.hidden = [h.detach().flatten(0, -2) for h in hidden]
        trained = trained and torch.is_grad_enabled()
        # Contiguous whatever h's strides are: `add` writes through a flattened view.
        self.grads = [h.new_zeros(h.shape) if trained and h.requires_grad else None for h in hidden]

    def gather(self, index: int, rows: Tensor, valid: Tensor) -> Tensor:
        """Rows `[n, H]` of state `index`. One that isn't valid reads as 0: nothing in it can reach a sum."""
        return self.hidden[index][rows].masked_fill_(~valid[:, None], 0)

    def add(self, index: int, rows: Tensor, grad: Tensor) -> None:
        """Add `grad` `[n, H]` to that of state `index`. Each valid row comes once: its own dtype is enough."""
        self.grads[index].flatten(0, -2).index_add_(0, rows, grad.to(self.grads[index].dtype))


class _Head:
    """A head, its gradient (None where none is wanted) and the states that it reads."""

    def __init__(self, weight: Tensor, states: _States, softcap: float | None = None, trained: bool = True):
        self.weight, self.states, self.softcap = weight.detach(), states, softcap
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        trained = trained and torch.is_grad_enabled() and weight.requires_grad
        self.total = weight.new_empty(weight.shape, dtype=self.dtype) if trained else None
        self.written = False

    def needs_backward(self, index: int) -> bool:
        return self.total is not None or self.states.grads[index] is not None

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Softcapped logits `[n, V]` of `hidden` `[n, H]`."""
        logits = _matmul(hidden, self.weight.t(), out)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, grad: Tensor, logits: Tensor, hidden: Tensor, index: int, rows: Tensor, scratch=None) -> None:
        """Take `grad` `[n, V]` of `logits` (overwritten) to the weight and to `rows` of state `index`, the `hidden`."""
        if self.softcap is not None:
            grad.addcmul_(grad, torch.div(logits, self.softcap, out=scratch).square_(), value=-1)
        grad = grad.to(self.weight.dtype)
        if self.total is not None:
            _add_matmul(self.total, grad.t(), hidden, beta=int(self.written))
            self.written = True
        if self.states.grads[index] is not None:
            self.states.add(index, rows, _matmul(grad, self.weight))

    def gradient(self) -> Tensor | None:
        """The weight's gradient, in the weight's dtype."""
        if self.total is None:
            return None
        return self.total.to(self.weight.dtype) if self.written else torch.zeros_like(self.weight)


def _matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, in fp32 for half-precision inputs."""
    if a.dtype.itemsize >= 4:
        return torch.mm(a, b, out=out)
    if a.is_cuda:  # tensor cores accumulate in fp32: keep what they have
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta·total + a @ b, total being fp32 for half-precision inputs; beta 0 reads nothing of total."""
    if a.dtype.itemsize >= 4:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=beta)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """sum_v a·b of each row, `[n]`, without a tensor for the products."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten()


def _pick(table: Tensor, columns: Tensor) -> Tensor:
    """``table[i, columns[i]]`` of each row i."""
    return table.gather(1, columns[:, None]).squeeze(1)


@dataclass
class _Distribution:
    """softmax(logits) of n rows."""

    logits: Tensor  # [n, V]
    probs: Tensor  # [n, V]
    argmax: Tensor  # [n]
    logsumexp: Tensor  # [n]

    @classmethod
    def of(cls, logits: Tensor, out: Tensor | None = None) -> "_Distribution":
        largest, argmax = logits.max(-1)
        probs = torch.softmax(logits, -1, out=out)
        # The largest probability is at least 1/V: it has a logarithm, where that of a rare token may be 0.
        return cls(logits, probs, argmax, largest - _pick(probs, argmax).log())

    def at(self, temperature: float) -> "_Distribution":
        return self if temperature == 1 else self.of(self.logits / temperature)

    @cached_property
    def negative_entropy(self) -> Tensor:
        return _dot(self.probs, self.logits) - self.logsumexp

    def cross_entropy(self, tokens: Tensor) -> Tensor:
        return self.logsumexp - _pick(self.logits, tokens)


class _Divergence:
    """The distance of a student q from its teacher p: the kinds of a mix that have the whole of p as their target.

    The gradient with respect to the logits of either ("own"; "other" is the other one) has one form for all kinds:
    ``own·(f - sum_v own·f) + cross·(own - other)``. The second term is that of KL(other||own). The first is that of a
    loss with derivative f by own: log(own/other) for KL(own||other), log(own/m)/2 for JS, -[own < other] for TV. Adding
    a constant of the row to f changes nothing, so logits serve for log-probabilities. p's gradient is q's with the two
    KL exchanged.
    """

    def __init__(self, mix: Mapping[str, float], p: _Distribution, q: _Distribution, alpha: Tensor):
        self.p, self.q = p, q
        self.kl, self.reverse_kl, self.js = (mix.get(kind, 0.0) for kind in ("kl", "reverse_kl", "js"))
        self.overlap = mix.get("tv", 0.0)  # -d(loss)/d(alpha)
        self.value = self.overlap * (1 - alpha)
        if weight := mix.get("nla"):
            alpha = alpha.clamp(min=SMALLEST_ALPHA)
            self.value = self.value - weight * alpha.log()
            self.overlap = self.overlap + weight / alpha
        if weight := mix.get("lk_hybrid"):
            share = weight * torch.exp(-LK_ETA * alpha)
            self.value = self.value + (weight - share) * (1 - alpha)
            self.overlap = self.overlap + weight - share
            self.kl = self.kl + share
        if "kl" in mix or "lk_hybrid" in mix:
            self.value = self.value + self.kl * self._kl(p, q)
        if "reverse_kl" in mix:
            self.value = self.value + self.reverse_kl * self._kl(q, p)
        if "js" in mix:
            log_p, log_q = (d.logits - d.logsumexp[:, None] for d in (p, q))
            self.log_mean = torch.logaddexp(log_p, log_q).sub_(math.log(2))
            self.value = self.value + self.js / 2 * sum(
                _dot(d.probs, log.sub_(self.log_mean)) for d, log in ((p, log_p), (q, log_q))
            )

    @staticmethod
    def _kl(a: _Distribution, b: _Distribution) -> Tensor:
        return a.negative_entropy - _dot(a.probs, b.logits) + b.logsumexp

    def teacher_gradient(self, scale: Tensor, out: Tensor) -> Tensor:
        """`scale` `[n]` times the gradient with respect to p's logits, `[n, V]`."""
        return self._gradient(self.p, self.q, self.reverse_kl, self.kl, scale, out)

    def student_gradient(self, scale: Tensor, out: Tensor) -> Tensor:
        """`scale` `[n]` times the gradient with respect to q's logits, `[n, V]`."""
        return self._gradient(self.q, self.p, self.kl, self.reverse_kl, scale, out)

    def _gradient(self, own: _Distribution, other: _Distribution, cross, ratio, scale: Tensor, out: Tensor) -> Tensor:
        def column(coefficient):  # [n, 1], or None if the mix has no such term
            is_zero = not isinstance(coefficient, Tensor) and coefficient == 0
            return None if is_zero else (scale * coefficient)[:, None]

        cross, ratio, js, overlap = column(cross), column(ratio), column(self.js / 2), column(self.overlap)
        if ratio is js is overlap is None:
            return torch.sub(own.probs, other.probs, out=out).mul_(cross)
        if overlap is None:
            out.zero_()
        else:
            torch.mul(own.probs < other.probs, -overlap, out=out)
        if ratio is not None:
            out.add_((own.logits - other.logits).mul_(ratio))
        if js is not None:
            out.add_((own.logits - self.log_mean).mul_(js))
        out.sub_(_dot(own.probs, out)[:, None])
        if cross is None:
            return out.mul_(own.probs)
        return out.add_(cross).mul_(own.probs).addcmul_(other.probs, cross, value=-1)


def _overlap(p: _Distribution, q: _Distribution, scratch: Tensor) -> Tensor:
    """alpha = sum_v min(p, q), `[n]`."""
    return torch.minimum(p.probs, q.probs, out=scratch).sum(-1)


def _add_label_gradient(grad: Tensor, q: _Distribution, tokens: Tensor, scale: Tensor) -> None:
    """grad += scale · the gradient of -log q(token) with respect to q's logits; `scale` is `[n]`."""
    grad.addcmul_(q.probs, scale[:, None]).scatter_add_(1, tokens[:, None], -scale[:, None])


class _Pass:
    """One pass over the targets. It leaves the gradients in heads and states; `run` returns the loss and the sums."""

    def __init__(self, base, drafter, routing, centroids, targets, weights, loss_cfg, groups, num_groups):
        self.base, self.drafter, self.routing, self.centroids = base, drafter, routing, centroids
        self.targets, self.groups, self.num_groups = targets, groups, num_groups
        self.num_steps, self.dtype, self.device = len(drafter.states.hidden), base.dtype, base.weight.device
        self.weights = weights.to(self.dtype)
        self.mix = parse_drafter_loss(loss_cfg)
        self.data_weight, self.argmax_weight = self.mix.pop("ce", 0.0), self.mix.pop("ce_argmax", 0.0)
        self.temperature = float(loss_cfg.temperature)
        self.centroid_weight = float(loss_cfg.centroid_weight)
        # The argmax has no derivative: only a distance between the distributions can train the teacher.
        self.teacher_grad = bool(loss_cfg.teacher_grad) and base.needs_backward(0) and bool(self.mix)

        self.buffers = 5 + self.teacher_grad
        temporary = max((TEMPORARIES.get(kind, 0) for kind in self.mix), default=0)
        temporary += 4 if self.mix and self.temperature != 1 else 0
        row_bytes = (self.buffers + temporary) * base.weight.shape[0] * self.dtype.itemsize
        self.chunk = max(1, int(memory_budget_mb(loss_cfg, self.device.type) * 2**20) // row_bytes)

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        rounds, total, vocabulary = self.num_steps, len(self.targets.rows), self.base.weight.shape[0]

        def zeros(*shape, dtype=self.dtype):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        sizes = {"loss": 1 + rounds, "ce": 1 + rounds, "top1": 1 + rounds, "agree": rounds, "acceptance": rounds}
        if self.routing:
            sizes |= {"centroid_ce": rounds, "centroid_hit": rounds}
        if self.groups is not None:
            sums = ("group_base_ce", "group_drafter_ce", "group_base_count", "group_drafter_count")
            sizes |= dict.fromkeys(sums, self.num_groups)
        self.stats = {name: zeros(size) for name, size in sizes.items()}
        # By row of the drafter; the last row takes the rounds that aren't valid.
        self.agreed, self.seen = (zeros(self.targets.batch_rows + 1, rounds, dtype=torch.bool) for _ in range(2))

        shape = (self.buffers, min(self.chunk, total), vocabulary)
        buffers = torch.empty(shape, dtype=self.dtype, device=self.device)
        for start in range(0, total, self.chunk):
            stop = min(start + self.chunk, total)
            self._chunk(slice(start, stop), buffers[:, : stop - start])

        full = self.seen[:-1].all(-1)
        accepted = self.agreed[:-1].to(self.dtype).cumprod(-1).sum(-1)
        loss = (self.weights * self.stats["loss"]).sum()
        if self.routing:
            loss = loss + self.centroid_weight * (self.weights[1:] * self.stats["centroid_ce"]).sum()
        self.stats |= {"count": self.targets.counts, "accepted": (accepted * full).sum(), "full_rows": full.sum()}
        return loss, self.stats

    def _chunk(self, part: slice, buffers: Tensor) -> None:
        rows, labels, valid = self.targets.rows[part], self.targets.labels[part], self.targets.valid[part]
        groups = None if self.groups is None else self.groups[part]
        mask = valid.to(self.dtype)
        scales = mask * self.weights
        base_logits, base_probs, logits, probs, grad = buffers[:5]
        base_grad = buffers[5] if self.teacher_grad else grad

        hidden = self.base.states.gather(0, rows, valid[:, 0])
        p = _Distribution.of(self.base.logits(hidden, base_logits), base_probs)
        ce = p.cross_entropy(labels)
        self._add(0, mask[:, 0], loss=ce, ce=ce, top1=p.argmax == labels)
        self._add_groups("base", groups, mask[:, 0], ce)
        if self.base.needs_backward(0):
            _add_label_gradient(base_grad.zero_(), p, labels, scales[:, 0])
            if not self.teacher_grad:
                self.base.backward(base_grad, base_logits, hidden, 0, rows, scratch=logits)

        teacher = p.at(self.temperature) if self.mix else p
        for k in range(self.num_steps):
            states, ok = (rows - self.targets.offset - k).clamp(min=0), valid[:, 1 + k]
            mask_k, scale = mask[:, 1 + k], scales[:, 1 + k]
            state = self.drafter.states.gather(k, states, ok)
            q = _Distribution.of(self.drafter.logits(state, logits), probs)
            ce, alpha, agree = q.cross_entropy(labels), _overlap(p, q, grad), q.argmax == p.argmax
            loss = self.data_weight * ce + self.argmax_weight * q.cross_entropy(p.argmax)
            if self.mix:
                student = q.at(self.temperature)
                alpha_t = alpha if student is q else _overlap(teacher, student, grad)
                distance = _Divergence(self.mix, teacher, student, alpha_t)
                loss = loss + distance.value
                if self.teacher_grad:
                    base_grad.add_(distance.teacher_gradient(scale / self.temperature, grad))

            self._add(1 + k, mask_k, loss=loss, ce=ce, top1=q.argmax == labels)
            self._add(k, mask_k, agree=agree, acceptance=alpha)
            self._add_groups("drafter", groups, mask_k, ce)
            into = torch.where(ok, states, self.targets.batch_rows)
            self.seen[into, k], self.agreed[into, k] = True, agree

            if self.drafter.needs_backward(k):
                if self.mix:
                    distance.student_gradient(scale / self.temperature, grad)
                else:
                    grad.zero_()
                for weight, tokens in ((self.data_weight, labels), (self.argmax_weight, p.argmax)):
                    if weight:
                        _add_label_gradient(grad, q, tokens, weight * scale)
                self.drafter.backward(grad, logits, state, k, states, scratch=probs)
            if self.routing:
                self._route(k, states, state, self.centroids.token_centroid[labels], mask_k, scale)

        if self.teacher_grad:
            self.base.backward(base_grad, base_logits, hidden, 0, rows, scratch=logits)

    def _route(self, k: int, states: Tensor, state: Tensor, centroid: Tensor, mask: Tensor, scale: Tensor) -> None:
        """The routing loss of round k: cross-entropy of the centroid logits with the token's `centroid`."""
        q = _Distribution.of(self.routing.logits(state))
        ce, rank = q.cross_entropy(centroid), (q.logits > _pick(q.logits, centroid)[:, None]).sum(-1)
        self._add(k, mask, centroid_ce=ce, centroid_hit=rank < self.centroids.top_k)
        if self.centroid_weight and self.routing.needs_backward(k):
            grad = torch.zeros_like(q.probs)
            _add_label_gradient(grad, q, centroid, self.centroid_weight * scale)
            self.routing.backward(grad, q.logits, state, k, states)

    def _add(self, index: int, mask: Tensor, **values: Tensor) -> None:
        """Add to entry `index` of each named sum the values `[n]` of the rows in `mask`."""
        for name, value in values.items():
            self.stats[name][index] += (value * mask).sum()

    def _add_groups(self, model: str, groups: Tensor | None, mask: Tensor, ce: Tensor) -> None:
        if groups is not None:
            self.stats[f"group_{model}_ce"].index_add_(0, groups, ce * mask)
            self.stats[f"group_{model}_count"].index_add_(0, groups, mask)
