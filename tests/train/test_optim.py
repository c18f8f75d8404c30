"""AdamW's groups, the schedule, clipping over both models, and steps that aren't taken."""

import math

import pytest
import torch
from pairs import build_pair

from joint_train.config.schema import OptimConfig
from joint_train.train.optim import build_optimizer, lr_factor, total_norm, update
from joint_train.weights.composite import Gemma4WithDrafter


def config(**values):
    return OptimConfig(**values)


@pytest.fixture
def model():
    base, drafter = build_pair("e2b")
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=2).train()
    ids = torch.randint(3, 240, (2, 12), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    return model


def test_groups(model):
    optimizer = build_optimizer(model, config(lr=0.1, drafter_lr=0.2, weight_decay=0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert id(p) not in seen
            seen[id(p)] = (group["lr"], group["weight_decay"])
    assert seen.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    for key, (lr, decay) in seen.items():
        name = names[key]
        assert lr == (0.1 if name.startswith("base.") else 0.2), name
        customary = "norm" in name or "embed_tokens" in name or name.endswith("bias")
        assert decay == (0.0 if customary else 0.3), name


def test_schedule():
    cfg = config(warmup_steps=10, min_lr_ratio=0.1, schedule="cosine")
    warm = [lr_factor(step, cfg, 100) for step in range(10)]
    assert warm == pytest.approx([(step + 1) / 11 for step in range(10)])  # in equal parts up to 1
    assert lr_factor(10, cfg, 100) == 1
    half = 10 + 89 / 2  # of the way from the peak, which is step 10's, to the last step, which is 99
    nearly = 0.1 + 0.9 / 2 * (1 + math.cos(math.pi * 44 / 89))
    assert lr_factor(54, cfg, 100) == pytest.approx(nearly) and lr_factor(half, cfg, 100) == pytest.approx(0.55)
    linear = config(warmup_steps=10, min_lr_ratio=0, schedule="linear")
    assert lr_factor(half, linear, 100) == pytest.approx(0.5)
    linear.min_lr_ratio = 0.1
    assert lr_factor(half, linear, 100) == pytest.approx(0.55)
    assert lr_factor(99, config(warmup_steps=10, schedule="constant"), 100) == 1
    assert lr_factor(0, config(warmup_steps=0), 100) == 1


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [2, 10, 100, 1000])
@pytest.mark.parametrize("warmup", [0, 1, 8])
def test_the_last_step_has_the_last_learning_rate(schedule, steps, warmup):
    cfg = config(warmup_steps=warmup, min_lr_ratio=0.1, schedule=schedule)
    factors = [lr_factor(step, cfg, steps) for step in range(steps)]
    peak = min(warmup, steps - 1)
    assert factors[: peak + 1] == sorted(factors[: peak + 1]) and factors[peak:] == sorted(factors[peak:], reverse=True)
    if warmup < steps - 1:
        assert factors[peak] == 1 and factors[-1] == pytest.approx(0.1)
    else:
        assert factors[-1] == min(1, steps / (warmup + 1))


def test_clipping_is_over_both_models_together(model):
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert norm > 0.5
    norms = update(build_optimizer(model, config()), model, 0.5, 1.0)
    torch.testing.assert_close(norms["grad_norm"], norm)
    for name in ("base", "drafter"):
        own = torch.stack([g.norm() for n, g in gradients.items() if n.startswith(name)]).norm()
        torch.testing.assert_close(norms[f"grad_norm_{name}"], own)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradients[name] * 0.5 / norm, rtol=1e-4, atol=1e-9)


def test_clipping_each_model_by_its_own_norm(model):
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    own = {
        part: torch.stack([g.norm() for n, g in gradients.items() if n.startswith(part)]).norm()
        for part in ("base", "drafter")
    }
    limits = {"base": 0.25 * float(own["base"]), "drafter": 0.5 * float(own["drafter"])}
    update(build_optimizer(model, config()), model, limits["base"], 1.0, limits["drafter"])
    for name, p in model.named_parameters():
        if p.grad is not None:
            share = 0.25 if name.startswith("base") else 0.5
            torch.testing.assert_close(p.grad, gradients[name] * share, rtol=1e-4, atol=1e-9)


def test_a_step_without_a_target_changes_nothing(model):
    """All gradients are 0 then: neither weights nor moments move, and AdamW's step isn't counted."""
    optimizer = build_optimizer(model, config())
    update(optimizer, model, 1.0, 1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in optimizer.state]
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()
    norms = update(optimizer, model, 1.0, 1.0)
    assert norms["grad_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    for before, after in zip(state, optimizer.state.values(), strict=True):
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_one_step_is_adamws(model):
    """Written out for a first step: p - lr * (g / (|g| + eps) + decay * p)."""
    cfg = config(lr=0.01, drafter_lr=0.02, weight_decay=0.1, eps=1e-6)
    before = {name: (p.detach().clone(), p.grad) for name, p in model.named_parameters() if p.grad is not None}
    optimizer = build_optimizer(model, cfg)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    update(optimizer, model, 0.0, 0.5)
    for name, p in model.named_parameters():
        if name in before:
            old, g = before[name]
            lr = 0.5 * (0.01 if name.startswith("base") else 0.02)
            expected = old * (1 - lr * decays[id(p)]) - lr * g / (g.abs() + 1e-6)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_steps_in_a_row_are_adamws_at_each_steps_own_rate(model):
    """Written out, with moments, on gradients that change and a rate that goes up and down."""
    cfg = config(lr=0.01, drafter_lr=0.01, weight_decay=0.0, betas=[0.8, 0.7], eps=1e-6)
    optimizer = build_optimizer(model, cfg)
    p = model.base.get_input_embeddings().weight
    expected, first = p.detach().double(), p.grad.clone()
    m, v = torch.zeros_like(expected), torch.zeros_like(expected)
    for step, (factor, scale) in enumerate([(0.5, 1.0), (1.0, -3.0), (0.25, 2.0)], start=1):
        p.grad = first * scale
        update(optimizer, model, 0.0, factor)
        g = first.double() * scale
        m, v = 0.8 * m + 0.2 * g, 0.7 * v + 0.3 * g**2
        expected -= factor * 0.01 * (m / (1 - 0.8**step)) / ((v / (1 - 0.7**step)).sqrt() + 1e-6)
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(model, bad):
    optimizer = build_optimizer(model, config())
    update(optimizer, model, 1.0, 1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in optimizer.state]
    next(p for p in model.drafter.parameters() if p.requires_grad).grad.view(-1)[0] = bad
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norms = update(optimizer, model, 1.0, 1.0)
    assert not norms["grad_norm"].isfinite()
    for name, gradient in gradients.items():  # a dump of them shows where it came from
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    for before, after in zip(state, optimizer.state.values(), strict=True):
        assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_is_added_up_in_fp32_at_least(dtype):
    """512 and more equal squares: in bfloat16 their sum stops at 256."""
    ones = [torch.ones(8, 64, dtype=dtype) for _ in range(600)]
    norm = total_norm([*ones, None])
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(norm.double(), torch.tensor(600 * 512.0).double().sqrt(), rtol=1e-6, atol=0)
    assert total_norm([None]) == 0


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "muon"])
def test_a_weight_that_no_target_reaches_does_not_decay(model, name):
    """Answers of two tokens have targets of round 0 alone, and `post_projection` a gradient of zeros."""
    optimizer = build_optimizer(model, config(name=name, weight_decay=0.1, lr=0.01, drafter_lr=0.01))
    weight, other = model.drafter.post_projection.weight, model.drafter.pre_projection.weight
    for length, moves in ((2, False), (3, True), (2, False)):
        model.zero_grad()
        ids = torch.randint(3, 240, (2, 12), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:, : 12 - length] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        assert bool(weight.grad.abs().max() > 0) == moves
        before, moved = weight.detach().clone(), other.detach().clone()
        update(optimizer, model, 1.0, 1.0)
        assert torch.equal(before, weight) != moves and not torch.equal(moved, other)


def test_the_drafter_follows_a_schedule_of_its_own():
    """Against the shapes written out, step by step; keys that are null follow the base's."""
    steps, warmup = 50, 5
    cfg = config(
        warmup_steps=warmup, min_lr_ratio=0.1, drafter_schedule="wsd", drafter_min_lr_ratio=0.0, decay_share=0.2
    )
    rates = {part: [lr_factor(step, cfg, steps, part) for step in range(steps)] for part in ("base", "drafter")}
    assert rates["base"] == [
        lr_factor(step, config(warmup_steps=warmup, min_lr_ratio=0.1), steps) for step in range(steps)
    ]
    expected = [(step + 1) / 6 for step in range(5)] + [1.0] * 35 + [1 - step / 10 for step in range(1, 11)]
    assert rates["drafter"] == pytest.approx(expected)
    unset = {"drafter_schedule": None, "drafter_min_lr_ratio": None}
    same = config(warmup_steps=warmup, schedule="linear", min_lr_ratio=0.3, **unset)
    assert [lr_factor(step, same, steps, "drafter") for step in range(steps)] == [
        lr_factor(step, same, steps) for step in range(steps)
    ]
    assert [lr_factor(step, config(warmup_steps=0, schedule="wsd", decay_share=0.0), 9) for step in range(9)] == [
        1.0
    ] * 9
