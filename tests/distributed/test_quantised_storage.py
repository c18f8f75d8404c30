"""A base that is kept in codes: the same base, gradients and steps as with its dequantised weights, on any mesh."""

import math

import pytest
import torch
import torch.distributed as dist
from configs import compose
from pairs import SHAPES, make_pair
from ranks import run_ranks
from torch import nn

from joint_train.distributed.quantised import KINDS, NF4, QuantisedLinear, block_size, dequantise, quantise, stores
from joint_train.weights import composite


def settings(folders, **more):
    base = {"model.base": str(folders[0]), "model.drafter": str(folders[1]), "drafter.num_steps": 2}
    return compose(base | {"model.quantization": "nf4", "lora.r": 4} | more)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_nearest_of_each_block(kind):
    """Against a search over all codes, number by number."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 5, 192, generator=generator)
    w[0, 0, :64] = 0
    block = block_size(kind, 192)
    codes, scales = quantise(w, kind, block)
    found = dequantise(codes, scales, kind, block, torch.float32)
    levels = {
        "nf4": torch.tensor(NF4),
        "int8": torch.arange(-127, 128).float() / 127,
        "fp8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / 448,
    }[kind]
    levels = levels[levels.isfinite()]
    for numbers, rounded in zip(w.reshape(-1, block), found.reshape(-1, block), strict=True):
        candidates = levels * numbers.abs().max()
        nearest = (numbers[:, None] - candidates).abs().amin(1)
        torch.testing.assert_close((numbers - rounded).abs(), nearest, rtol=1e-5, atol=1e-6)
    assert codes.dtype == scales.dtype == torch.uint8
    assert codes.numel() + scales.numel() == w.numel() / KINDS[kind].values + 4 * w.numel() / block
    for rows in (slice(1, 2), slice(0, 3)):  # of any shard of rows
        assert all(
            torch.equal(a, b[rows]) for a, b in zip(quantise(w[rows], kind, block), (codes, scales), strict=True)
        )


def dense_copy(pair, cfg):
    """The same pair with the dequantised weights as numbers."""
    kept = stores(pair.base)
    plain = composite.load_pair(compose_none(cfg), None, "cpu")
    layers = dict(plain.base.named_parameters())
    with torch.no_grad():
        for name, store in kept.items():
            layers[name].copy_(store.numbers(torch.float32))
        theirs = dict(pair.named_parameters())
        for name, parameter in plain.named_parameters():
            if name in theirs:
                parameter.copy_(theirs[name])
    return plain


def compose_none(cfg):
    import dataclasses

    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, quantization="none"))


def batch(seed=0):
    ids = torch.randint(3, 240, (2, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def lively(pair):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(pair.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_equal_those_with_the_dequantised_base(tmp_path, shape, recompute):
    folders = make_pair(tmp_path, shape)
    cfg = settings(folders, **{"activation_checkpointing.base": recompute, "drafter.base_grad_scale": 1.0})
    pair = composite.load_pair(cfg, None, "cpu")
    lively(pair)
    plain = dense_copy(pair, cfg)
    kept = stores(pair.base)
    assert sum(math.prod(s.shape) for s in kept.values()) > 0.5 * sum(p.numel() for p in plain.base.parameters())
    assert not any("embed_tokens.weight" in n or "router" in n for n in kept)
    assert shape != "26b_a4b" or any(name.endswith("experts.gate_up_proj") for name in kept)
    out, expected = (model(**batch()) for model in (pair, plain))
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-6)
    out.loss.backward()
    expected.loss.backward()
    reference = dict(plain.named_parameters())
    trained = 0
    for name, parameter in pair.named_parameters():
        if parameter.requires_grad:
            grad, wanted = parameter.grad, reference[name].grad
            assert (grad - wanted).norm() <= 1e-6 * wanted.norm() + 1e-9, name
            trained += "lora_" in name
    assert trained > 10
