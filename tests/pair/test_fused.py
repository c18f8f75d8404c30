"""Norms, gated activations and rotations as one operator each: transformers' numbers, and few launches a step."""

import copy
import sys
from collections import Counter
from unittest import mock

import pytest
import torch
from configs import compose
from pairs import build_pair
from torch._decomp import decomposition_table
from transformers import Gemma4TextConfig
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4 import modeling_gemma4 as gemma4

from joint_train import config
from joint_train.distributed.parallelize import prepare
from joint_train.pair import attention, fused
from joint_train.pair.attention import BY_LAYER_TYPE
from joint_train.plan.meter import Meter
from joint_train.plan.step import simulate
from joint_train.torch_private import TorchDispatchMode
from joint_train.weights.composite import Gemma4WithDrafter, meta_pair
from joint_train.weights.released import released_config

DTYPES = [torch.float32, torch.bfloat16]


def written_out_rotation(x, cos, sin, unsqueeze_dim):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return x * cos + gemma4.rotate_half(x) * sin


def assert_close(ours, theirs, dtype, exact=None):
    """fp32 to 1e-6; bf16 to one rounding of either, measured on the exact value."""
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    else:
        assert ((ours - theirs).abs() <= 2**-7 * theirs.abs() + 2**-7 * theirs.abs().mean()).all()


def compare(function, reference, inputs, dtype):
    results = []
    for f in (function, reference):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = f(*leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours.detach(), theirs.detach(), dtype)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_scale", [True, False])
def test_the_norm_is_that_of_transformers(dtype, with_scale):
    norm = gemma4.Gemma4RMSNorm(48, with_scale=with_scale)
    if with_scale:
        norm.weight.data = 1 + 0.3 * random(48)
    norm = norm.to(dtype)
    ours = copy.deepcopy(norm)
    fused.fuse(torch.nn.ModuleList([ours]))
    assert type(ours) is not type(norm) and isinstance(ours, gemma4.Gemma4RMSNorm)
    assert ours.state_dict().keys() == norm.state_dict().keys()
    x = 3 * random(2, 5, 48, dtype=dtype, seed=1)
    compare(ours, norm, [x], dtype)
    if with_scale:
        for module in (ours, norm):
            module(x).square().sum().backward()
        assert_close(ours.weight.grad, norm.weight.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_of_a_gpu_takes_and_gives_the_same(dtype):
    """Torch's own operator: its forward runs on CPU, its backward as torch writes it out for compilers."""
    x, weight, grad = random(2, 5, 48, dtype=dtype), 1 + random(48, dtype=dtype, seed=1), random(2, 5, 48, dtype=dtype)
    out, scale = fused._norm(x, weight, 1e-6)
    theirs, their_scale = fused._norm_on_gpu(x, weight, 1e-6)
    assert theirs.dtype == dtype and their_scale.shape == scale.shape
    assert_close(out, theirs, dtype)
    assert_close(scale, their_scale, torch.float32)
    backward = decomposition_table[torch.ops.aten._fused_rms_norm_backward.default]
    with mock.patch.object(torch.ops.aten, "_fused_rms_norm_backward", backward):
        by_x, by_weight = fused._norm_backward_on_gpu(grad, x, weight, scale)
        assert fused._norm_backward_on_gpu(grad, x, None, scale)[1].numel() == 0
    ours = fused._norm_backward(grad, x, weight, scale)
    assert_close(ours[0], by_x, dtype)
    assert_close(ours[1], by_weight, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gated_activation_is_that_of_transformers(dtype):
    mlp = gemma4.Gemma4TextMLP(Gemma4TextConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2), 0).to(dtype)
    ours = copy.deepcopy(mlp)
    fused.fuse(torch.nn.ModuleList([ours]))
    assert type(ours) is not type(mlp)
    compare(ours, mlp, [random(2, 5, 32, dtype=dtype)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rotation_is_that_of_transformers(dtype):
    angles = random(2, 5, 16)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # not the same in both halves
    for dim, shape in ((2, (2, 5, 4, 16)), (1, (2, 4, 5, 16))):
        x = random(*shape, dtype=dtype)
        compare(
            lambda x, dim=dim: fused.apply_rotary_pos_emb(x, cos, sin, dim),
            lambda x, dim=dim: written_out_rotation(x, cos, sin, dim),
            [x],
            dtype,
        )


def test_inside_of_a_compiled_layer_they_are_written_out():
    norm, mlp = gemma4.Gemma4RMSNorm(16), gemma4.Gemma4TextMLP(Gemma4TextConfig(hidden_size=16, intermediate_size=8), 0)
    layer = torch.nn.Sequential(norm, mlp)
    expected = layer(x := random(3, 16))
    fused.fuse(layer)
    graphs = []

    def keep(module, inputs):
        graphs.append(module)
        return module.forward

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(layer, backend=keep, fullgraph=True)(x), expected)
    assert len(graphs) == 1 and "joint_train" not in graphs[0].code
    torch.compiler.reset()


class Operators(TorchDispatchMode):
    """The names of joint_train's operators that run."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "joint_train":
            self.found.add(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_other_models_of_the_process_are_untouched():
    """Neither transformers' modules and classes, nor a model built before or after, nor the compiler's settings."""
    homes = [sys.modules[type(part).__module__] for part in build_pair()]
    classes = [x for home in homes for x in vars(home).values() if isinstance(x, type)]

    def state():
        attention = dict(ALL_ATTENTION_FUNCTIONS.items())
        attention.pop(BY_LAYER_TYPE)  # a name of our own
        return [dict(vars(x)) for x in (*homes, *classes)], torch._dynamo.config.get_config_copy(), attention

    def step(model):
        with Operators() as operators:
            out = model(ids, use_cache=False).logits
            out.sum().backward()
        return out, operators.found

    theirs = sdpa_attention_forward, flex_attention_forward
    assert tuple(ALL_ATTENTION_FUNCTIONS[name] for name in ("sdpa", "flex_attention")) == theirs
    ids = torch.arange(3, 15)[None]
    before, earlier = state(), build_pair()[0]
    expected, _ = step(build_pair()[0])
    cfg = compose({"parallel.compile": True})
    pair = Gemma4WithDrafter(*build_pair())
    with mock.patch.object(torch.nn.Module, "compile", lambda self, **options: torch.compile(self, **options)):
        prepare(pair, cfg)
    attention.compiled("eager")
    ours, used = step(pair.base)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert used == {name + way for name in ("rms_norm", "geglu", "rotate") for way in ("", "_backward")}
    for model in (earlier, build_pair()[0]):
        theirs, used = step(model)
        assert torch.equal(theirs, expected) and not used
    assert state() == before


def operations(*overrides: str, fuse=None) -> Counter:
    """Of one micro-batch of E4B in bf16 with everything recomputed, K = 4, views left out, by name."""
    cfg = config.load(
        ["data.train=[{path: unused}]", "model=gemma4_e4b", "precision.compute=bfloat16", "drafter.num_steps=4"]
        + ["data.max_length=2048", "loss.memory_budget_mb=10000000", "activation_checkpointing.base=full", *overrides]
    )
    pair = meta_pair(cfg, *map(released_config, (cfg.model.base, cfg.model.drafter)), torch.bfloat16, "cuda")
    found, dispatch = Counter(), Meter.__torch_dispatch__

    def noted(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable or not any(result.alias_info for result in func._schema.returns):
            found[str(func)] += 1
        return dispatch(self, func, types, args, kwargs)

    with mock.patch.object(Meter, "__torch_dispatch__", noted):
        simulate(pair, cfg, 8, "cuda")
    return found


def test_launches_of_a_step_of_e4b():
    found = operations()
    assert found["joint_train.rms_norm.default"] > 700 and found["joint_train.rotate_backward.default"] > 60
    assert not found["aten.pow.Tensor_Scalar"]
    # transformers' own: 20,530. FSDP2 and three more chunks of the loss come to it.
    assert sum(found.values()) <= 7_500


def test_the_activation_and_the_rotation_are_one_kernel_each_way():
    pytest.importorskip("triton")
    from cards import H100, lowered

    def inputs(count, *shape):
        return lambda: tuple(torch.empty(shape, dtype=torch.bfloat16) for _ in range(count))

    assert len(lowered(H100, fused._geglu, inputs(2, 4, 64, 512), dynamic=True)) == 1
    assert len(lowered(H100, fused._geglu_backward, inputs(3, 4, 64, 512), dynamic=True)) == 1

    def rotation():
        x = torch.empty(2, 64, 8, 256, dtype=torch.bfloat16)
        return x, *(torch.empty(2, 64, 1, 256, dtype=torch.bfloat16) for _ in range(2))

    assert len(lowered(H100, fused._rotate, rotation, dynamic=True)) == 1
    assert len(lowered(H100, fused._rotate_backward, rotation, dynamic=True)) == 1
