"""drafter.base_grad_scale: how much of the drafter's gradient enters the base."""

import pytest
import torch
from pairs import build_pair

from joint_train.weights.composite import Gemma4WithDrafter


def gradients(scale: float, loss_weight: float = 1.0, recompute: bool = True, shape: str = "e2b"):
    """The loss and every parameter's gradient."""
    base, drafter = build_pair(shape)
    model = Gemma4WithDrafter(
        base, drafter, drafter_num_steps=3, drafter_loss_weight=loss_weight, base_grad_scale=scale,
        base_activation_checkpointing=recompute, drafter_activation_checkpointing=recompute,
    ).train()  # fmt: skip
    ids = torch.randint(3, 240, (2, 20), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", ["e2b", "31b"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scale", [0.0, 0.25])
def test_the_base_gets_its_own_gradient_and_a_share_of_the_drafters(scale, recompute, shape):
    whole_loss, whole = gradients(1.0, recompute=recompute, shape=shape)
    _, of_base_alone = gradients(1.0, loss_weight=0.0, recompute=recompute, shape=shape)
    loss, scaled = gradients(scale, recompute=recompute, shape=shape)
    assert torch.equal(loss, whole_loss)
    moved = False
    for name, gradient in scaled.items():
        if name.startswith("drafter."):
            torch.testing.assert_close(gradient, whole[name], rtol=1e-6, atol=1e-7)
        else:
            expected = of_base_alone[name] + scale * (whole[name] - of_base_alone[name])
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
            moved |= not torch.allclose(whole[name], of_base_alone[name], rtol=1e-3)
    assert moved  # the drafter's gradient does reach the base


@pytest.mark.parametrize("scale", [-0.1, 1.5])
def test_a_scale_out_of_range_is_refused(scale):
    with pytest.raises(ValueError, match="from 0 to 1"):
        Gemma4WithDrafter(*build_pair("e2b"), base_grad_scale=scale)
