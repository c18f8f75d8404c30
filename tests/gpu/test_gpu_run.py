"""A whole run on the device: many steps, a checkpoint, its resumption; and what a step takes of the device's memory."""

import json
import math
from pathlib import Path

import pytest
import torch
from on_device import CUDA, DEVICE, LENGTHS, configure, forward_backward, one_rank
from safetensors.torch import load_file
from test_main_job import comparable, records, settings
from test_parallel import batch

from benchmarks import gpu
from joint_train.config import load
from joint_train.plan.planner import GIB, Machine, make_plan
from joint_train.train import trainer
from joint_train.train.optim import build_optimizer, update
from joint_train.weights.composite import load_pair

pytestmark = pytest.mark.gpu

STEPS = 40 if CUDA else 6
SAVED = STEPS // 2


def train(pair: Path, output_dir: Path, *more: str) -> dict[int, dict]:
    """A run in this process; its metrics by step."""
    overrides = settings(pair, output_dir, "data.micro_batch_size=2", "optim.grad_accum=1", "data.packing=true")
    overrides += ["activation_checkpointing.base=full", "activation_checkpointing.drafter=full", "eval.prompts=1"]
    overrides += ["eval.max_new_tokens=8", f"max_steps={STEPS}", f"checkpoint.every={SAVED}", "checkpoint.keep_last=0"]
    trainer.run(load([*overrides, *more]))
    return records(output_dir)


@pytest.fixture(scope="module")
def deterministic():
    """Kernels that add in the same order each time, as far as there are any."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def whole(starter_dir, tmp_path_factory, deterministic):
    output_dir = tmp_path_factory.mktemp("run")
    return output_dir, train(starter_dir, output_dir)


def test_a_run_is_finite_and_learns(whole):
    """With micro-batches of two rows, validations and generations."""
    _, found = whole
    assert found.keys() == set(range(STEPS + 1))
    for step, metrics in found.items():
        for name, value in metrics.items():
            # JSON has no NaN: it is null, and only what needs another GPU or a source without a target may be.
            assert value is not None and math.isfinite(value), f"{name} in step {step}: {value}"
    assert found[STEPS]["base_loss"] < found[1]["base_loss"]
    assert found[STEPS]["drafter_ce"] < found[1]["drafter_ce"]
    assert found[STEPS]["val/tokens_per_forward"] >= 1


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(whole, starter_dir, tmp_path):
    output_dir, uninterrupted = whole
    checkpoint = output_dir / "checkpoints" / f"step_{SAVED:08}"
    resumed = train(starter_dir, tmp_path / "resumed", f"resume={checkpoint}")
    assert resumed.keys() >= set(range(SAVED + 1, STEPS + 1))
    first = ("base_loss", "drafter_loss", "drafter_ce", "base_accuracy", "lr", "drafter_lr")
    for step in range(SAVED + 1, STEPS + 1):
        expected, found = comparable(uninterrupted[step]), comparable(resumed[step])
        assert found.keys() == expected.keys()
        if not CUDA:
            assert found == expected, f"step {step}"
        for name in first:
            # A forward is the same but for the order of sums; what backwards with atomics change grows in steps.
            tolerance = 1e-5 if step == SAVED + 1 else 1e-2
            assert found[name] == pytest.approx(expected[name], rel=tolerance), f"{name} in step {step}"
    for part in ("base", "drafter"):
        runs = (output_dir, tmp_path / "resumed")
        ours, theirs = (load_file(run / "export" / part / "model.safetensors") for run in runs)
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            if CUDA:
                difference = (weight.float() - theirs[name].float()).norm()
                assert difference <= 1e-2 * weight.float().norm(), name
            else:
                assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one document"])
def test_steps_of_two_rows_are_finite_at_real_head_sizes(tmp_path, packed):
    """On Hopper, cuDNN's attention gives NaN in the backward of more than one row."""
    cfg = configure(tmp_path, size="real heads")
    model = load_pair(cfg, one_rank(cfg), DEVICE).train()
    optimizer, losses = build_optimizer(model, cfg.optim), []
    rows = {name: x[:2] for name, x in batch(length=LENGTHS["real heads"]).items()}
    for step in range(STEPS):
        out = forward_backward(model, DEVICE, rows, packed)
        norms = update(optimizer, model, cfg.optim.max_grad_norm, 10.0, cfg.optim.drafter_max_grad_norm)
        assert all(norm.isfinite() for norm in (out.loss, *norms.values())), f"step {step + 1}: {out.loss}, {norms}"
        losses.append(float(out.loss.detach()))
    assert losses[-1] < losses[0]


# Pair, groups of layers, S, keys: weights and states, activations, and logits lead in turn.
PLANS = {
    "E2B of 5 layers, S = 1024": ("E2B", 1, 1024, ()),
    "E2B of 10 layers, S = 4096, nothing recomputed": (
        "E2B", 2, 4096, ("activation_checkpointing.base=none", "activation_checkpointing.drafter=none")
    ),
    "E4B of 6 layers, S = 2048, a frozen base": ("E4B", 1, 2048, ("freeze.base=true", "loss.memory_budget_mb=2048")),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_is_what_the_allocator_gives(tmp_path, name):
    """Weights, gradients, optimizer states, activations, logits. The allocator rounds sizes up, cuBLAS and the compiler
    have workspaces: a tenth, and half a GiB of these."""
    pair, groups, length, more = PLANS[name]
    gpu.write_configs(pair, tmp_path, groups, small=not CUDA)
    length = length if CUDA else length // 64
    cfg = gpu.configure(tmp_path, length, "data.packing=false", "loss.memory_budget_mb=1024", *more)
    plan = make_plan(cfg, Machine(gpus=1), DEVICE.type)
    assert plan.peak > 0
    mesh = one_rank(cfg)
    gpu.free()
    before = torch.cuda.memory_allocated() if CUDA else 0
    gpu.start_of_peak(DEVICE)
    step = gpu.OurStep(cfg, DEVICE, mesh)
    for _ in range(2):
        loss = step.forward_backward()
        step.update()
    assert loss.isfinite()
    if not CUDA:
        return  # a process's memory is not the step's: here the plan and the steps have run
    peak = gpu.peak(DEVICE) - before / GIB
    print(f"{name}: {peak:.2f} GiB, planned {plan.peak / GIB:.2f}: {json.dumps(plan.memory)}")
    assert peak == pytest.approx(plan.peak / GIB, rel=0.1, abs=0.5)
