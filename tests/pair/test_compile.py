"""Compiled layers make the same losses and gradients."""

from unittest import mock

import pytest
import torch
from configs import compose
from pairs import SHAPES, build_pair
from ranks import run_ranks

from joint_train.distributed.mesh import init_mesh
from joint_train.distributed.parallelize import parallelize, prepare
from joint_train.weights.composite import Gemma4WithDrafter


@pytest.mark.slow  # the compiler takes a minute or two
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_equals_eager(checkpointing):
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        cfg = compose()
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


COMPILE = torch.nn.Module.compile


def compile_with_eager_kernels(self, **options):
    """The graphs are those of the real compiler; only their kernels are eager, which takes seconds, not minutes."""
    COMPILE(self, backend="aot_eager", **options)


def compiled_step(rank: int, shape: str, checkpointing: str, compute: str) -> list[float]:
    """Norms of the gradients of micro-batches of three lengths, eager and compiled, on a mesh."""
    mesh = init_mesh(compose().parallel)
    norms = []
    for compiled in (False, True):
        torch.compiler.reset()
        cfg = compose()
        cfg.precision.compute = compute
        cfg.activation_checkpointing.base = checkpointing
        model = Gemma4WithDrafter(*build_pair(shape), drafter_num_steps=2).train()
        cfg.parallel.compile = compiled
        with mock.patch.object(torch.nn.Module, "compile", compile_with_eager_kernels):
            prepare(model, cfg)
        parallelize(model, mesh, cfg)
        for length in (20, 12, 16):
            ids = torch.randint(3, 240, (2, length), generator=torch.Generator().manual_seed(length + rank))
            model(input_ids=ids, labels=ids).loss.backward()
        norms.append(sum(p.grad.full_tensor().float().norm() ** 2 for p in model.parameters() if p.grad is not None))
    return [float(norm) for norm in norms]


@pytest.mark.parametrize(
    ("shape", "checkpointing", "compute"),
    [("31b", "full", "float32")],
)
def test_compiled_under_fsdp_with_recomputation(shape, checkpointing, compute):
    tolerance = 1e-4 if compute == "float32" else 0.05
    for eager, compiled in run_ranks(compiled_step, 2, shape, checkpointing, compute):
        assert compiled == pytest.approx(eager, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", ["none", "full", "every_n"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_compiled_under_fsdp(shape, checkpointing, compute):
    test_compiled_under_fsdp_with_recomputation(shape, checkpointing, compute)
