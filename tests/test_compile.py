"""Compiled layers make the same losses and gradients."""

import pytest
import torch
from omegaconf import OmegaConf
from pairs import build_pair

from joint_train.config import Config
from joint_train.distributed.parallelize import prepare
from joint_train.weights.composite import Gemma4WithDrafter


@pytest.mark.slow  # the compiler takes a minute or two
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_equals_eager(checkpointing):
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        cfg = OmegaConf.structured(Config)
        cfg.parallel.compile = compiled
        cfg.activation_checkpointing.base = checkpointing
        model = Gemma4WithDrafter(*build_pair("e2b"), drafter_num_steps=2).train()
        prepare(model, cfg)
        ids = torch.randint(3, 240, (2, 20), generator=torch.Generator().manual_seed(0))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (compiled_loss, compiled_gradients) = results
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    assert gradients.keys() == compiled_gradients.keys()
    for name, gradient in gradients.items():
        assert (compiled_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm().clamp(min=1e-3), name
