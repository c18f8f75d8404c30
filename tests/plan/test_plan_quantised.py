"""Plans of a base that is kept in codes: bytes as counted, and the cards that released pairs fit on."""

import math

import pytest
import torch
from test_plan import configure, pairs, released  # noqa: F401 - a fixture

from joint_train.distributed.quantised import stores
from joint_train.plan.planner import GIB, Machine, count_parameters, make_plan
from joint_train.plan.suggest import changes_training, suggest
from joint_train.weights.composite import meta_pair
from joint_train.weights.folders import read_configs


def one(memory):
    return Machine(gpus=1, gpu_memory_gb=memory)


@pytest.mark.parametrize(
    ("name", "memory", "most"),
    [pytest.param("31B", 80, 38, marks=pytest.mark.slow), ("26B-A4B", 48, 30), ("E4B", 24, 12)],
)
def test_released_pairs_fit_on_one_card(name, memory, most):
    recompute = {f"activation_checkpointing.{part}": "full" for part in ("base", "drafter")}
    cfg = released(name, **{"lora.r": 16, "data.max_length": 4096, "drafter.num_steps": 4, **recompute})
    cfg.loss.memory_budget_mb, cfg.model.quantization = 256, "nf4"
    plan = make_plan(cfg, one(memory))
    assert plan.peak <= one(memory).usable and plan.peak < most * GIB, plan.memory


@pytest.mark.parametrize("shape", ["e2b", "26b_a4b"])
def test_bytes_of_codes_and_scales_are_those_of_the_weights(pairs, shape):  # noqa: F811
    cfg = configure(pairs / shape, **{"lora.r": 4})
    plain = make_plan(cfg, one(80), "cpu")
    cfg.model.quantization = "nf4"
    plan = make_plan(cfg, one(80), "cpu")
    model = meta_pair(cfg, *read_configs(cfg.model.base, cfg.model.drafter), torch.float32)
    kept = stores(model.base).values()
    saved = sum(4 * math.prod(s.shape) - s.codes.nbytes - s.scales.nbytes for s in kept)
    weights = "weights (this rank's shard)"
    assert plain.memory[weights] - plan.memory[weights] == saved > 0
    assert plan.parameters == plain.parameters and count_parameters(model) == plain.parameters
    assert plan.checkpoint == plain.checkpoint
    two = [make_plan(cfg, Machine(gpus=2), "cpu").communication["all-gather"]["layers"]]
    cfg.model.quantization = "none"
    two.append(make_plan(cfg, Machine(gpus=2), "cpu").communication["all-gather"]["layers"])
    assert two[0] < 0.45 * two[1]  # codes are gathered, beside adapters and norms


@pytest.mark.parametrize(
    ("settings", "with_codes"),
    [
        ({"lora.r": 4}, [{"model.quantization": "nf4"}]),
        ({"freeze.base": True}, [{"model.quantization": "nf4"}]),
        ({}, [{"lora.r": 16, "model.quantization": "nf4"}, {"freeze.base": True, "model.quantization": "nf4"}]),
        ({"lora.r": 4, "model.quantization": "int8"}, []),
        ({"freeze.towers": False}, []),
    ],
)
def test_codes_are_suggested_with_what_they_need(pairs, settings, with_codes):  # noqa: F811
    groups = changes_training(configure(pairs / "31b", **settings))
    offered = [change for group in groups for _, change in group if "model.quantization" in change]
    assert offered == with_codes


@pytest.mark.slow
def test_31b_on_one_card_is_suggested_in_codes():
    """With its weights on the host it would fit as it is. What else takes less memory is set, and isn't enough."""
    small = {"optim.name": "adamw_8bit", "precision.params": "bfloat16", "parallel.cpu_offload": "optimizer"}
    cfg = released("31B", **{"lora.r": 16, "data.max_length": 512, **small})
    assert next(suggest(cfg, one(48))).changes.get("model.quantization") == "nf4"
