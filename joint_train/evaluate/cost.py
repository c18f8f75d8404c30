"""What speculative decoding costs an engine: seconds of a verification and of a drafter's pass, by the roofline.

Each matrix product takes the longer of its arithmetic and its memory traffic at the speeds of
:class:`joint_train.plan.machine.Machine`, and no kernel takes less than :data:`KERNEL_SECONDS`. With few rows the
weights are read once whatever their number is, so verifying drafts is nearly free, until the arithmetic of all rows
takes longer. A mixture of experts reads more of them the more rows there are.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention, Gemma4TextExperts

from joint_train.distributed.parallelize import text_model
from joint_train.plan.machine import Machine

ITEMSIZE = 2  # bfloat16
# The least that a kernel of a CUDA graph takes: start, tail and the gap to the next one. Assumed.
KERNEL_SECONDS = 3e-6


class Cost(Protocol):
    """What the steps of an engine take."""

    def verify(self, rows: float, batch: int) -> float:
        """Seconds of a forward of the base over so many tokens of all of the batch's sequences together."""

    def draft(self, batch: int) -> float:
        """Seconds of a pass of the drafter, one token for each sequence."""


@dataclass
class _Work:
    """One forward: matrix products, experts, and attention with its cache."""

    products: list[tuple[int, int]] = field(default_factory=list)  # inputs, outputs
    experts: list[tuple[int, int, int]] = field(default_factory=list)  # experts, active ones, weights of each
    attention: list[tuple[int, int, int, int]] = field(default_factory=list)  # heads, K/V heads, head size, positions
    other_kernels: int = 0

    def seconds(self, rows: float, batch: int, machine: Machine) -> float:
        flops, bandwidth = machine.kernel_tflops("product") * 1e12, machine.hbm_gb_per_second * 1e9
        total = self.other_kernels * KERNEL_SECONDS
        for inputs, outputs in self.products:
            moved = ITEMSIZE * (inputs * outputs + rows * (inputs + outputs))
            total += max(2 * rows * inputs * outputs / flops, moved / bandwidth, KERNEL_SECONDS)
        for experts, active, weights in self.experts:
            # How many different ones are read, if each row chose its own evenly and independently of the others.
            read = experts * (1 - (1 - active / experts) ** rows)
            total += max(2 * rows * active * weights / flops, ITEMSIZE * read * weights / bandwidth, KERNEL_SECONDS)
        for heads, kv_heads, size, positions in self.attention:
            speed = machine.kernel_tflops(f"flash {256 if size <= 256 else 512} forward") * 1e12
            cache = batch * positions * 2 * kv_heads * size * ITEMSIZE
            total += max(4 * rows * positions * heads * size / speed, cache / bandwidth, KERNEL_SECONDS)
        return total


class Roofline:
    """The cost on one card, in bfloat16.

    Args:
        base, drafter: only their shapes are read; they may be on the meta device.
        machine: the card, see :data:`joint_train.plan.machine.CARDS`.
        context: tokens before the one that is decoded.
        factors: by batch, what measured times are of these; see :func:`measured_factors`.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        drafter: PreTrainedModel,
        machine: Machine,
        context: int,
        factors: dict[int, float] | None = None,
    ) -> None:
        self.machine, self.factors = machine, factors or {}
        self.base, self.drafter = _Work(), _Work()
        for work, model in ((self.base, base), (self.drafter, drafter)):
            parts = [text_model(model)]
            if work is self.drafter:
                parts += [getattr(model, name) for name in ("pre_projection", "post_projection")]
            for part in parts:
                _read(part, work, context)
            head: Any = model.lm_head.weight
            routing = getattr(model, "masked_embedding", None)
            rows = head.shape[0]
            if routing is not None:  # only the tokens of the top centroids are scored
                rows = routing.centroid_intermediate_top_k * rows // routing.num_centroids
                work.products.append((head.shape[1], routing.num_centroids))
            work.products.append((head.shape[1], rows))

    def verify(self, rows: float, batch: int) -> float:
        return self.base.seconds(rows, batch, self.machine) * self.factors.get(batch, 1.0)

    def draft(self, batch: int) -> float:
        return self.drafter.seconds(batch, batch, self.machine) * self.factors.get(batch, 1.0)


def _read(part: nn.Module, work: _Work, context: int) -> None:
    """Add what a module's forward does."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            work.products.append((module.in_features, module.out_features))
        elif isinstance(module, Gemma4TextExperts):
            active = part.config.top_k_experts  # type: ignore[union-attr]
            weights = module.gate_up_proj[0].numel() + module.down_proj[0].numel()
            work.experts.append((module.num_experts, int(active), weights))  # type: ignore[arg-type]
        elif isinstance(module, Gemma4TextAttention):
            heads = module.config.num_attention_heads
            positions = min(context, module.sliding_window or context)
            work.attention.append((heads, heads // module.num_key_value_groups, module.head_dim, positions))
        elif not any(True for _ in module.children()) and not isinstance(module, nn.Embedding):
            work.other_kernels += 1  # norms and activations


def measured_factors(cost: Cost, num_steps: int, measured: dict[int, tuple[float, float]]) -> dict[int, float]:
    """By batch, what an engine's time for a verification and its drafts is of the modelled one.

    Args:
        cost: the model.
        num_steps: drafts for a verification, of the engine.
        measured: by batch, its tokens/s of all requests together, and tokens per base forward.
    """
    factors = {}
    for batch, (speed, per_forward) in measured.items():
        seconds = batch * per_forward / speed
        factors[batch] = seconds / (cost.verify(batch * (1 + num_steps), batch) + num_steps * cost.draft(batch))
    return factors
