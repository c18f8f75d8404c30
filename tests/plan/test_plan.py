"""The plan against reality: parameters exactly, FLOPs within 2 %, the peak of real steps within 15 %."""

import ctypes
import gc
import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from configs import compose
from pairs import SHAPES, make_pair
from ranks import run_ranks
from torch.utils.flop_counter import FlopCounterMode

from joint_train.config import with_overrides
from joint_train.errors import ConfigError
from joint_train.plan import report
from joint_train.plan.__main__ import main
from joint_train.plan.fits import longest, savings
from joint_train.plan.planner import GIB, Machine, count_parameters, make_plan
from joint_train.plan.step import simulate
from joint_train.weights.composite import load_pair, meta_pair
from joint_train.weights.folders import read_configs
from joint_train.weights.released import CONFIGS, released_config

CPU = dict(device_type="cpu")


def configure(folder, **settings):
    pair = {"model.base": f"{folder}/base", "model.drafter": f"{folder}/drafter"}
    recomputed = {f"activation_checkpointing.{part}": "full" for part in ("base", "drafter")}
    return compose({**pair, **recomputed, "data.max_length": 48, "loss.memory_budget_mb": 16, **settings})


def released(name, **settings):
    cfg = configure("", **{"data.max_length": 2048, "loss.memory_budget_mb": 512, **settings})
    cfg.model.base, cfg.model.drafter = f"google/gemma-4-{name}-it", f"google/gemma-4-{name}-it-assistant"
    return cfg


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    for shape in SHAPES:
        make_pair(root / shape, shape)
    return root


# Parameters


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_exact(pairs, shape):
    cfg = configure(pairs / shape, **{"loss.centroid_weight": 0.1 if shape == "text" else 0.0})
    counted = count_parameters(meta_pair(cfg, *read_configs(cfg.model.base, cfg.model.drafter), torch.float32))
    pair = load_pair(cfg, None, "cpu")
    real = list(pair.parameters())  # a tied weight once
    assert sum(every for every, _ in counted.values()) == sum(p.numel() for p in real)
    assert sum(trained for _, trained in counted.values()) == sum(p.numel() for p in real if p.requires_grad)
    assert counted["base: embedding and head"][0] == pair.base.lm_head.weight.numel()
    assert counted["drafter: embedding and head"][0] == pair.drafter.lm_head.weight.numel()
    towers = sum(
        p.numel()
        for name in ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
        if getattr(pair.base.model, name, None) is not None
        for p in getattr(pair.base.model, name).parameters()
    )
    assert counted.get("base: towers and projections", (0, 0)) == (towers, 0)
    experts = sum(p.numel() for name, p in pair.base.named_parameters() if ".experts." in name or ".router." in name)
    assert counted.get("base: experts", (0, 0))[0] == experts


@pytest.mark.parametrize(
    ("name", "billions"), [("E2B", 4.6), ("E4B", 7.5), ("26B-A4B", 25.2), ("31B", 30.7), ("12B", 11.9)]
)
def test_released_sizes(name, billions):
    """Of the text model: the published numbers, where the cards give them (25.2B, 30.7B)."""
    cfg = released(name)
    configs = [released_config(path) for path in (cfg.model.base, cfg.model.drafter)]
    parts = count_parameters(meta_pair(cfg, *configs, torch.bfloat16))
    text = sum(every for part, (every, _) in parts.items() if part.startswith("base") and "towers" not in part)
    assert text / 1e9 == pytest.approx(billions, abs=0.05)


def test_released_pairs_fit_together():
    from joint_train.pair.compatibility import check_pair

    names = [name for name in CONFIGS if not name.endswith("-assistant")]
    assert len(names) == 5
    for name in names:
        check_pair(released_config(name), released_config(f"{name}-assistant"))
    for pair in ((name, name), (f"{name}-assistant", f"{name}-assistant"), (f"{name}-assistant", name)):
        with pytest.raises(ConfigError, match="Are base and drafter swapped?"):
            check_pair(*map(released_config, pair))
    assert released_config("google/gemma-4-e2b-it", {"sliding_window": 100}).text_config.sliding_window == 100
    assert released_config("someone/else") is None


# FLOPs


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ("e2b", {"activation_checkpointing.base": "full"}),
        ("e2b", {"activation_checkpointing.base": "none", "drafter.num_steps": 1}),
        ("e2b", {"activation_checkpointing.base": "none", "activation_checkpointing.drafter": "none"}),
        ("e2b", {"activation_checkpointing.base": "every_n", "activation_checkpointing.every_n": 3}),
        ("26b_a4b", {"activation_checkpointing.base": "full"}),
        ("31b", {"freeze.base": True}),
        ("31b", {"loss.drafter": "ce", "data.micro_batch_size": 2}),
        ("multimodal", {"freeze.embeddings": True, "loss.centroid_weight": 0.1}),
        ("multimodal", {"lora.r": 4, "activation_checkpointing.base": "full"}),
    ],
)
def test_flops_are_those_of_a_real_step(pairs, shape, settings):
    cfg = configure(pairs / shape, **{"model.attn_implementation": "eager", **settings})
    pair = load_pair(cfg, None, "cpu").train()
    if shape == "26b_a4b":
        pair.base.set_experts_implementation("eager")  # torch doesn't count grouped matrix products
    ids = torch.randint(3, 240, (cfg.data.micro_batch_size, cfg.data.max_length))
    with FlopCounterMode(display=False) as counter:
        pair(ids, labels=ids, document_ids=torch.ones_like(ids)).loss.backward()
    meta = meta_pair(cfg, *read_configs(cfg.model.base, cfg.model.drafter), torch.float32)
    assert simulate(meta, cfg, shard=1).flops == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("shape", ["e2b", "26b_a4b"])
def test_model_flops_dont_depend_on_what_is_recomputed(pairs, shape):
    model_flops, recomputed = set(), {}
    for base, drafter in (("none", "none"), ("every_n", "none"), ("full", "none"), ("full", "full")):
        cfg = configure(pairs / shape, **{"activation_checkpointing.base": base, "drafter.num_steps": 3})
        cfg.activation_checkpointing.drafter = drafter
        plan = make_plan(cfg, Machine(gpus=1), **CPU)
        model_flops.add(plan.flops - plan.recomputed)
        recomputed[base, drafter] = plan.recomputed
    assert len(model_flops) == 1
    attention, part, base, both = recomputed.values()  # a fused kernel's backward makes the scores again
    assert 0 < attention < part < base < both < model_flops.pop() / 2


def test_attention_flops_of_a_fused_kernel(pairs):
    """2 matrix products forward and 5 backward, for every layer and round; eager attention has 2 and 4."""
    settings = {"activation_checkpointing.base": "none", "data.max_length": 512}
    flops = {}
    for kind in ("sdpa", "eager"):
        cfg = configure(pairs / "31b", **settings, **{"model.attn_implementation": kind})
        flops[kind] = simulate(
            meta_pair(cfg, *read_configs(cfg.model.base, cfg.model.drafter), torch.float32), cfg, 1
        ).flops
    heads = 4
    product = 2 * heads * 512 * 512  # times the head's size
    layers = 3 * 16 + 1 * 32 + cfg.drafter.num_steps * (2 * 16 + 1 * 32)
    assert flops["sdpa"] - flops["eager"] == product * layers


# Memory


def measured_peak(rank, cfg):
    """The most memory of its own that a rank had in two steps, over what it had before it loaded the pair.

    A short step comes before: libraries keep some 25 MiB from their first.
    """
    from joint_train.distributed.mesh import init_mesh

    libc = ctypes.CDLL("libc.so.6")
    for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: what is freed goes back to the system at once
        libc.mallopt(option, 65536)

    def anonymous():
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    def steps(length, count):
        pair = load_pair(cfg, mesh, "cpu").train()
        optimizer = torch.optim.AdamW([p for p in pair.parameters() if p.requires_grad], fused=True)
        for _ in range(count):
            ids = torch.randint(3, 100, (cfg.data.micro_batch_size, length))
            pair(ids, labels=ids, document_ids=torch.ones_like(ids)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    mesh = init_mesh(cfg.parallel)
    steps(16, 1)
    gc.collect()
    before, highest, done = anonymous(), 0, threading.Event()

    def watch():
        nonlocal highest
        while not done.wait(0.0005):
            highest = max(highest, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    steps(cfg.data.max_length, 2)
    done.set()
    watcher.join()
    return highest - before


@pytest.mark.parametrize(
    ("shape", "ranks", "checkpointing", "length", "sizes"),
    [
        ("e2b", 2, "none", 768, {"vocab_size": 4096, "vocab_size_per_layer_input": 4096, "hidden_size": 256}),
        ("31b", 1, "full", 768, {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048}),
        ("26b_a4b", 2, "every_n", 768, {"vocab_size": 4096, "hidden_size": 256, "moe_intermediate_size": 256}),
    ],
)
def test_peak_is_that_of_real_steps(tmp_path, shape, ranks, checkpointing, length, sizes):
    make_pair(tmp_path, shape, num_attention_heads=8, head_dim=32, global_head_dim=64, **sizes)
    cfg = configure(
        tmp_path,
        **{"data.max_length": length, "loss.memory_budget_mb": 64, "activation_checkpointing.base": checkpointing},
    )
    peaks = run_ranks(measured_peak, ranks, cfg)
    plan = make_plan(cfg, Machine(gpus=ranks), **CPU)
    print(f"{shape}: planned {plan.peak / 2**20:.0f} MiB, measured {[round(p / 2**20) for p in peaks]}")
    assert plan.peak == pytest.approx(max(peaks), rel=0.15)


def test_peak_of_adapters_is_that_of_real_steps(tmp_path):
    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048}
    make_pair(tmp_path, "31b", num_attention_heads=8, head_dim=32, global_head_dim=64, **sizes)
    settings = {"data.max_length": 768, "loss.memory_budget_mb": 64, "activation_checkpointing.base": "full"}
    settings |= {"activation_checkpointing.drafter": "full"}
    cfg, full = (configure(tmp_path, **settings, **more) for more in ({"lora.r": 8}, {}))
    peaks = run_ranks(measured_peak, 2, cfg)
    plan = make_plan(cfg, Machine(gpus=2), **CPU)
    print(f"planned {plan.peak / 2**20:.0f} MiB, measured {[round(p / 2**20) for p in peaks]}")
    assert plan.peak == pytest.approx(max(peaks), rel=0.15)
    assert plan.peak < 0.9 * make_plan(full, Machine(gpus=2), **CPU).peak


def test_adapters_are_all_that_a_checkpoint_has_of_the_base(pairs):
    cfg = configure(pairs / "31b", **{"lora.r": 4})
    plan, pair = make_plan(cfg, Machine(gpus=1), **CPU), load_pair(cfg, None, "cpu")
    trained = {name: p for name, p in pair.named_parameters() if p.requires_grad}
    base = sum(p.numel() for name, p in trained.items() if name.startswith("base."))
    assert plan.parameters["base: adapters"] == (base, base) and base > 0
    assert plan.parameters["base: layers"][1] == plan.parameters["base: embedding and head"][1] == 0
    assert plan.memory["optimizer states"] == 8 * sum(p.numel() for p in trained.values())
    assert plan.checkpoint == 4 * (
        3 * base + sum(p.numel() * (1 + 2 * p.requires_grad) for p in pair.drafter.parameters())
    )


def test_parts_of_the_memory(pairs):
    cfg = configure(pairs / "31b", **{"parallel.dp_shard": 4})
    plan = make_plan(cfg, Machine(), **CPU)
    pair = load_pair(cfg, None, "cpu")
    towers = {name: p for name, p in pair.named_parameters() if "_tower." in name or "embed_vision." in name}
    sharded = [p for name, p in pair.named_parameters() if name not in towers]
    shard = sum(4 * -(-p.shape[0] // 4) * p[0].numel() for p in sharded)  # fp32, rank 0 has the larger piece
    trained = sum(4 * -(-p.shape[0] // 4) * p[0].numel() for p in pair.parameters() if p.requires_grad)
    assert plan.memory["weights (this rank's shard)"] == shard
    assert plan.memory["frozen towers"] == sum(p.nbytes for p in towers.values()) > 0
    assert plan.memory["optimizer states"] == 2 * trained
    assert plan.checkpoint == 4 * sum(p.numel() * (1 + 2 * p.requires_grad) for p in pair.parameters())
    assert (plan.ranks, plan.tokens) == (4, 4 * cfg.data.max_length)

    # At the peak, in the loss: the roots' weights, and of the layers' one that is on its way, or all of them.
    layers = [4 * sum(p.numel() for p in layer.parameters()) for layer in pair.base.model.language_model.layers]
    whole = sum(4 * 4 * -(-p.shape[0] // 4) * p[0].numel() for p in sharded)
    assert plan.memory["gathered weights"] == whole - sum(layers) + max(layers)
    cfg.parallel.reshard_after_forward = False
    assert make_plan(cfg, Machine(), **CPU).memory["gathered weights"] == whole + max(layers)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("activation_checkpointing.base", "none"),
        ("activation_checkpointing.drafter", "none"),
        ("data.max_length", 96),
        ("data.micro_batch_size", 2),
        ("drafter.num_steps", 6),
        ("parallel.reshard_after_forward", False),
        ("parallel.dp_shard", 1),
        ("optim.grad_accum", 2),
        ("precision.reduce", "float32"),
    ],
)
def test_what_takes_more_memory_is_planned_to(pairs, setting, value):
    cfg = configure(
        pairs / "e2b", **{"parallel.dp_shard": 8, "loss.memory_budget_mb": 1, "precision.reduce": "bfloat16"}
    )
    less, more = make_plan(cfg, Machine(), **CPU), make_plan(with_overrides(cfg, {setting: value}), Machine(), **CPU)
    assert more.peak >= less.peak if setting == "precision.reduce" else more.peak > less.peak


def test_frozen_base_has_no_gradients_and_no_states(pairs):
    plan = make_plan(configure(pairs / "31b", **{"freeze.base": True}), Machine(gpus=1), **CPU)
    drafter = sum(trained for _, trained in plan.parameters.values())
    assert plan.memory["optimizer states"] == 2 * 4 * drafter
    assert all(trained == 0 for part, (_, trained) in plan.parameters.items() if part.startswith("base"))
    rounded = make_plan(
        configure(pairs / "31b", **{"freeze.base": True, "precision.compute": "bfloat16"}), Machine(gpus=1), **CPU
    )
    base = sum(size for part, (size, _) in plan.parameters.items() if part.startswith("base"))
    sharded = base - plan.parameters["base: towers and projections"][0]  # frozen towers are whole, and counted apart
    weights = "weights (this rank's shard)"
    assert rounded.memory[weights] == 2 * sharded + 4 * drafter == plan.memory[weights] - 2 * sharded
    assert rounded.checkpoint == plan.checkpoint  # the base isn't in it


# What it says


def test_31b_fits_on_eight_gpus_of_80_gb():
    plan = make_plan(released("31B"), Machine(gpus=8, gpu_memory_gb=80))
    assert 2048 * 8 == plan.tokens and 60 * GIB < plan.peak < Machine().usable
    parameters = 30.7e9
    assert plan.flops_per_token == pytest.approx(8 * parameters, rel=0.2)  # 6 N, and 2 N of recomputation


def test_longest_rows_fit_and_longer_ones_do_not(pairs):
    cfg = configure(pairs / "31b", **{"activation_checkpointing.base": "none"})
    between = make_plan(with_overrides(cfg, {"data.max_length": 700}), Machine(gpus=1)).peak
    machine = Machine(gpus=1, gpu_memory_gb=between / GIB, reserve=0.0)
    for start in (64, 2048):
        cfg.data.max_length = start
        assert longest(cfg, machine, make_plan(cfg, machine)) == 512
    tiny = replace(machine, gpu_memory_gb=1e-6)
    assert longest(cfg, tiny, make_plan(cfg, tiny)) == 0


def test_savings_are_settings_that_save(pairs):
    cfg = configure(pairs / "e2b", **{"activation_checkpointing.base": "none", "data.micro_batch_size": 4})
    peak = make_plan(cfg, Machine()).peak
    changes = savings(cfg, Machine())
    assert changes["activation_checkpointing.base=full"] < peak
    assert changes["data.micro_batch_size=1 optim.grad_accum=4"] < peak
    assert "parallel.reshard_after_forward=true" not in changes  # it is already


def test_command_line(pairs, capsys):
    folders = [f"model.base={pairs / 'e2b/base'}", f"model.drafter={pairs / 'e2b/drafter'}", "data.max_length=64"]
    assert main([*folders, "--gpus", "2", "--gpu-memory-gb", "0.6"]) == 0
    said = capsys.readouterr().out
    for words in (
        "Parameters",
        "per-layer embeddings",
        "It fits",
        "tokens a second",
        "checkpoint",
        "e2b/base/config.json",
    ):
        assert words in said
    assert main(["--gpu-memory-gb", "0.001", *folders]) == 3
    said = capsys.readouterr().out
    assert "It does not fit" in said and "Change first: " in said
    assert main([*folders, "--gpus", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["peak_bytes"] == sum(found["memory_bytes"].values()) and found["seconds"] > 0
    assert found["tokens"] == 128 and sum(part["all"] for part in found["parameters"].values()) > 1000


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["max_steps=300"], "max_steps=300 x 24 rows = 7,200 rows, "),
        (["epochs=2.5"], "epochs=2.5, 24 rows a step; the steps are counted when the data are tokenised"),
        (["data.mixture=epoch"], "epochs=1, 24 rows a step"),
        ([], "max_steps=1,000 x 24 rows = 24,000 rows, "),
    ],
)
def test_the_plan_says_how_long_the_run_is(pairs, capsys, monkeypatch, overrides, words):
    """2 GPUs with 3 accumulations of 4 rows; which memory it takes isn't asked."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(report, "longest", lambda *_: None)
    folders = [f"model.base={pairs / 'e2b/base'}", f"model.drafter={pairs / 'e2b/drafter'}", "data.max_length=32"]
    batch = ["data.micro_batch_size=4", "optim.grad_accum=3"]
    assert main([*folders, *batch, *overrides, "--gpus", "2"]) == 0
    assert words in capsys.readouterr().out


def test_command_line_errors(capsys, tmp_path):
    assert main(["model=gemma4_e2b", "data.maxlength=64"]) == 2
    assert "maxlength" in capsys.readouterr().err
    assert main([f"model.base={tmp_path}", f"model.drafter={tmp_path}"]) == 2
    assert "config.json" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        make_plan(configure(tmp_path / "nowhere"), Machine())
