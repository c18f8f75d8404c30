"""Plans of a base that is kept in codes: bytes as counted, and the cards that released pairs fit on."""

import math

import pytest
import torch
from test_plan import CPU, configure, released

from joint_train.distributed.quantised import stores
from joint_train.plan.planner import GIB, Machine, count_parameters, make_plan
from joint_train.plan.suggest import suggest
from joint_train.weights.composite import meta_pair
from joint_train.weights.folders import read_configs


def one(memory):
    return Machine(gpus=1, gpu_memory_gb=memory)


@pytest.mark.parametrize(
    ("name", "memory"), [("31B", 80), ("26B-A4B", 48), ("E4B", 24)]
)  # fmt: skip
def test_released_pairs_fit_on_one_card(name, memory):
    recompute = {f"activation_checkpointing.{part}": "full" for part in ("base", "drafter")}
    cfg = released(name, **{"lora.r": 16, "data.max_length": 4096, "drafter.num_steps": 4, **recompute,
                            "precision.params": "float32", "loss.memory_budget_mb": 256})  # fmt: skip
    cfg.model.quantization = "nf4"
    plan = make_plan(cfg, one(memory))
    print(name, {k: round(v / GIB, 2) for k, v in plan.memory.items()}, round(plan.peak / GIB, 1))
    assert plan.peak <= one(memory).usable
    cfg.model.quantization = "none"
    plain = make_plan(cfg, one(memory))
    assert plain.parameters == plan.parameters  # a weight is a weight, however it is kept
    assert plain.memory["weights (this rank's shard)"] > 1.9 * plan.memory["weights (this rank's shard)"]
