"""LoRA on the base: against low-rank terms beside plain layers, on two ranks and in one process."""

import math
from types import SimpleNamespace
from unittest import mock

import peft
import pytest
import torch
from pairs import build_pair, make_pair
from ranks import run_ranks
from test_compile import compile_with_eager_kernels
from test_parallel import K, all_counts, batch, config, full, step, updates
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from joint_train import Gemma4WithDrafter
from joint_train.config import load, validate, with_overrides
from joint_train.distributed.lora import (
    adapter_parameters,
    delta_weight,
    inject_adapters,
    merged_weight,
    peft_config_of,
)
from joint_train.distributed.mesh import data_rank, init_mesh
from joint_train.distributed.parallelize import prepare, text_model
from joint_train.distributed.placement import shard_dim, sharded_like
from joint_train.errors import ConfigError
from joint_train.weights.composite import load_pair
from joint_train.weights.folders import read_config
from joint_train.weights.loading import build_meta

R, ALPHA = 4, 6.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UPDATE = {"optim__eps": 0.01, "optim__lr": 0.01, "optim__drafter_lr": 0.02, "optim__max_grad_norm": 0.5}


def lora_config(folders, **overrides):
    names = {"lora__r": R, "lora__alpha": ALPHA, "activation_checkpointing__base": "full", **UPDATE}
    cfg = config(**names | overrides)
    cfg.model.base, cfg.model.drafter = map(str, folders)
    return cfg


class LowRank(nn.Module):
    """W x + alpha / r · B (A x), for a linear layer W that stays as it is."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor):
        super().__init__()
        self.linear, self.a, self.b = linear, nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + ALPHA / R * (x @ self.a.T @ self.b.T)


def values(shape: str) -> dict[str, Tensor]:
    """A and B of every adapted layer, as `….q_proj.a` and `.b`."""
    generator, found = torch.Generator().manual_seed(5), {}
    layers = text_model(build_pair(shape)[0]).layers
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] in TARGETS:
                out, inside = module.weight.shape
                a, b = torch.randn(R, inside, generator=generator), torch.randn(out, R, generator=generator)
                found |= {f"{index}.{name}.a": a / math.sqrt(inside), f"{index}.{name}.b": b / 10}
    return found


def plain_pair(shape: str, cfg) -> Gemma4WithDrafter:
    """The pair whose frozen weights have low-rank terms, without peft."""
    base, drafter = build_pair(shape)
    base.requires_grad_(False)
    found = values(shape)
    for name in {name[:-2] for name in found}:
        layers = text_model(base).layers
        layers.set_submodule(name, LowRank(layers.get_submodule(name), found[f"{name}.a"], found[f"{name}.b"]))
    model = Gemma4WithDrafter(
        base, drafter, drafter_num_steps=K, base_grad_scale=cfg.drafter.base_grad_scale, loss=cfg.loss
    )
    off = {"activation_checkpointing.base": "none", "activation_checkpointing.drafter": "none"}
    prepare(model, with_overrides(cfg, off | {"parallel.compile": False}))
    return model.train()


def plain_name(name: str) -> str:
    """An adapter's weight as in :func:`values`, by its name under peft or in a :func:`plain_pair`; others stay."""
    path, found, _ = name.rpartition(".lora_")
    if found:
        return f"{path.partition('.layers.')[2]}.{name[len(path) + 6].lower()}"
    return name.partition(".layers.")[2] if name.endswith((".a", ".b")) else name


@torch.no_grad()
def set_values(model: Gemma4WithDrafter, shape: str) -> None:
    found = values(shape)
    for name, parameter in adapter_parameters(model.base).items():
        value = found[plain_name(name)]
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)


def sharded_updates(rank: int, folders, shape: str, options: dict):
    """Gradients of a step, norms and weights of two updates, and what the base is made of."""
    cfg = lora_config(folders, **options)
    mesh = init_mesh(cfg.parallel)
    with mock.patch.object(nn.Module, "compile", compile_with_eager_kernels):
        model = load_pair(cfg, mesh, "cpu").train()
    set_values(model, shape)
    index, size = data_rank(mesh)
    rows = {name: x.chunk(size)[index] for name, x in batch().items()}
    step(model, rows, all_counts(batch()))
    grads = {plain_name(n): full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    kinds = {(p.requires_grad, p.grad is not None, p.dtype) for p in model.base.parameters()}
    norms, weights, optimizer = updates(model, cfg, rows)
    states = sum(map(bool, optimizer.state.values()))
    trained = sum(p.requires_grad for p in model.parameters())
    assert states == trained == len(optimizer.state)
    graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    return grads, norms, {plain_name(n): p for n, p in weights.items()}, kinds, graphs


@pytest.mark.parametrize("shape, ranks, options", [
    ("e2b", 2, {}), ("26b_a4b", 2, {"drafter__base_grad_scale": 1.0}), ("text", 4, {"parallel__dp_replicate": 2}),
    ("text", 2, {"parallel__cpu_offload": "all"}),
    pytest.param("31b", 2, {"parallel__compile": True}, marks=pytest.mark.slow),
])  # fmt: skip
def test_sharded_equals_low_rank_terms_beside_plain_layers(tmp_path, shape, ranks, options):
    folders = make_pair(tmp_path, shape)
    cfg = lora_config(folders, **options)
    reference = plain_pair(shape, cfg)
    step(reference, batch(), all_counts(batch()))
    expected = {plain_name(n): p.grad.clone() for n, p in reference.named_parameters() if p.grad is not None}
    before = {plain_name(n): p.detach().clone() for n, p in reference.named_parameters()}
    expected_norms, after, _ = updates(reference, cfg, batch())
    after = {plain_name(n): p for n, p in after.items()}
    grads, norms, weights, kinds, graphs = run_ranks(sharded_updates, ranks, folders, shape, options)[0]
    assert kinds == {(True, True, torch.float32), (False, False, torch.float32)}
    assert bool(graphs) == cfg.parallel.compile
    assert grads.keys() == expected.keys() > values(shape).keys()
    for name, gradient in grads.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-5, f"{name}: relative error {error:.2e}"
    torch.testing.assert_close(norms, expected_norms, rtol=1e-4, atol=0)
    for name in expected:
        assert not torch.equal(after[name], before[name]), name
        torch.testing.assert_close(weights[name], after[name], rtol=1e-5, atol=1e-5)


def of_the_drafter_alone(rank: int, folders):
    """Gradients of the adapters from the drafter's losses alone, in bfloat16, and what the weights are kept in."""
    cfg = lora_config(folders, precision__compute="bfloat16")
    model = load_pair(cfg, init_mesh(cfg.parallel), "cpu").train()
    start = {name: full(p.detach()).clone() for name, p in adapter_parameters(model.base).items()}
    set_values(model, "e2b")
    counts = all_counts(batch())
    weights = model.loss_weights(counts)
    weights[0] = 0
    model.loss_weights = lambda _: weights
    step(model, batch(), counts)
    kinds = {(p.requires_grad, p.dtype, isinstance(p, DTensor)) for p in model.base.parameters()}
    return {n: full(p.grad).norm().item() for n, p in adapter_parameters(model.base).items()}, kinds, start


def test_the_drafters_losses_reach_the_adapters_and_frozen_weights_are_kept_in_bfloat16(tmp_path):
    folders = make_pair(tmp_path)
    norms, kinds, start = run_ranks(of_the_drafter_alone, 2, folders)[0]
    assert kinds == {(True, torch.float32, True), (False, torch.bfloat16, True)}
    layer = "model.language_model.layers.{}.{}.lora_A.default.weight"
    for number in (1, 2):  # the last layers of each type that compute their own keys and values
        assert norms[layer.format(number, "self_attn.k_proj")] > 0
        assert norms[layer.format(number, "self_attn.v_proj")] > 0
    assert norms[layer.format(4, "mlp.down_proj")] > 0  # through the hidden state
    whole = load_pair(lora_config(folders), None, "cpu")
    ours = adapter_parameters(whole.base)
    assert start.keys() == ours.keys() and all(torch.equal(start[name], p) for name, p in ours.items())
    bound = 1 / math.sqrt(64)
    a = ours[layer.format(0, "self_attn.q_proj")]
    assert 0.9 * bound < a.abs().max() <= bound and a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not any(p.any() for name, p in ours.items() if ".lora_B." in name)
    again = adapter_parameters(load_pair(lora_config(folders, seed=1), None, "cpu").base)
    assert not torch.equal(again[layer.format(0, "self_attn.q_proj")], a)


def test_the_api_takes_pefts_own_configuration(tmp_path):
    folders = make_pair(tmp_path, "multimodal")  # whose towers have layers of the same names
    given = peft.LoraConfig(r=R, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"])
    ids = batch()["input_ids"]
    plain = Gemma4WithDrafter.from_pretrained(*folders, drafter_num_steps=2)(input_ids=ids).logits
    model = Gemma4WithDrafter.from_pretrained(*folders, drafter_num_steps=2, peft_config=given)
    assert torch.equal(model(input_ids=ids).logits, plain)
    trained = {n for n, p in model.base.named_parameters() if p.requires_grad}
    assert trained == adapter_parameters(model.base).keys() and len(trained) == 2 * 2 * 5
    assert not any("tower" in name for name in trained)
    assert model.base.model.language_model.layers[0].mlp.down_proj.scaling == {"default": 8 / math.sqrt(R)}
    with pytest.raises(ValueError, match="freeze_base_for_drafter=True nothing of it"):
        Gemma4WithDrafter.from_pretrained(*folders, peft_config=given, freeze_base_for_drafter=True)


@pytest.mark.parametrize("wrong, said", [
    (dict(use_dora=True), "use_dora=True: only plain LoRA"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save=.*only plain LoRA"),
    (dict(init_lora_weights="gaussian"), "init_lora_weights='gaussian': only plain"),
    (dict(target_modules=["q_proj", "lm_head"]), "names lm_head, which isn.t a linear layer of the decoder.*Embedding"),
    (dict(target_modules=["embed_tokens"]), "embed_tokens, which isn.t a linear layer"),
    (dict(target_modules=["query"]), "not found in the base model.* linear layers are .*q_proj"),
])  # fmt: skip
def test_adapters_that_cannot_work_are_refused(tmp_path, wrong, said):
    base = build_meta(read_config(make_pair(tmp_path)[0]), torch.float32)
    with pytest.raises(ConfigError, match=said):
        inject_adapters(base, peft.LoraConfig(**wrong), text_model(base))


@pytest.mark.parametrize("wrong, said", [
    ({"freeze.base": True}, "lora.r=8 trains adapters on the base, and freeze.base=true .*set freeze.base=false"),
    ({"freeze.towers": False}, "set freeze.towers=true, or lora.r=0"),
    ({"lora.alpha": 0}, "lora.alpha=0.*above 0"),
    ({"lora.dropout": 1}, "lora.dropout=1.*below 1"),
    ({"lora.target_modules": []}, "lora.target_modules is empty"),
    ({"lora.r": -1}, "lora.r=-1: must be at least 0"),
])  # fmt: skip
def test_a_configuration_that_cannot_work_is_refused(wrong, said):
    cfg = load(["+experiment=starter", "pair=/nowhere", "lora.r=8"])
    assert peft_config_of(cfg.lora).r == 8
    with pytest.raises(ConfigError, match=said):
        validate(with_overrides(cfg, wrong))


def test_adapters_without_peft_are_refused(monkeypatch):
    cfg = load(["+experiment=starter", "pair=/nowhere", "lora.r=8"])
    monkeypatch.setattr("joint_train.config.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lora.r=8 needs the peft package: pip install 'joint-train\[lora\]'"):
        validate(cfg)


def of_column_shards(rank: int) -> tuple[Tensor, Tensor]:
    """What adapters add to a weight that is cut by its columns, and the two together; whole."""
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("dp_shard",))
    weight, a, b = column_values()
    assert shard_dim(weight.shape, 3) == 1  # 4 rows over 3 ranks would be padded to 6

    def cut(x: Tensor, dim: int) -> SimpleNamespace:
        return SimpleNamespace(weight=distribute_tensor(x, mesh, [Shard(dim)]))

    module = SimpleNamespace(
        base_layer=cut(weight, 1),
        lora_A={"default": cut(a, 0)},
        lora_B={"default": cut(b, 0)},
        scaling={"default": 0.5},
    )
    return sharded_like(delta_weight(module), module.base_layer.weight).full_tensor(), merged_weight(
        module
    ).full_tensor()


def column_values() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in ((4, 6), (2, 6), (4, 2)))


def test_adapters_are_merged_into_column_shards():
    weight, a, b = column_values()
    for change, sum_of_both in run_ranks(of_column_shards, 3):
        torch.testing.assert_close(change, 0.5 * b @ a)
        torch.testing.assert_close(sum_of_both, weight + 0.5 * b @ a)
