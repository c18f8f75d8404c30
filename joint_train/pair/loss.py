"""The joint loss, a chunk of target positions at a time: no ``[P, V]`` tensor ever exists.

For each target position p the base's logits at row p-1 are made once. They give the base's own cross-entropy and they
are the teacher of every drafter round that predicts p. While a chunk's logits are alive its gradients are taken too, so
the memory is that of one chunk (``loss.memory_budget_mb``) and no logit is computed twice.

What a kind of ``loss.drafter`` maximises is told in :mod:`joint_train.pair.divergence`.

Libraries: liger-kernel's chunked distillation losses take one student and one teacher head without a softcap, and
cut-cross-entropy and liger's fused linear cross-entropy one head. All divide by a count of their own and return a
loss. Here the teacher's logits would then be made K + 1 times, and the agreement and acceptance of the pair would take
as many products with the heads again.
"""

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from joint_train.config import LossConfig, parse_drafter_loss, teacher_grad
from joint_train.pair.centroids import Centroids
from joint_train.pair.distribution import Distribution, add_label_gradient, pick
from joint_train.pair.divergence import temporaries
from joint_train.pair.heads import Head, States
from joint_train.pair.stats import DraftStats, JointStats, RoutingStats, SourceStats
from joint_train.pair.targets import JointTargets
from joint_train.pair.terms import LOSSES, MEASURES, Buffered, Compiled, Mix, Part
from joint_train.pair.tied import TiedGradient
from joint_train.pair.walk import decoding_rows
from joint_train.torch_private import has_triton


def compiles(loss_cfg: LossConfig, device_type: str) -> bool:
    """``loss.compile``, auto being yes on a GPU that has Triton."""
    if loss_cfg.compile == "auto":
        return device_type == "cuda" and has_triton()
    return bool(loss_cfg.compile)


def memory_budget_mb(loss_cfg: LossConfig, device_type: str) -> int:
    """``loss.memory_budget_mb``, by default at least 1024 on a GPU: every chunk reads the head and its fp32 gradient
    once, so a chunk of few rows waits for memory; a CPU is slow enough for 384."""
    if loss_cfg.memory_budget_mb is not None:
        return loss_cfg.memory_budget_mb
    return 384 if device_type == "cpu" else 1024


def run_budget_mb(loss_cfg: LossConfig, device_type: str, spare: float) -> int:
    """The budget of a whole run: where none is set on a GPU, an eighth of `spare` bytes, from 1024 to 4096 MB.

    A chunk's rows decide in which order sums are taken. So `spare` is what the plan leaves of the card, not what the
    allocator has free at a time: a resumed run computes what an uninterrupted one does.
    """
    budget = memory_budget_mb(loss_cfg, device_type)
    if device_type != "cuda" or loss_cfg.memory_budget_mb is not None:
        return budget
    return max(budget, min(int(spare) // 8 // 2**20, 4096))


def chunk_rows(most: int, total: int) -> int:
    """Rows of a chunk, at most `most`, so that `total` rows make equal chunks, of a multiple of 128 rows where more
    than that fit: matrix products work in tiles of 128, and a small last chunk would read the heads as a large one."""
    unit = 128 if most >= 128 else 1
    most = max(1, most // unit * unit)
    chunks = max(1, -(-total // most))
    return max(1, -(-total // (chunks * unit)) * unit)


def joint_loss(
    base_hidden: Tensor,
    base_weight: Tensor,
    drafter_hidden: Sequence[Tensor],
    drafter_weight: Tensor,
    targets: JointTargets,
    weights: Tensor,
    loss_cfg: LossConfig,
    softcap: float | None = None,
    drafter_softcap: float | None = None,
    centroids: Centroids | None = None,
    train_base: bool = True,
    groups: Tensor | None = None,
    num_groups: int = 0,
    tied: TiedGradient | None = None,
    budget_mb: int | None = None,
) -> tuple[Tensor, JointStats]:
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
        weights: `[1+K]`, see :func:`joint_train.pair.targets.sum_weights`.
        loss_cfg: the ``loss`` configuration group.
        softcap: the base's ``final_logit_softcapping`` c: logits are c·tanh(logits/c).
        drafter_softcap: the same for the drafter (transformers' drafter applies none).
        centroids: for ordered embeddings; adds ``loss.centroid_weight`` times the cross-entropy of the centroid of the
            data's token to each round's loss.
        train_base: False treats `base_hidden` and `base_weight` as constants.
        tied: takes the gradient of `base_weight` on to the look-up in the embedding tied to it, which then returns it;
            only where that look-up's backward follows, so where `base_hidden` requires a gradient.
        budget_mb: of a chunk, see :func:`run_budget_mb`; by default that of :func:`memory_budget_mb`.
        groups, num_groups: int64 `[P]` below `num_groups`, e.g. the source of each target, for the sums of each.

    Returns:
        The loss (0-dimensional), and what was measured; both on the device.
    """
    base_states, drafter_states = States([base_hidden], train_base), States(drafter_hidden)
    base = Head(base_weight, base_states, softcap, train_base)
    drafter = Head(drafter_weight, drafter_states, drafter_softcap)
    routing = None if centroids is None else Head(centroids.weight, drafter_states)
    with torch.no_grad():
        run = Pass(base, drafter, routing, centroids, targets, weights, loss_cfg, groups, num_groups, budget_mb)
        loss, stats = run.run()
        inputs = [base_weight, base_hidden, *drafter_hidden, drafter_weight]
        gradients = [base.gradient(), *base_states.grads, *drafter_states.grads, drafter.gradient()]
        if routing is not None and centroids is not None:
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


class Pass:
    """One pass over the targets. It leaves the gradients in heads and states; `run` returns the loss and the sums."""

    def __init__(self, base, drafter, routing, centroids, targets, weights, loss_cfg, groups, num_groups, budget_mb):
        self.base, self.drafter, self.routing, self.centroids = base, drafter, routing, centroids
        self.targets, self.groups, self.num_groups = targets, groups, num_groups
        self.num_steps, self.dtype, self.device = len(drafter.states.hidden), base.dtype, base.weight.device
        self.weights = weights.to(self.dtype)
        mix = parse_drafter_loss(loss_cfg)
        data_weight, argmax_weight = mix.pop("ce", 0.0), mix.pop("ce_argmax", 0.0)
        # The argmax has no derivative: only a distance between the distributions can train the teacher.
        of_teacher = teacher_grad(loss_cfg) if base.needs_backward(0) and mix else 0.0
        self.mix = Mix(mix, data_weight, argmax_weight, float(loss_cfg.temperature), of_teacher)
        self.centroid_weight, self.compile = float(loss_cfg.centroid_weight), compiles(loss_cfg, self.device.type)

        self.buffers = 5 + (of_teacher > 0)
        temporary = temporaries(mix)
        temporary += 4 if mix and self.mix.temperature != 1 else 0
        row_bytes = (self.buffers + temporary) * base.weight.shape[0] * self.dtype.itemsize
        budget = memory_budget_mb(loss_cfg, self.device.type) if budget_mb is None else budget_mb
        most = int(budget * 2**20) // row_bytes
        self.chunk = chunk_rows(most, len(targets.rows))

    def run(self) -> tuple[Tensor, JointStats]:
        rounds, total, vocabulary = self.num_steps, len(self.targets.rows), self.base.weight.shape[0]

        def zeros(*shape, dtype=self.dtype):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        # Of the base (the losses alone) and of each round: the losses, and the measures of each head of the drafter.
        heads = 2 if self.routing else 1  # what is served and, where that isn't all the tokens, all of them
        self.sums = zeros(1 + rounds, len(LOSSES) + heads * len(MEASURES))
        self.routed = RoutingStats(zeros(rounds), zeros(rounds)) if self.routing else None
        self.sources = None
        if self.groups is not None:
            self.sources = SourceStats(*(zeros(self.num_groups) for _ in fields(SourceStats)))
        # By row of the drafter; the last row takes the rounds that aren't valid.
        by_row = (self.targets.batch_rows + 1, rounds)
        self.seen = zeros(*by_row, dtype=torch.bool)
        self.agreed = [zeros(*by_row, dtype=torch.bool) for _ in range(heads)]

        caps = self.base.softcap, self.drafter.softcap
        shape = (2 if self.compile else self.buffers, min(self.chunk, total), vocabulary)
        settings = self.mix, self.centroids, caps, torch.empty(shape, dtype=self.dtype, device=self.device)
        dtypes = self.base.weight.dtype, self.drafter.weight.dtype
        terms = Compiled(*settings, dtypes) if self.compile else Buffered(*settings)
        self.walk_chunks(terms)

        losses, *measures = self.sums.split([len(LOSSES), *[len(MEASURES)] * heads], dim=1)
        of_losses = dict(zip(LOSSES, losses.unbind(1), strict=True))
        loss = (self.weights * of_losses["loss"]).sum()
        if self.routed is not None:
            loss = loss + self.centroid_weight * (self.weights[1:] * self.routed.ce).sum()
        full = self.seen[:-1].all(-1)
        drafts = [self._drafts(*found, full) for found in zip(measures, self.agreed, strict=True)]
        stats = JointStats(
            **of_losses,
            count=self.targets.counts,
            left_out=self.targets.left_out,
            full_rows=full.sum(),
            drafts=drafts[0],
            dense=drafts[1] if len(drafts) > 1 else None,
            routing=self.routed,
            sources=self.sources,
        )
        return loss, stats

    def _drafts(self, measures: Tensor, agreed: Tensor, full: Tensor) -> DraftStats:
        """Of one head of the drafter.

        Args:
            measures: ``[1+K, MEASURES]``.
            agreed: ``[rows + 1, K]``, where the round's argmax is the base's.
            full: ``[rows]``, which have all K rounds.
        """
        accepted = agreed[:-1].long().cumprod(-1).sum(-1)
        walked = full & decoding_rows(self.targets.rows, accepted)
        return DraftStats(
            **dict(zip(MEASURES, measures[1:].unbind(1), strict=True)),
            accepted=(accepted * full).sum(),
            walk_accepted=(accepted * walked).sum(),
            walk_rows=walked.sum(),
        )

    def parts(self) -> list[slice]:
        """The targets of each chunk."""
        total = len(self.targets.rows)
        return [slice(start, min(start + self.chunk, total)) for start in range(0, total, self.chunk)]

    def walk_chunks(self, terms: Buffered | Compiled) -> None:
        for part in self.parts():
            self._chunk(part, terms)

    def _chunk(self, part: slice, terms: Buffered | Compiled) -> None:
        rows, labels, valid = self.targets.rows[part], self.targets.labels[part], self.targets.valid[part]
        groups = None if self.groups is None else self.groups[part]
        mask = valid.to(self.dtype)
        scales = mask * self.weights
        base_buffer, buffer = terms.product_buffers(len(rows))

        hidden = self.base.states.gather(0, rows, valid[:, 0])
        trained = self.base.needs_backward(0)
        product = self.base.product(hidden, base_buffer)
        base = terms.base(product, labels, mask[:, 0], scales[:, 0] if trained else None)
        self._add(0, mask[:, 0], base, groups)
        teaches = self.mix.teacher_grad > 0
        if trained and not teaches:
            self.base.backward(terms.base_gradient(base.grad), hidden, 0, rows)

        for k in range(self.num_steps):
            states, ok = (rows - self.targets.offset - k).clamp(min=0), valid[:, 1 + k]
            state = self.drafter.states.gather(k, states, ok)
            scores = self.routing.product(state) if self.routing else None
            product = self.drafter.product(state, buffer)
            # The teacher's gradient is scaled like the student's, also where no student is trained.
            scale = scales[:, 1 + k] if teaches or self.drafter.needs_backward(k) else None
            found = terms.round(product, labels, mask[:, 1 + k], scale, scores, base.grad if teaches else None)
            self._add(1 + k, mask[:, 1 + k], found, groups)
            into = torch.where(ok, states, self.targets.batch_rows)
            self.seen[:, k].index_fill_(0, into, True)  # by index, True would be copied to the device: a wait
            for agreed, agree in zip(self.agreed, found.agree, strict=True):
                agreed[into, k] = agree
            if self.drafter.needs_backward(k):
                self.drafter.backward(found.grad, state, k, states)
            if scores is not None:
                centroid = self.centroids.token_centroid[labels]
                self._route(k, states, state, Distribution.of(scores), centroid, mask[:, 1 + k], scales[:, 1 + k])

        if teaches:
            self.base.backward(terms.base_gradient(base.grad), hidden, 0, rows)

    def _route(self, k, states: Tensor, state: Tensor, q: Distribution, centroid: Tensor, mask, scale: Tensor) -> None:
        """The routing loss of round k: cross-entropy of q, over the centroids, with the token's `centroid`."""
        ce, rank = q.cross_entropy(centroid), (q.logits > pick(q.logits, centroid)[:, None]).sum(-1)
        hit = rank < self.centroids.top_k
        assert self.routed is not None, "made with the routing's head"
        for total, value in ((self.routed.ce, ce), (self.routed.hit, hit)):
            total[k] += (value * mask).sum()
        if self.centroid_weight and self.routing.needs_backward(k):
            grad = torch.zeros_like(q.probs)
            add_label_gradient(grad, q, centroid, self.centroid_weight * scale)
            self.routing.backward(grad, state, k, states)

    def _add(self, index: int, mask: Tensor, part: Part, groups: Tensor | None) -> None:
        """Add what the base (0) or a round (1 + k) gives, of the rows in `mask`."""
        self.sums[index, : len(part.sums)] += part.sums
        if (of := self.sources) is not None and groups is not None:
            ce, count = (of.drafter_ce, of.drafter_count) if index else (of.base_ce, of.base_count)
            ce.index_add_(0, groups, part.ce * mask)
            count.index_add_(0, groups, mask)
