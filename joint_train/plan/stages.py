"""The two stages of a run with ``freeze.base_after``: both models, then the drafter alone."""

from joint_train.config import Config, with_overrides
from joint_train.plan.machine import Machine
from joint_train.plan.planner import Plan, make_plan


def joint_share(cfg: Config, machine: Machine, device_type: str = "cuda", joint: Plan | None = None) -> float:
    """The share of a run's steps in which both models train, so that with the drafter alone in the others the run has
    the FLOPs of training one after the other: the base for as many steps, and then the drafter on it for as many.

    Args:
        joint: the plan of the joint steps, if it is there already.
    """
    joint = joint or make_plan(cfg, machine, device_type)
    cfg = with_overrides(cfg, joint.chosen)
    base = make_plan(cfg, machine, device_type, base_alone=True).flops
    drafter = make_plan(cfg, machine, device_type, drafter_alone=True).flops
    saved = max(0, base + drafter - joint.flops) / drafter  # steps of the drafter alone for each joint step
    return 1 / (1 + saved)


def steps_before_frozen(after: float | None, max_steps: int) -> int:
    """In how many steps of a run the base is trained.

    Args:
        after: ``freeze.base_after`` as a number of steps (an integer), a share of ``max_steps``, or None.
    """
    if after is None or isinstance(after, int):
        return min(max_steps, after or max_steps)
    return max(1, round(after * max_steps))
