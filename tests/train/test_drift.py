"""How far the base has moved, on meshes where some weights are sharded, some replicated and some whole."""

import pytest
import torch
from configs import compose
from pairs import build_pair
from ranks import run_ranks

from joint_train.distributed.mesh import init_mesh
from joint_train.distributed.parallelize import parallelize, prepare
from joint_train.distributed.placement import local_tensor
from joint_train.pair.targets import joint_targets
from joint_train.train.diagnostics import BaseDrift
from joint_train.weights.composite import Gemma4WithDrafter


def drift(rank: int, replicas: int) -> tuple[float, float]:
    """As measured after every trained weight of the base has grown by half, and by the definition."""
    cfg = compose()
    cfg.parallel.dp_replicate = replicas
    base, drafter = build_pair("multimodal")
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=1).train()
    prepare(model, cfg)
    frozen, trained = (
        sum(p.square().sum().item() for p in base.parameters() if p.requires_grad == wanted) for wanted in (False, True)
    )
    assert frozen > 0.1 * trained
    parallelize(model, init_mesh(cfg.parallel), cfg)
    ids = torch.randint(3, 240, (1, 8), generator=torch.Generator().manual_seed(0))
    found = BaseDrift(model, {"input_ids": ids}, joint_targets(ids, None, 1, "serving"))
    with torch.no_grad():
        for p in model.base.parameters():
            if p.requires_grad:
                local_tensor(p).mul_(1.5)
    return found.measure()["base_drift"], (0.25 * trained / (frozen + trained)) ** 0.5


@pytest.mark.parametrize("replicas", [1, 2])
def test_every_weight_counts_once(replicas):
    for measured, expected in run_ranks(drift, 2, replicas):
        assert measured == pytest.approx(expected, rel=1e-3)
