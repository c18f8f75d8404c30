"""A base that is kept in codes: the same base, gradients and steps as with its dequantised weights, on any mesh."""

import dataclasses
import gc
import math
from unittest import mock

import pytest
import torch
from configs import compose
from pairs import SHAPES, make_pair
from ranks import run_ranks
from test_compile import compile_with_eager_kernels
from test_lora import lora_config, set_values
from test_parallel import all_counts, data_rank, full, step, updates
from test_parallel import batch as rows_of

from joint_train.distributed.lora import adapted_modules, delta_weight
from joint_train.distributed.mesh import init_mesh
from joint_train.distributed.parallelize import reshard
from joint_train.distributed.placement import local_tensor
from joint_train.distributed.quantised import KINDS, NF4, block_size, dequantise, quantise, stores
from joint_train.errors import ConfigError
from joint_train.weights import composite, loading


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


def dense_copies(model) -> list[tuple[int, ...]]:
    """Shapes of live numbers as large as a weight that is kept in codes, or as a shard of one."""
    others = {tuple(local_tensor(p).shape) for p in model.parameters() if p.is_floating_point()}
    sizes = set()
    for store in stores(model.base).values():
        rows, columns = store.codes.shape[:-1], store.shape[-1]
        sizes |= {store.shape, (*local_tensor(store.codes).shape[:-1], columns), (math.prod(rows), columns)}
    live = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    found = [tuple(t.shape) for t in live if t.is_floating_point() and not t.is_meta and t.untyped_storage().size()]
    return [shape for shape in found if shape in sizes - others]


def quantised_updates(rank, folders, shape, options):
    """Codes, gradients, norms and updated weights of a step, and bytes of the base on this rank."""
    cfg = lora_config(folders, **{"model__quantization": "nf4"} | options)
    mesh = init_mesh(cfg.parallel) if rank is not None else None
    with mock.patch.object(torch.nn.Module, "compile", compile_with_eager_kernels):
        model = composite.load_pair(cfg, mesh, "cpu").train()
    set_values(model, shape)
    # In a process of its own, where no other test has left anything.
    assert rank is None or not dense_copies(model)
    index, size = data_rank(mesh) if mesh is not None else (0, 1)
    rows = {name: x.chunk(size)[index] for name, x in rows_of().items()}
    step(model, rows, all_counts(rows_of()))
    if mesh is not None:
        reshard(model)
    gc.collect()
    assert rank is None or not dense_copies(model)
    grads = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    codes = {n: (full(s.codes), full(s.scales)) for n, s in stores(model.base).items()}
    held = sum(local_tensor(t).nbytes for s in stores(model.base).values() for t in (s.codes, s.scales))
    numbers = {n: full(s.sharded(s.numbers(torch.float32))) for n, s in stores(model.base).items()}
    deltas = {n: full(m.base_layer.store.sharded(delta_weight(m))) for n, m in adapted_modules(model.base).items()}
    norms, weights, optimizer = updates(model, cfg, rows)
    assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters())
    return codes, grads, norms, weights, held, numbers, deltas, model.quantization_error


@pytest.mark.parametrize("shape, ranks, options", [
    ("e2b", 2, {}), ("26b_a4b", 2, {}), ("text", 4, {"parallel__dp_replicate": 2}),
    ("text", 2, {"parallel__cpu_offload": "all"}), ("31b", 3, {"model__quantization": "int8"}),
    pytest.param("31b", 2, {"parallel__compile": True}, marks=pytest.mark.slow),
])  # fmt: skip
def test_sharded_equals_whole(tmp_path, shape, ranks, options, monkeypatch):
    monkeypatch.setattr(loading, "READ_BYTES", 20_000)  # so that weights are read in pieces
    folders = make_pair(tmp_path, shape)
    alone = {name: value for name, value in options.items() if not name.startswith("parallel")}
    expected = quantised_updates(None, folders, shape, alone)
    found = run_ranks(quantised_updates, ranks, folders, shape, options)[0]
    codes, grads, norms, weights, held, numbers, deltas, error = found
    for name, both in expected[0].items():
        assert all(torch.equal(a, b) for a, b in zip(codes[name], both, strict=True)), name
        assert torch.equal(numbers[name], expected[5][name]), name
    for name, delta in expected[6].items():
        torch.testing.assert_close(deltas[name], delta)
    assert grads.keys() == expected[1].keys()
    for name, gradient in grads.items():
        wanted = expected[1][name]
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm(), name
    torch.testing.assert_close(norms, expected[2], rtol=1e-4, atol=0)
    for name, weight in expected[3].items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-5)
    shards = ranks // options.get("parallel__dp_replicate", 1)
    size = sum(math.prod(s.shape[:-1]) * (s.shape[-1]) for s in map(lambda pair: pair[0], codes.values()))
    assert expected[4] / shards <= held <= 1.1 * expected[4] / shards and size < expected[4]
    assert error == pytest.approx(expected[7], rel=1e-6) and 0.001 < error < 0.15


def of_bfloat16(rank, folders):
    cfg = lora_config(folders, model__quantization="fp8", precision__compute="bfloat16", parallel__cpu_offload="none")
    mesh = init_mesh(cfg.parallel)
    model = composite.load_pair(cfg, mesh, "cpu").train()
    rows = {name: x.chunk(2)[rank] for name, x in rows_of().items()}
    loss, _ = step(model, rows, all_counts(rows_of()))
    kinds = {(p.dtype, p.requires_grad) for p in model.base.parameters()}
    return float(loss), kinds, all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_frozen_numbers_are_rounded_and_codes_stay_bytes(tmp_path):
    loss, kinds, finite = run_ranks(of_bfloat16, 2, make_pair(tmp_path, "e2b"))[0]
    assert kinds == {(torch.uint8, False), (torch.bfloat16, False), (torch.float32, True)}
    assert finite and math.isfinite(loss)


def test_an_older_torch_is_refused(tmp_path, monkeypatch):
    folders = make_pair(tmp_path, "e2b")
    monkeypatch.setattr(torch, "__version__", "2.12.1")
    with pytest.raises(ConfigError, match="model.quantization=nf4 needs torch 2.13"):
        composite.load_pair(settings(folders), None, "cpu")
    with pytest.raises(ConfigError, match="quantised weights can't be trained"):
        settings(folders, **{"lora.r": 0})
    with pytest.raises(ValueError, match="quantised weights can't be trained"):
        composite.Gemma4WithDrafter.from_pretrained(*folders, quantization="nf4")
