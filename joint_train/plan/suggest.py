"""The cheapest settings that fit: ``python -m joint_train.plan --suggest``.

What only takes time is tried first, together. What changes the training comes on top, in combinations, those that
change it least first.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from joint_train.config import Config, select, with_overrides
from joint_train.pair.loss import memory_budget_mb
from joint_train.plan.fits import can_adapt, can_quantise, pinned
from joint_train.plan.planner import Machine, Plan, make_plan


@dataclass(frozen=True)
class Suggestion:
    """Settings that fit, all of them overrides of the configuration, and the plan with them."""

    changes: dict[str, object]
    plan: Plan

    def __str__(self) -> str:
        return " ".join(f"{key}={str(value).lower()}" for key, value in self.changes.items()) or "as it is"


def costs_time(cfg: Config) -> list[dict[str, object]]:
    """Settings that take less memory and more time, and change no result but by rounding; the dearest first."""
    rows = cfg.data.micro_batch_size
    wanted: list[dict[str, object]] = [
        {"activation_checkpointing.offload": True},
        {"activation_checkpointing.base": "full"},
        {"parallel.reshard_after_forward": True},
        {"data.micro_batch_size": 1, "optim.grad_accum": cfg.optim.grad_accum * rows},
        {"activation_checkpointing.drafter": "layers"},
        {"loss.memory_budget_mb": min(256, memory_budget_mb(cfg.loss, "cuda"))},
    ]
    return [one for one in wanted if any(select(cfg, key) != value for key, value in one.items())]


def changes_training(cfg: Config) -> list[list[tuple[int, dict[str, object]]]]:
    """Groups of alternatives with their costs, those that take less memory last: costs are a judgement of how much each
    changes what is learnt.

    Only their order counts: each is above the sum of all before it.
    """
    name, length = cfg.optim.name, cfg.data.max_length
    smaller = {"adamw": ("adamw_bf16", "adamw_8bit"), "adamw_bf16": ("adamw_8bit",)}.get(name, ())
    shorter = [most for most in (length // 2, length // 4) if most >= 256]
    groups: list[list[tuple[int, dict[str, object]]]] = [
        [(cost, {"optim.name": value}) for cost, value in zip((1, 2), smaller, strict=False)],
        [(cost, {"data.max_length": most}) for cost, most in zip((4, 8), shorter, strict=False)],
    ]
    if cfg.precision.params != "bfloat16":
        groups.append([(16, {"precision.params": "bfloat16"})])
    # With adapters the base learns less than in full; frozen it learns nothing. In codes it also is a little another.
    codes = can_quantise(cfg)
    instead: list[tuple[int, dict[str, object]]] = []
    wanted: list[tuple[int, bool, dict[str, object]]] = [
        (32, can_adapt(cfg), {"lora.r": 16}),
        (64, not cfg.freeze.base and not cfg.lora.r, {"freeze.base": True}),
        (32, bool(cfg.freeze.base or cfg.lora.r) and codes, {}),
    ]
    for cost, possible, change in wanted:
        if possible:
            instead += [(cost, change)] if change else []
            instead += [(cost + 8, {**change, "model.quantization": "nf4"})] if codes else []
    groups.append(instead)
    if cfg.parallel.cpu_offload == "none":
        # It changes nothing in what is learnt, but a step waits for PCIe and, with all, for an update on the CPU.
        groups.append([(96, {"parallel.cpu_offload": "optimizer"})])
        if not cfg.eval.prompts:
            groups[-1].append((128, {"parallel.cpu_offload": "all"}))
    return [[(0, {}), *group] for group in groups]


def combine_changes(*changes: dict[str, object]) -> dict[str, object]:
    return {key: value for change in changes for key, value in change.items()}


def suggest(
    cfg: Config, machine: Machine, most: int = 3, progress: Callable[[], None] = lambda: None
) -> Iterator[Suggestion]:
    """Up to `most` settings that fit, as they are found, the cheapest first; none has all the changes of another.

    Args:
        progress: is called before each plan.
    """

    def plan_pinned(changes: dict[str, object]) -> Suggestion:
        """With as much recomputed as auto can choose."""
        progress()
        return Suggestion(changes, make_plan(pinned(with_overrides(cfg, changes)), machine))

    def fits(found: Suggestion) -> bool:
        return found.plan.peak <= machine.usable

    def plan_as_set(changes: dict[str, object]) -> Suggestion:
        return Suggestion(changes, make_plan(with_overrides(cfg, changes), machine))

    if fits(plan_pinned({})):
        yield plan_as_set({})
        return
    time, groups = costs_time(pinned(cfg)), changes_training(cfg)
    # The last of each group takes least memory: where all of them together don't fit, nothing does.
    if not fits(plan_pinned(combine_changes(*time, *(group[-1][1] for group in groups)))):
        return
    combinations = sorted(
        ((sum(cost for cost, _ in chosen), combine_changes(*(change for _, change in chosen)))
         for chosen in product(*groups)),
        key=lambda one: one[0],
    )  # fmt: skip
    kept: list[set] = []
    for _, change in combinations:
        if any(other <= set(change.items()) for other in kept):
            continue
        if fits(plan_pinned(combine_changes(*time, change))):
            needed = list(time)
            for setting in time:  # what it fits without is left out
                without = [other for other in needed if other is not setting]
                if fits(plan_pinned(combine_changes(*without, change))):
                    needed = without
            yield plan_as_set(combine_changes(*needed, change))
            kept.append(set(change.items()))
            if len(kept) == most:
                return
