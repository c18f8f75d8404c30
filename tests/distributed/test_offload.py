"""``parallel.cpu_offload``: the same training as without, clipped and skipped steps and resumes included; the plan."""

import numpy as np
import pytest
import torch
from checkpoint_run import TIMEOUT, config, everything
from pairs import make_pair
from ranks import run_ranks
from test_plan import configure
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from joint_train.checkpoint import Checkpointer
from joint_train.config import validate, with_overrides
from joint_train.distributed.mesh import init_mesh
from joint_train.distributed.parallelize import text_model
from joint_train.distributed.placement import local_numel
from joint_train.errors import ConfigError
from joint_train.plan.planner import Machine, make_plan
from joint_train.train.compact import CompactAdamW
from joint_train.train.optim import build_optimizer, total_norm, update
from joint_train.weights.composite import load_pair, meta_pair
from joint_train.weights.folders import read_configs
from joint_train.weights.loading import materialize

BASE = {"data.train": [{"path": "unused"}]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    make_pair(folder, "e2b")
    return folder


def run(rank, pair, save_to, first, then):
    """Three steps, saved after the second; the third once more with the other setting, from that checkpoint.

    The first is clipped, the second has a gradient that isn't finite on one rank. Returns all weights and states at the
    end of both, those after each step, the norms, and whether FSDP2 offloads.
    """
    results = []
    for overrides, start in ((first, 0), (then, 2)):
        cfg = config({"model.base": f"{pair}/base", "model.drafter": f"{pair}/drafter", **overrides})
        model = load_pair(cfg, init_mesh(cfg.parallel), torch.device("cpu")).train()
        optimizer = build_optimizer(model, cfg.optim, cfg.parallel.cpu_offload == "optimizer")
        checkpointer = Checkpointer(save_to, cfg.checkpoint, timeout_seconds=TIMEOUT)
        if start:
            assert checkpointer.resume("auto", model, optimizer, config=cfg)[1] == {"step": 2}
        steps, norms = [], []
        for step in range(start + 1, 4):
            ids = torch.randint(3, 240, (2, 12), generator=torch.Generator().manual_seed(10 * step + rank))
            model(ids, labels=ids).loss.backward()
            if step == 2 and rank == 1:
                next(p.grad.to_local() for p in model.drafter.parameters() if p.grad.to_local().numel()).fill_(np.inf)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            reference = torch.stack([g.full_tensor().double().square().sum() for g in gradients]).sum().sqrt()
            found = update(optimizer, model, 0.05, 1.0, 0.05)
            norms.append((found["grad_norm"].item(), reference.item(), total_norm(gradients).item()))
            optimizer.zero_grad()
            if step == 2:
                checkpointer.save(2, model, optimizer, {"step": 2}, config=cfg)
            steps.append(everything(model, optimizer))
        checkpointer.close()
        groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
        offloaded = {p.offload_to_cpu for group in groups if group for p in group.fsdp_params}
        results.append((steps, norms, offloaded))
    return results


@pytest.mark.parametrize("mode", ["optimizer", "all"])
def test_the_same_training_as_without(pair, tmp_path, mode):
    other = {"parallel.cpu_offload": mode}
    ((plain, norms, offloaded), (resumed, *_)) = run_ranks(run, 2, pair, tmp_path / "a", {}, other)[0]
    ((moved, moved_norms, moved_offloaded), (back, *_)) = run_ranks(run, 2, pair, tmp_path / "b", other, {})[0]
    assert offloaded == {False} and moved_offloaded == {mode == "all"}
    for (norm, reference, after), step in zip(norms, (1, 2, 3), strict=True):
        if step == 2:
            assert not np.isfinite(norm)
        else:
            assert norm == pytest.approx(reference, rel=1e-5) and norm > 0.2
            assert after < 0.08  # the gradients of both models are clipped to 0.05
    np.testing.assert_allclose(norms, moved_norms, rtol=1e-6)
    for name, value in plain[0].items():
        np.testing.assert_array_equal(value, plain[1][name], name)  # nothing changed, neither weights nor states
    assert any((plain[1][name] != value).any() for name, value in plain[2].items())
    for ends in (moved, [None, None, *resumed], [None, None, *back]):
        for step, end in enumerate(ends):
            if end is not None:
                assert end.keys() == plain[step].keys()
                for name, value in end.items():
                    np.testing.assert_array_equal(value, plain[step][name], name)


def devices(rank, pair):
    """Where shards, other parameters and buffers are when the device that computes isn't the CPU."""
    cfg = config({"parallel.cpu_offload": "all", "model.base": f"{pair}/base", "model.drafter": f"{pair}/drafter"})
    model = load_pair(cfg, init_mesh(cfg.parallel), torch.device("cpu"))
    values = {name: p.full_tensor() for name, p in model.base.named_parameters()}
    model.base.to_empty(device="meta")
    materialize(model.base, pair / "base", "meta", "cpu")
    same = all(torch.equal(values[name], p.full_tensor()) for name, p in model.base.named_parameters())
    sharded = {p.device.type for p in model.base.parameters() if isinstance(p, DTensor)}
    return sharded, {b.device.type for b in model.base.buffers()}, same


def test_shards_are_on_the_cpu_and_buffers_on_the_device(pair):
    assert run_ranks(devices, 2, pair) == [({"cpu"}, {"meta"}, True)] * 2


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "adamw_8bit"])
def test_states_of_weights_on_a_device_are_on_the_cpu(name):
    """The meta device stands for a GPU: its weights get states on the CPU, in the shapes of others."""
    weight = torch.zeros(64, 256, device="meta")
    there, here = (
        CompactAdamW([{"params": [p], "lr": 1.0, "weight_decay": 0.0}], name, (0.9, 0.95), 1e-8, on_host)
        for p, on_host in ((torch.zeros(64, 256), False), (weight, True))
    )
    for entry in there.entries(weight).values():
        state = here.zeros(weight, *entry)
        assert state.device.type == "cpu" and (state.shape, state.dtype) == entry and not state.any()
    assert here.entries(weight) == there.entries(weight)


def low_precision_steps(rank, pair, name, mode):
    """Everything after two steps."""
    cfg = config({"model.base": f"{pair}/base", "model.drafter": f"{pair}/drafter", "optim.name": name})
    model = load_pair(cfg, init_mesh(cfg.parallel), torch.device("cpu")).train()
    optimizer = build_optimizer(model, cfg.optim, mode == "optimizer")
    for step in range(2):
        ids = torch.randint(3, 240, (2, 12), generator=torch.Generator().manual_seed(step))
        model(ids, labels=ids).loss.backward()
        update(optimizer, model, 1.0, 1.0)
        optimizer.zero_grad()
    return everything(model, optimizer)


@pytest.mark.parametrize("name", ["adamw_bf16", "adamw_8bit"])
def test_low_precision_states_may_be_on_the_cpu_too(pair, name):
    plain, moved = (run_ranks(low_precision_steps, 1, pair, name, mode)[0] for mode in ("none", "optimizer"))
    assert plain.keys() == moved.keys()
    for key, value in plain.items():
        np.testing.assert_array_equal(value, moved[key], key)


def test_generation_is_refused():
    validate(config({**BASE, "parallel.cpu_offload": "all", "eval.prompts": 0}))
    with pytest.raises(ConfigError, match="eval.prompts=0"):
        validate(config({**BASE, "parallel.cpu_offload": "all", "eval.prompts": 4}))
    with pytest.raises(ConfigError, match="choose one of none"):
        validate(config({**BASE, "parallel.cpu_offload": "most"}))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_plan_counts_host_memory_and_transfers(pair, accumulate):
    settings = {"data.max_length": 48, "loss.memory_budget_mb": 16, "optim.grad_accum": accumulate}
    machine = Machine(gpus=2, pcie_gb_per_second=25.0)
    cfg = configure(pair, **settings)
    plain, moved = (
        make_plan(with_overrides(cfg, {"parallel.cpu_offload": mode}), machine, "cpu") for mode in ("none", "all")
    )
    model = meta_pair(cfg, *read_configs(cfg.model.base, cfg.model.drafter), torch.float32)
    local = {p: local_numel(p.shape, 2) * 4 for p in model.parameters()}
    everything = sum(local.values())
    trained = sum(size for p, size in local.items() if p.requires_grad)
    assert plain.host == 0 and set(plain.transfers.values()) == {0} and plain.transfer_seconds(machine) == 0
    assert moved.host == everything + 3 * trained  # weights; gradients and two moments
    # In a micro-batch, layers are gathered forward and backward, everything else once; gradients go back once.
    layers = sum(local[p] for layer in text_model(model.base).layers for p in layer.parameters())
    assert moved.transfers == {"to device": accumulate * (everything + layers), "to host": accumulate * trained}
    seconds = accumulate * (everything + layers + trained) / 25e9
    assert moved.transfer_seconds(machine) == pytest.approx(seconds)
    hidden = plain.compute_seconds(machine)
    total = sum(moved.network_seconds(machine).values()) + seconds
    assert moved.exposed_seconds(machine) >= total - hidden - 1e-12
    for part in ("weights (this rank's shard)", "optimizer states"):
        assert plain.memory[part] > 0 and moved.memory[part] == 0
    states = make_plan(with_overrides(cfg, {"parallel.cpu_offload": "optimizer"}), machine, "cpu")
    assert plain.peak - states.peak == plain.memory["optimizer states"] == states.host == 2 * trained
    assert states.transfers == {"to device": 2 * trained, "to host": 2 * trained}  # once a step
    assert states.exposed_seconds(machine) == pytest.approx(plain.exposed_seconds(machine) + 4 * trained / 25e9)
    assert moved.memory["gradients"] < 0.7 * trained <= plain.peak - moved.peak
