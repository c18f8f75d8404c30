"""What a run would need, before it runs: ``python -m joint_train.plan [overrides] [--gpus 8 --gpu-memory-gb 80 …]``.

No weight is read and no GPU is used. The real joint forward, loss and backward run once on the meta device, where
tensors have a size and no contents, and every tensor is counted while it lives. Around it the plan plays FSDP2's part:
which unit's weights are gathered when, and what a gradient's reduction holds. FLOPs are counted on the way.

The weights of a released pair needn't be there: its sizes are in :mod:`joint_train.weights.released`.
"""

from typing import TYPE_CHECKING

from joint_train.lazy import lazy_names

if TYPE_CHECKING:
    from joint_train.plan.planner import Machine, Plan, make_plan

__all__ = ["Machine", "Plan", "make_plan"]

__getattr__ = lazy_names(
    __name__,
    {
        "Machine": "joint_train.plan.planner",
        "Plan": "joint_train.plan.planner",
        "make_plan": "joint_train.plan.planner",
    },
)
