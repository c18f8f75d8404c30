"""Images beside text: they reach the base and not the drafter, and ranks without one don't wait for those with."""

import pytest
import torch
from configs import compose
from pairs import MM_TOKENS, build_pair
from ranks import run_ranks
from torch.distributed.fsdp import FSDPModule
from versions import trains_towers

from joint_train.distributed.mesh import init_mesh
from joint_train.distributed.parallelize import parallelize, prepare
from joint_train.errors import ConfigError
from joint_train.pair.targets import joint_targets
from joint_train.pair.visibility import attention_masks
from joint_train.train.optim import build_optimizer, update
from joint_train.weights.composite import Gemma4WithDrafter

K, LENGTH, SOFT_TOKENS, PATCH = 2, 20, 4, 4
IMAGE = MM_TOKENS["image_token_id"]
# Two handwritten digits of 8 x 8 pixels with 16 shades, from the UCI optical recognition data set.
DIGITS = [
    "005d910000dfaf5003f20b8004c008800580098004b01c7002e5ac00006da000",
    "007fd10008d6f400021dd000002fb1000001cc1000001a8000845e90007dd900",
]


def patches(digit: str) -> torch.Tensor:
    """``[16, 48]``: the digit at 16 x 16 pixels in three equal channels, cut into patches of 4 x 4."""
    image = torch.tensor([int(x, 16) for x in digit]).view(8, 8) / 15
    image = image.repeat_interleave(2, 0).repeat_interleave(2, 1)
    cut = image.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).reshape(16, PATCH * PATCH)
    return cut.repeat_interleave(3, dim=1)


def images_and_text() -> dict[str, torch.Tensor]:
    """Two rows, each with a digit before its text; a placeholder is no target."""
    ids = torch.randint(3, 240, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, 3 : 3 + SOFT_TOKENS] = IMAGE
    labels = ids.clone()
    labels[:, : 3 + SOFT_TOKENS] = -100
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    places = torch.stack([x.flatten(), y.flatten()], dim=-1).repeat(2, 1, 1)
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": torch.stack([patches(digit) for digit in DIGITS]),
        "image_position_ids": places,
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def text() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 240, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids.clone()}


def build(shape: str, towers_frozen: bool, compute: str = "float32", dtype: torch.dtype = torch.float32):
    cfg = compose()
    cfg.freeze.towers = towers_frozen
    cfg.precision.compute = compute
    base, drafter = build_pair(shape, dtype=dtype)
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=K).train()
    prepare(model, cfg)
    return model, cfg


def counts() -> torch.Tensor:
    return sum(joint_targets(batch["labels"], None, K, "serving").counts for batch in (images_and_text(), text()))


def backward(model, batch) -> torch.Tensor:
    out = model(**batch, weights=model.loss_weights(counts()))
    out.loss.backward()
    return out.loss.detach()


def sharded(rank: int, shape: str, towers_frozen: bool, compute: str = "float32"):
    model, cfg = build(shape, towers_frozen, compute)
    parallelize(model, init_mesh(cfg.parallel), cfg)
    loss = backward(model, images_and_text() if rank == 0 else text())
    torch.distributed.all_reduce(loss)
    return loss, {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("towers_frozen", [True, pytest.param(False, marks=trains_towers)])
@pytest.mark.parametrize("shape", ["multimodal", "31b"])
def test_images_on_one_rank_and_text_on_the_other(shape, towers_frozen):
    model, _ = build(shape, towers_frozen)
    loss = backward(model, images_and_text()) + backward(model, text())
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("vision_tower" in name for name in expected) == (not towers_frozen)
    sharded_loss, gradients = run_ranks(sharded, 2, shape, towers_frozen)[0]
    torch.testing.assert_close(sharded_loss, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        reference = expected.get(name, torch.zeros_like(gradient))
        assert (gradient - reference).norm() <= 1e-5 * reference.norm().clamp(min=1e-3), name
    assert expected.keys() <= gradients.keys()


def test_images_through_frozen_towers_in_bfloat16():
    """Frozen towers are whole, apart from FSDP2's casts: what they get and give is bfloat16 as in a bfloat16 model.

    Each rank's gradient is rounded to bfloat16 once, by at most 2^-9 of an entry, and so are the one process's two."""
    model, _ = build("multimodal", True, dtype=torch.bfloat16)
    images = images_and_text()
    images["pixel_values"] = images["pixel_values"].bfloat16()  # as FSDP2 casts what the base gets
    loss = backward(model, images) + backward(model, text())
    expected = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    sharded_loss, gradients = run_ranks(sharded, 2, "multimodal", True, "bfloat16")[0]
    torch.testing.assert_close(sharded_loss, loss, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys()
    error = sum((gradients[name] - g).square().sum() for name, g in expected.items())
    assert error.sqrt() <= 2**-7 * sum(g.square().sum() for g in expected.values()).sqrt()


@pytest.mark.parametrize("shape", ["multimodal", "31b"])
def test_the_base_sees_the_image_as_transformers_shows_it(shape):
    model, _ = build(shape, True)
    model.eval()
    batch = images_and_text()
    del batch["labels"]
    with torch.no_grad():
        out = model(**batch)
        reference = model.base(**batch, use_cache=False).logits
        other = model(**batch | {"pixel_values": batch["pixel_values"].flip(0)})
    torch.testing.assert_close(out.logits, reference, rtol=1e-4, atol=1e-4)
    # What comes before the image doesn't know it; what comes after does, in the drafter too, by the keys and values.
    for a, b in ((out.logits, other.logits), (out.drafter_logits[0], other.drafter_logits[0])):
        differs = (a - b).abs().amax(dim=(0, 2)) > 1e-4
        assert not differs[:3].any() and differs[3 + SOFT_TOKENS :].all()


def test_an_image_sees_itself_both_ways_on_sliding_layers_only():
    base, _ = build_pair("31b")
    config = base.config.get_text_config()
    blocks = torch.full((1, LENGTH), -1)
    blocks[0, 3:7] = 0
    masks = attention_masks(config, (1, LENGTH), torch.float32, torch.device("cpu"), None, blocks)
    assert masks["full_attention"] is None
    t, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    inside = (blocks[0][:, None] == blocks[0][None]) & (blocks[0] >= 0)
    expected = ((j <= t) | inside) & (t - j < config.sliding_window)
    assert torch.equal(masks["sliding_attention"][0, 0], expected)


def refusal(rank: int) -> list[str]:
    """What sharding says to trained towers where FSDP2 is that of torch before 2.13."""
    if hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        del FSDPModule.set_reduce_scatter_unused_params
    said = []
    for frozen in (True, False):
        model, cfg = build("multimodal", frozen)
        try:
            parallelize(model, init_mesh(cfg.parallel), cfg)
        except ConfigError as error:
            said.append(str(error))
        else:
            said.append("")
    return said


def test_trained_towers_are_refused_by_name_before_torch_2_13():
    ((frozen, trained),) = run_ranks(refusal, 1)
    assert frozen == "" and "freeze.towers=false needs torch 2.13" in trained


def towers_after_steps(rank: int, name: str) -> list[dict[str, bool]]:
    """Whether each weight moved, in a step of text, one with an image on rank 0 and one of text again."""
    model, cfg = build("multimodal", False)
    cfg.optim.name, cfg.optim.weight_decay, cfg.optim.lr = name, 0.1, 1e-2
    parallelize(model, init_mesh(cfg.parallel), cfg)
    optimizer, found = build_optimizer(model, cfg.optim), []
    for images in (False, True, False):
        optimizer.zero_grad()
        before = {n: p.detach().full_tensor().clone() for n, p in model.named_parameters() if p.requires_grad}
        backward(model, images_and_text() if images and rank == 0 else text())
        update(optimizer, model, 1.0, 1.0)
        after = {n: p.detach().full_tensor() for n, p in model.named_parameters() if p.requires_grad}
        found.append({n: not torch.equal(x, after[n]) for n, x in before.items()})
    return found


@trains_towers
@pytest.mark.parametrize("name", ["adamw", "muon", "adamw_bf16"])
def test_trained_towers_stay_as_they_are_in_steps_without_an_image(name):
    """Sharded, they have a gradient of zeros then: neither decay nor momentum may move them. No data has sound."""
    found = run_ranks(towers_after_steps, 2, name)[0]
    of_vision = {n for n in found[0] if "vision" in n}
    assert of_vision and not any("audio" in n for n in found[0])
    for moved, images in zip(found, (False, True, False), strict=True):
        assert {n for n in of_vision if moved[n]} == (of_vision if images else set())
        assert all(moved[n] for n in moved if n.endswith("q_proj.weight") and n not in of_vision)
