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

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from joint_train.config import LossConfig, parse_drafter_loss, teacher_grad
from joint_train.pair.centroids import Centroids
from joint_train.pair.divergence import temporaries
from joint_train.pair.heads import Head, States
from joint_train.pair.stats import DraftStats, JointStats, RoutingStats, SourceStats
from joint_train.pair.targets import JointTargets
from joint_train.pair.terms import LOSSES, MEASURES, ROUTING, Buffered, Compiled, Mix
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
        settings = float(loss_cfg.temperature), of_teacher, float(loss_cfg.centroid_weight)
        self.mix, self.compile = Mix(mix, data_weight, argmax_weight, *settings), compiles(loss_cfg, self.device.type)

        # [n, V] tensors: compiled, two products and a gradient; kernels make the rest where they read it.
        self.buffers = (2 if self.compile else 5) + (of_teacher > 0)
        temporary = 1 if self.compile else temporaries(mix) + (4 if mix and self.mix.temperature != 1 else 0)
        row_bytes = (self.buffers + temporary) * base.weight.shape[0] * self.dtype.itemsize
        budget = memory_budget_mb(loss_cfg, self.device.type) if budget_mb is None else budget_mb
        most = int(budget * 2**20) // row_bytes
        self.chunk = chunk_rows(most, len(targets.rows))

    def run(self) -> tuple[Tensor, JointStats]:
        rounds, total, vocabulary = self.num_steps, len(self.targets.rows), self.base.weight.shape[0]
        # Of the base and of each round, for all targets: what a chunk needs are then slices. A tensor each, so that
        # kernels find them aligned.
        self.valid = [valid.contiguous() for valid in self.targets.valid.unbind(1)]
        self.scales = [valid * weight for valid, weight in zip(self.valid, self.weights.unbind(), strict=True)]
        if (given := self.targets.token_weights) is not None:
            self.scales = [scale * given.to(scale.dtype) for scale in self.scales]
        drafts = [(self.targets.rows - self.targets.offset - k).clamp(min=0) for k in range(rounds)]
        self.rows = [self.targets.rows, *drafts]
        self.values: list[list[Tensor]] = [[] for _ in self.rows]  # of each chunk, as `Part.values`

        caps = self.base.softcap, self.drafter.softcap
        shape = (2 if self.compile else self.buffers, min(self.chunk, total), vocabulary)
        settings = self.mix, self.centroids, caps, torch.empty(shape, dtype=self.dtype, device=self.device)
        dtypes = self.base.weight.dtype, self.drafter.weight.dtype
        self.walk_chunks(Compiled(*settings, dtypes) if self.compile else Buffered(*settings))
        return self._totals()

    def _totals(self) -> tuple[Tensor, JointStats]:
        """The loss, and the sums of what the chunks gave."""
        heads = 2 if self.routing else 1  # what is served and, where that isn't all the tokens, all of them
        numbers = [len(LOSSES), *[len(MEASURES)] * heads, *([len(ROUTING)] if self.routing else [])]
        valid, total = self.targets.valid.t()[1:], len(self.targets.rows)  # [K, P]

        def empty(*shape):
            return torch.empty(shape, dtype=self.dtype, device=self.device)

        base = torch.cat([empty(numbers[0], 0), *self.values[0]], 1) * self.valid[0]  # [LOSSES, P]
        rounds = [torch.cat([empty(sum(numbers), 0), *found], 1)[None] for found in self.values[1:]]
        values = torch.cat([empty(0, sum(numbers), total), *rounds]) * valid[:, None]
        if (given := self.targets.token_weights) is not None:  # what is minimised has them, the measures don't
            given = given.to(self.dtype)
            base[0] *= given
            values[:, 0] *= given
            if self.routing:
                values[:, -len(ROUTING)] *= given

        of_rounds, *measures = values.sum(-1).split(numbers, dim=1)
        losses = torch.cat([base.sum(-1)[None], of_rounds])
        of_losses = dict(zip(LOSSES, losses.unbind(1), strict=True))
        loss = (self.weights * of_losses["loss"]).sum()
        routed = RoutingStats(*measures.pop().unbind(1)) if self.routing else None
        if routed is not None:
            loss = loss + self.mix.centroid_weight * (self.weights[1:] * routed.ce).sum()

        # By row of the drafter; the last row takes the rounds that aren't valid.
        into = torch.where(valid, torch.stack(self.rows)[1:], self.targets.batch_rows).t()

        def by_row(found: Tensor) -> Tensor:
            made = torch.zeros(self.targets.batch_rows + 1, self.num_steps, dtype=torch.bool, device=self.device)
            return made.scatter_(0, into, found.t())[:-1]

        full = by_row(valid).all(-1)
        agreed = [by_row(values[:, len(LOSSES) + i * len(MEASURES)] > 0) for i in range(heads)]
        drafts = [self._drafts(*found, full) for found in zip(measures, agreed, strict=True)]
        stats = JointStats(
            **of_losses,
            count=self.targets.counts,
            left_out=self.targets.left_out,
            full_rows=full.sum(),
            drafts=drafts[0],
            dense=drafts[1] if len(drafts) > 1 else None,
            routing=routed,
            sources=self._sources(base[1], values[:, 1].sum(0), valid.sum(0), values[:, len(LOSSES)].sum(0)),
        )
        return loss, stats

    def _sources(self, base_ce: Tensor, drafter_ce: Tensor, drafter_count: Tensor, agree: Tensor) -> SourceStats | None:
        """The sums of each source, from those of each target, ``[P]``."""
        if self.groups is None:
            return None
        of_targets = base_ce, drafter_ce, self.valid[0], drafter_count, agree
        zeros = torch.zeros(self.num_groups, dtype=self.dtype, device=self.device)
        return SourceStats(*(zeros.index_add(0, self.groups, found.to(self.dtype)) for found in of_targets))

    def _drafts(self, measures: Tensor, agreed: Tensor, full: Tensor) -> DraftStats:
        """Of one head of the drafter.

        Args:
            measures: ``[K, MEASURES]``.
            agreed: ``[rows, K]``, where the round's argmax is the base's.
            full: ``[rows]``, which have all K rounds.
        """
        accepted = agreed.long().cumprod(-1).sum(-1)
        walked = full & decoding_rows(self.targets.rows, accepted)
        return DraftStats(
            **dict(zip(MEASURES, measures.unbind(1), strict=True)),
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
        labels, rows, valid = self.targets.labels[part], self.rows[0][part], self.valid[0][part]
        base_buffer, buffer = terms.product_buffers(len(labels))

        hidden = terms.gather(self.base.states.hidden[0], rows, valid)
        trained = self.base.needs_backward(0)
        product = self.base.product(hidden, base_buffer)
        base = terms.base(product, labels, self.scales[0][part] if trained else None)
        self.values[0].append(base.values)
        teaches = self.mix.teacher_grad > 0
        if trained and not teaches:
            self._base_backward(terms, base.grad, hidden, rows)
            base = base._replace(grad=None)  # its memory is the rounds'

        for k in range(self.num_steps):
            states, valid, scale = (of[1 + k][part] for of in (self.rows, self.valid, self.scales))
            state = terms.gather(self.drafter.states.hidden[k], states, valid)
            scores = self.routing.product(state) if self.routing else None
            product = self.drafter.product(state, buffer)
            # The teacher's gradient is scaled like the student's, also where no student is trained.
            wanted = scale if teaches or self.drafter.needs_backward(k) else None
            routes = self.routing and self.mix.centroid_weight and self.routing.needs_backward(k)
            of_routing = scale if routes else None
            found = terms.round(product, labels, wanted, scores, base.grad if teaches else None, of_routing)
            self.values[1 + k].append(found.values)
            grad = self.drafter.backward(found.grad, state, k) if self.drafter.needs_backward(k) else None
            if found.routing_grad is not None:
                grad = self.routing.backward(found.routing_grad, state, k, grad)
            self.drafter.states.add(k, states, grad)
            del found, grad

        if teaches:
            self._base_backward(terms, base.grad, hidden, rows)

    def _base_backward(self, terms: Buffered | Compiled, grad: Tensor | None, hidden: Tensor, rows: Tensor) -> None:
        self.base.states.add(0, rows, self.base.backward(terms.base_gradient(grad), hidden, 0))
