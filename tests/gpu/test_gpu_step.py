"""A joint step on the device: sharded as unsharded, in fp32 as the CPU's and in bfloat16 near it, with every choice of
attention, loss, kernels and compilation."""

import functools
from importlib.util import find_spec

import pytest
import torch
from on_device import CPU, CUDA, DEVICE, LENGTHS, SIZES, Step, assert_equal, configure, error, step
from test_loss import MIX, Case, reference, tiny_chunks
from test_loss import config as loss_config

from joint_train.config import KINDS
from joint_train.config.checks import CHOICES
from joint_train.distributed.parallelize import DTYPES
from joint_train.pair.attention import BY_LAYER_TYPE, FLEX, flex_takes, implementation
from joint_train.pair.centroids import Centroids, token_centroids

pytestmark = pytest.mark.gpu

FLOAT32 = 1e-4  # two kernels, or two devices, add in another order: some 1e-6 an operation
# Each choice once: auto is one of the others, by device.
ATTENTION = {implementation(name, DEVICE.type): name for name in reversed(CHOICES["model.attn_implementation"])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def on_cpu(folder):
    """``on_cpu(size, dtype, packed)``: the step on the CPU, unsharded, all of it in one dtype; made once."""

    @functools.cache
    def made(size: str, dtype: str = "float32", packed: bool = True) -> Step:
        cfg = configure(folder, size=size, precision__params=dtype, model__attn_implementation="sdpa")
        return step(cfg, CPU, sharded=False, length=LENGTHS[size], packed=packed)

    return made


def near_in_bfloat16(found: Step, on_cpu, size: str, packed: bool = True) -> None:
    """A step in bfloat16 rounds at each operation. How far that takes it is measured: on the CPU, from the same step in
    fp32. Another device rounds as often, at other places (a fused kernel also its probabilities): twice that far."""
    exact, rounded = on_cpu(size, packed=packed), on_cpu(size, "bfloat16", packed)
    measured = error(rounded, exact)
    assert 2**-9 < measured < 0.2  # a longer yardstick would show nothing: another window is 0.36 and more
    assert error(found, exact) <= 2 * measured
    torch.testing.assert_close(found.loss, exact.loss, rtol=0.01, atol=0)


@pytest.mark.parametrize("shape", ["e2b", "26b_a4b", "31b", "12b_unified"])
def test_sharded_equals_unsharded(folder, shape):
    cfg = configure(folder, shape, model__attn_implementation="sdpa")
    assert_equal(step(cfg, DEVICE), step(cfg, DEVICE, sharded=False), FLOAT32)


def rows_of(attention: str) -> list[tuple[str, bool]]:
    """Packed rows, and for what computes them in another way also rows of one document."""
    other = implementation(attention, DEVICE.type) in ("sdpa", BY_LAYER_TYPE)
    return [(attention, True), *([(attention, False)] if other else [])]


@pytest.mark.parametrize("size", LENGTHS)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "attention, packed",
    [row for attention in ATTENTION.values() for row in rows_of(attention)],
    ids=lambda x: x if isinstance(x, str) else "packed" if x else "one document",
)
def test_every_attention_is_the_references(folder, on_cpu, attention, packed, compute, size):
    if not CUDA and attention in FLEX:
        pytest.skip(f"{attention}: FlexAttention has no backward on CPU")
    cfg = configure(folder, size=size, precision__compute=compute, model__attn_implementation=attention)
    largest = SIZES[size].get("global_head_dim", 0)
    if attention == "flex_attention" and not flex_takes(largest, DTYPES[compute], DEVICE.type):
        pytest.skip(f"FlexAttention doesn't run with head_dim {largest} in {compute} on this GPU")
    found = step(cfg, DEVICE, length=LENGTHS[size], packed=packed)
    if compute == "bfloat16":
        near_in_bfloat16(found, on_cpu, size, packed)
    else:
        assert_equal(found, on_cpu(size, packed=packed), FLOAT32)


def test_compiled_layers_are_the_references(folder, on_cpu):
    """With what is recomputed, as by default; tests/pair/test_compile.py has the other choices."""
    torch.compiler.reset()
    cfg = configure(folder, precision__compute="float32", parallel__compile=True)
    assert_equal(step(cfg, DEVICE), on_cpu("small"), FLOAT32)
    torch.compiler.reset()


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_ligers_kernels_are_the_references(folder, on_cpu, compute):
    if find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel isn't installed")
    if not CUDA:
        pytest.skip("liger-kernel runs on a GPU only")
    cfg = configure(folder, precision__compute=compute, model__use_liger_kernel=True)
    found = step(cfg, DEVICE)
    if compute == "bfloat16":
        near_in_bfloat16(found, on_cpu, "small")
    else:
        assert_equal(found, on_cpu("small"), FLOAT32)


def moved(case: Case, device: torch.device) -> Case:
    """The same case with its tensors on a device, as leaves."""
    other = Case(case.base_hidden.dtype)
    for name in ("base_hidden", "base_weight", "drafter_weight", "centroid_weight"):
        setattr(other, name, getattr(case, name).detach().to(device).requires_grad_())
    other.drafter_hidden = [x.detach().to(device).requires_grad_() for x in case.drafter_hidden]
    other.weights = case.weights.to(device)
    return other


def losses() -> list:
    """Each kind and all of them together; compiled in bfloat16, and in fp32 only all of them together."""
    return [
        pytest.param(drafter, dtype, compiled, id=f"{name}-{str(dtype)[6:]}{'-compiled' * compiled}")
        for compiled in (False, True)
        for name, drafter in {**{kind: kind for kind in KINDS}, "mix": MIX}.items()
        for dtype in (torch.float32, torch.bfloat16)
        if not compiled or name == "mix" or dtype == torch.bfloat16
    ]


@pytest.mark.parametrize("drafter, dtype, compiled", losses())
def test_every_loss_is_the_materialised_one(drafter, dtype, compiled):
    """Values and gradients, of whole logits in fp32 on the CPU. Those of bfloat16 inputs are the same but for the last
    rounding, of the gradient of the logits and of the result: 2^-8 of what adds up in it."""
    torch.compiler.reset()  # each kind has graphs of its own, and a function may have only so many
    case, extra = Case(dtype), "centroid_weight"
    ordered = Centroids(case.centroid_weight, token_centroids(case.ordering, 6), top_k=2)
    cfg = loss_config(drafter, temperature=1.7, teacher_grad=0.3, centroid_weight=0.3, compile=compiled)
    cfg.memory_budget_mb = tiny_chunks(4)
    options = {"softcap": 2.0, "drafter_softcap": 3.0}
    expected, expected_sums = reference(case, cfg, centroids=ordered, **options)
    gradients = case.gradients(expected, [(extra, case.centroid_weight)])

    there = moved(case, DEVICE)
    ordered = Centroids(there.centroid_weight, token_centroids(there.ordering, 6).to(DEVICE), top_k=2)
    loss, sums = there.ours(cfg, case.targets.to(DEVICE), centroids=ordered, **options)
    assert loss.device.type == DEVICE.type
    torch.testing.assert_close(loss.cpu().double(), expected.double(), rtol=FLOAT32, atol=FLOAT32)
    for name, value in expected_sums.items():
        torch.testing.assert_close(sums[name].cpu().double(), value.double(), rtol=FLOAT32, atol=FLOAT32)
    tolerance = FLOAT32 if dtype == torch.float32 else 2**-7
    for name, gradient in there.gradients(loss, [(extra, there.centroid_weight)]).items():
        difference = (gradient.cpu().float() - gradients[name].float()).norm()
        assert difference <= tolerance * gradients[name].float().norm(), name
