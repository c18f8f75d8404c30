"""Optimizers with small states: their arithmetic, steps that aren't taken, checkpoints on other ranks, the plan."""

import math

import pytest
import torch
from checkpoint_run import config
from ranks import run_ranks
from test_checkpoint import same
from test_checkpoint_resume import resume_all, save_twice
from torch import nn

from joint_train.command import let_torchao_in
from joint_train.config import ConfigError, validate
from joint_train.distributed.moments import block_size, state_bytes
from joint_train.train.compact import CompactAdamW
from joint_train.train.optim import update

NAMES = ["adamw_8bit", "adamw_bf16"]
GROUP = {"lr": 0.02, "peak_lr": 0.02, "weight_decay": 0.1}


class Pair(nn.Module):
    """As much of a pair as ``update`` asks for."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.base, self.drafter = nn.Linear(256, 32, dtype=dtype), nn.Linear(96, 64, dtype=dtype)

    def parts(self):
        return [("base", self.base), ("drafter", self.drafter)]


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 10.0 ** (-step % 3)


def build(name, dtype=torch.float32):
    model = Pair(dtype)
    return model, CompactAdamW([{"params": list(model.parameters()), **GROUP}], name, (0.8, 0.7), 1e-6)


def test_8_bit_is_torchaos():
    """torchao's own state and update (not compiled), where its blocks are ours: 256 neighbours, and 32 of 96."""
    let_torchao_in()  # another test's command may have left it out of this process
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    model, optimizer = build("adamw_8bit")
    reference = {p: p.detach().clone() for p in model.parameters()}
    state = {}
    for p in reference:
        block = {(32, 256): 256, (64, 96): 32}.get(tuple(p.shape), 0)
        assert block_size(p.shape) == block
        state[p] = [
            OptimState8bit.zeros(p.shape, signed, block) if block else torch.zeros(p.shape) for signed in (True, False)
        ]
    for step in range(1, 6):
        gradients(model, step)
        update(optimizer, model, 0.0, 1 / step)
        for p, weight in reference.items():
            single_param_adam(
                weight, p.grad, torch.tensor(float(step)), *state[p], None, torch.tensor(0.02 / step), 0.8, 0.7, 0.1,
                1e-6, True, False,
            )  # fmt: skip
            # Rounding in another order takes a value at the edge between two codes to the other one.
            differing = ~torch.isclose(p.detach(), weight, rtol=1e-5, atol=1e-6)
            assert differing.float().mean() < 1e-3 and (p.detach() - weight).abs().max() < 1e-3
    for p, moments in state.items():
        for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            if isinstance(moment, OptimState8bit):
                differing = (optimizer.state[p][f"{name}_codes"] != moment.codes).float().mean()
                assert differing < 1e-3
                scale = optimizer.state[p][f"{name}_scale"].flatten()
                torch.testing.assert_close(scale, moment.scale, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_moments_are_rounded_after_each_step(dtype):
    model, optimizer = build("adamw_bf16", dtype)
    weight = model.base.weight.detach().clone()
    m, v = torch.zeros_like(weight).double(), torch.zeros_like(weight).double()
    for step in range(1, 5):
        gradients(model, step)
        update(optimizer, model, 0.0, 1.0)
        g = model.base.weight.grad.double()
        m, v = 0.8 * m + 0.2 * g, 0.7 * v + 0.3 * g**2
        w = weight.double() * (1 - 0.02 * 0.1)
        w -= 0.02 * (m / (1 - 0.8**step)) / ((v / (1 - 0.7**step)).sqrt() + 1e-6)
        weight = w.to(dtype)
        m, v = m.bfloat16().double(), v.bfloat16().double()
        close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(model.base.weight.detach(), weight, **close)
    assert optimizer.state[model.base.weight]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_taken_changes_nothing(name, dtype):
    model, optimizer = build(name, dtype)
    for step in (1, 2):
        gradients(model, step)
        update(optimizer, model, 1.0, 1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    for bad in (math.nan, math.inf, 0.0):
        gradients(model, 3)
        for p in model.parameters():
            p.grad.view(-1)[:1] = bad
            if bad == 0:
                p.grad.zero_()
        update(optimizer, model, 1.0, 1.0, 1.0)
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
        for before, p in zip(state, model.parameters(), strict=True):
            assert before.keys() == optimizer.state[p].keys()
            assert all(torch.equal(before[k], optimizer.state[p][k]) for k in before)
    gradients(model, 3)
    update(optimizer, model, 1.0, 1.0)
    assert all(optimizer.state[p]["step"] == 3 for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_counts_the_bytes_that_are_there(name):
    model, optimizer = build(name)
    gradients(model, 1)
    update(optimizer, model, 0.0, 1.0)
    for p in model.parameters():
        held = sum(v.nbytes for k, v in optimizer.state[p].items() if k != "step")
        assert state_bytes(name, p.shape, p.numel(), p.dtype) == held


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_goes_on_with_other_ranks(tmp_path, name):
    """Two ranks save; two, one and four (HSDP) have every bit of it."""
    overrides = {"optim.name": name}
    first, second = run_ranks(save_twice, 2, tmp_path / "run", overrides)[0]
    kinds = {key.rpartition("/")[2] for key in second if key.startswith("optimizer:")}
    assert kinds >= ({"exp_avg_codes", "exp_avg_sq_scale"} if name == "adamw_8bit" else {"exp_avg", "exp_avg_sq"})
    for ranks, more in ((2, {}), (1, {}), (4, {"parallel.dp_replicate": 2})):
        for ((_, state, loaded, said, _),) in run_ranks(resume_all, ranks, [tmp_path / "run"], {**overrides, **more}):
            assert state == {"step": 2} and "damaged" not in said
            same(second, loaded)
    (problem, state, *_) = run_ranks(resume_all, 1, [tmp_path / "run"], {"optim.name": other(name)})[0][0]
    assert state is None and "set optim.name" in problem
    if name == "adamw_bf16":  # bfloat16 is exact in fp32
        ((_, state, loaded, *_),) = run_ranks(resume_all, 1, [tmp_path / "run"], {"optim.name": "adamw"})[0]
        assert state == {"step": 2}
        same(second, loaded)


def other(name):
    return NAMES[1 - NAMES.index(name)]


def falls(beta: float) -> float:
    """The largest second moment over what it should be, without gradients for 200 steps, from all sizes within 2."""
    p = nn.Parameter(torch.zeros(512))
    optimizer = CompactAdamW([{"params": [p], **GROUP}], "adamw_bf16", (0.9, beta), 1e-6)
    p.grad = torch.linspace(1, 2, 512).sqrt() / math.sqrt(1 - beta)  # of squares from 1 to 2
    optimizer.step()
    before, p.grad = optimizer.state[p]["exp_avg_sq"].float(), torch.zeros(512)
    for _ in range(200):
        optimizer.step()
    return (optimizer.state[p]["exp_avg_sq"].float() / (before * beta**200)).max().item()


def test_a_second_moment_in_bfloat16_falls_up_to_the_beta_that_is_allowed():
    assert falls(0.95) < 1.5 and falls(0.99) < 2.5
    assert falls(0.999) == pytest.approx(0.999**-200)  # not at all: the reason for the limit


@pytest.mark.parametrize(
    "values, refused",
    [
        ({"optim.name": "adamw_bf16", "optim.betas": [0.9, 0.99]}, None),
        ({"optim.name": "adamw_bf16", "optim.betas": [0.9, 0.999]}, "optim.name=adamw_8bit or adamw"),
        ({"optim.name": "adamw", "optim.betas": [0.9, 0.999]}, None),
        ({"precision.params": "bfloat16", "optim.betas": [0.9, 0.999]}, "precision.params=float32"),
        ({"optim.name": "muon", "precision.params": "bfloat16", "optim.betas": [0.8, 0.995]}, r"\[0.8, 0.95\]"),
        ({"optim.name": "adamw_8bit", "precision.params": "bfloat16", "optim.betas": [0.9, 0.999]}, None),
    ],
)
def test_a_beta_that_bfloat16_would_freeze_is_refused(values, refused):
    if refused is None:
        validate(config({"data.train": [{"path": "unused"}], **values}))
    else:
        with pytest.raises(ConfigError, match=f"^optim.betas=.*{refused}"):
            validate(config({"data.train": [{"path": "unused"}], **values}))
