"""What a step measures: sums that add up over micro-batches and ranks, and the named metrics that they amount to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sums:
    """Tensors of sums by field. A field may hold further sums, or None where there is nothing of its kind."""

    def map(self, function: Callable[..., Tensor], *others: Self) -> Self:
        """The same type with ``function(tensor, *those of the others)`` in the place of each tensor, in one order.

        Raises:
            ValueError: if one has what another lacks.
        """
        values: dict[str, Any] = {}
        for field in fields(self):
            first, *rest = (getattr(sums, field.name) for sums in (self, *others))
            if any((other is None) != (first is None) for other in rest):
                raise ValueError(f"{type(self).__name__}.{field.name} is there in some of the sums only.")
            if isinstance(first, Sums):
                values[field.name] = first.map(function, *rest)
            else:
                values[field.name] = None if first is None else function(first, *rest)
        return type(self)(**values)

    def __add__(self, other: Self) -> Self:
        """The sums of both, on the device: nothing waits for it."""
        return self.map(torch.add, other)

    def named(self) -> dict[str, Tensor]:
        """Each tensor by its field, of the sums in a field as ``field.name``."""
        found: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Sums):
                found |= {f"{field.name}.{name}": tensor for name, tensor in value.named().items()}
            elif value is not None:
                found[field.name] = value
        return found

    def reduced(self, all_reduce: Callable[[Tensor], Any]) -> Self:
        """The sums over all ranks, as float64 on the CPU. Waits for the device.

        Args:
            all_reduce: adds a tensor up over the ranks in place; it is called once, with all sums in one float64
                tensor ``[N]`` on their device. Every rank must have sums of the same fields and shapes.
        """
        tensors = list(self.named().values())
        flat = torch.cat([tensor.double().flatten() for tensor in tensors])
        all_reduce(flat)
        parts = iter(flat.cpu().split([tensor.numel() for tensor in tensors]))
        return self.map(lambda tensor: next(parts).view(tensor.shape))


@dataclass(frozen=True)
class DraftStats(Sums):
    """How drafts from one head fare.

    Attributes:
        agree: ``[K]``, targets of each round where the most likely token is the base's.
        acceptance_argmax: ``[K]``, p(argmax q): how often sampling at temperature 1 accepts the most likely token.
        acceptance_sampled: ``[K]``, sum_v min(p, q): how often it accepts a draft that is a sample of q.
        accepted: ``[]``, tokens that greedy decoding accepts (leading rounds that agree with the base) at the rows
            where all K rounds have a target.
        walk_accepted, walk_rows: ``[]``, the same over those of these rows that decoding of the text visits, see
            :func:`joint_train.pair.walk.decoding_rows`, and how many they are.
    """

    agree: Tensor
    acceptance_argmax: Tensor
    acceptance_sampled: Tensor
    accepted: Tensor
    walk_accepted: Tensor
    walk_rows: Tensor


@dataclass(frozen=True)
class RoutingStats(Sums):
    """The routing of ordered embeddings.

    Attributes:
        ce: ``[K]``, cross-entropy of the centroid of the data's token.
        hit: ``[K]``, targets whose centroid is among the top k.
    """

    ce: Tensor
    hit: Tensor


@dataclass(frozen=True)
class SourceStats(Sums):
    """Of each of G sources of data.

    Attributes:
        base_ce, base_count: ``[G]``, the base's cross-entropy and targets.
        drafter_ce, drafter_count: ``[G]``, those of the drafter, all rounds together.
        agree: ``[G]``, those of its targets where its most likely token, as engines serve it, is the base's.
    """

    base_ce: Tensor
    drafter_ce: Tensor
    base_count: Tensor
    drafter_count: Tensor
    agree: Tensor


@dataclass(frozen=True)
class JointStats(Sums):
    """What the joint loss measures, detached and on its device; index 0 of ``[1+K]`` is the base, 1 + k is round k.

    Attributes:
        loss: ``[1+K]``, what is trained, without weights and without the routing loss.
        ce: ``[1+K]``, cross-entropy with the data's token.
        top1: ``[1+K]``, targets where the most likely token is the data's.
        count: ``[1+K]`` int64, targets in these sums.
        left_out: ``[]`` int64, targets of rounds that aren't among them, as decoding never visits their rows.
        full_rows: ``[]`` int64, rows of the drafter where all K rounds have a target.
        drafts: of the head that engines serve: with ordered embeddings q over the tokens of the top k centroids (see
            :func:`joint_train.pair.centroids.routed`), otherwise the dense head.
        dense: with ordered embeddings, what ``drafts`` would be if every token were a candidate.
        routing: with ordered embeddings.
        sources: where targets have a source each.
    """

    loss: Tensor
    ce: Tensor
    top1: Tensor
    count: Tensor
    left_out: Tensor
    full_rows: Tensor
    drafts: DraftStats
    dense: DraftStats | None = None
    routing: RoutingStats | None = None
    sources: SourceStats | None = None

    def means(self, source_names: Sequence[str] = (), source_adapters: Sequence[str | None] = ()) -> dict[str, float]:
        """The metrics by name (see :data:`joint_train.metrics.METRICS`), of sums that are on the CPU.

        A mean over nothing is NaN. The mean over the rounds is that of the rounds that have targets.

        Args:
            source_names: of the G sources; those without a target of a model have no mean of it.
            source_adapters: of each of them the adapter that the base had on it; its means are over its sources.
        """
        count, rounds = self.count.double(), self.count[1:] > 0  # rounds: those that have targets
        loss, ce, left_out = self.loss / count, self.ce / count, self.left_out.double()
        means = {
            "base_loss": loss[0],
            "drafter_loss": loss[1:][rounds].mean(),
            "drafter_ce": ce[1:][rounds].mean(),
            "base_accuracy": self.top1[0] / count[0],
            "drafter_targets_left_out": left_out / (left_out + count[1:].sum()).clamp(min=1),
        }
        means |= _of_rounds("drafter_loss", loss[1:]) | _of_rounds("drafter_ce", ce[1:])
        for prefix, drafts in (("", self.drafts), ("dense_", self.dense)):
            if drafts is not None:
                means |= _of_rounds(f"{prefix}agreement", drafts.agree / count[1:])
                means |= _of_rounds(f"{prefix}acceptance_argmax", drafts.acceptance_argmax / count[1:])
                means |= _of_rounds(f"{prefix}acceptance_sampled", drafts.acceptance_sampled / count[1:])
                means[f"{prefix}accepted_length_expected"] = 1 + drafts.accepted / self.full_rows
                means[f"{prefix}accepted_length_walked"] = 1 + drafts.walk_accepted / drafts.walk_rows
        if self.routing is not None:
            means |= _of_rounds("centroid_hit", self.routing.hit / count[1:])
        if (of := self.sources) is not None:
            groups: dict[str, list[int]] = {}
            for i, adapter in enumerate(source_adapters):
                if adapter is not None:
                    groups.setdefault(f"adapter/{adapter}", []).append(i)
            for name, group in [*((name, [i]) for i, name in enumerate(source_names)), *groups.items()]:
                base_ce, drafter_ce, base_count, drafter_count, agree = (x[group].sum() for x in of.named().values())
                if base_count > 0:
                    means[f"{name}/base_ce"] = base_ce / base_count
                if drafter_count > 0:
                    means[f"{name}/drafter_ce"] = drafter_ce / drafter_count
                    means[f"{name}/agreement"] = agree / drafter_count
                means[f"{name}/targets"] = base_count
        return {name: mean.item() for name, mean in means.items()}


def _of_rounds(name: str, values: Tensor) -> dict[str, Tensor]:
    """Each of ``[K]`` by the name of its round."""
    return {f"{name}_{k}": value for k, value in enumerate(values)}
