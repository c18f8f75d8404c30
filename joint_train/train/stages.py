"""When a run stops training the base, and what changes there: ``freeze.base_after``."""

from typing import Any

from torch.optim import Optimizer

from joint_train.config import Config
from joint_train.config.values import base_after
from joint_train.pair.model import JointModel
from joint_train.plan.planner import Machine, Plan, make_plan
from joint_train.plan.stages import joint_share, steps_before_frozen
from joint_train.train.optim import freeze_base, lr_factor


class Stages:
    """The steps in which both models train, and then those of the drafter alone, if there are any.

    Args:
        max_steps: the run's last step.
        plan: of the joint steps.
        saved: the ``state`` of the checkpoint that the run resumes from. What ``auto`` is stays as it was then: on
            other GPUs the plan may say otherwise.

    Attributes:
        joint_steps: after so many steps the base is frozen; ``max_steps`` if it never is.
        peak: planned peak memory of a rank in the steps that are left, in bytes.
    """

    def __init__(
        self, cfg: Config, max_steps: int, plan: Plan, machine: Machine, device_type: str, saved: dict[str, Any] | None
    ) -> None:
        self.optim, self.max_steps = cfg.optim, max_steps
        after, self.share = base_after(cfg.freeze.base_after), None
        if isinstance(after, str):
            after = self.share = (saved or {}).get("joint_share") or joint_share(cfg, machine, device_type, plan)
        self.joint_steps = steps_before_frozen(after, max_steps)
        self.alone: Plan | None = None
        if self.joint_steps < max_steps:
            self.alone = make_plan(cfg, machine, device_type, drafter_alone=True)
        joint_left = (saved or {}).get("step", 0) < self.joint_steps
        self.peak = max(p.peak for p in (plan if joint_left else self.alone, self.alone or plan) if p is not None)
        self.cost = 1.0 if self.alone is None else self.alone.flops / plan.flops  # of a step of the drafter alone

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"max_steps": self.max_steps, "joint_steps": self.joint_steps, "joint_share": self.share}

    def work(self, step: int) -> float:
        """What a run has done after a step, in joint steps: as much for the same FLOPs."""
        return min(step, self.joint_steps) + self.cost * max(0, step - self.joint_steps)

    def freeze(self, model: JointModel, optimizer: Optimizer) -> Plan:
        """Train the drafter alone from now on, between two steps; the plan of the steps that follow."""
        assert self.alone is not None, "there are steps after the joint ones"
        freeze_base(model, optimizer)
        recompute = self.alone.chosen.get("activation_checkpointing.drafter", model.drafter_recompute)
        model.drafter_recompute = str(recompute)
        return self.alone

    def lr_factors(self, step: int, frozen: bool) -> tuple[float, float]:
        """:func:`joint_train.train.optim.lr_factor` of base and drafter; 0 of a base that is frozen."""
        of_base = 0.0 if frozen else lr_factor(step, self.optim, self.joint_steps)
        return of_base, lr_factor(step, self.optim, self.max_steps, "drafter")
