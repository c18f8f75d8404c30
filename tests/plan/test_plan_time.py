"""What the plan says of a step's time: part by part, against arithmetic by hand and against what others measured."""

from collections import Counter
from dataclasses import replace
from time import process_time

import pytest
import torch
from pairs import make_pair
from test_plan import configure, released

from joint_train.config import with_overrides
from joint_train.pair.fused import written_out
from joint_train.pair.loss import Pass
from joint_train.plan import __main__ as command
from joint_train.plan import meter, planner, stand_ins
from joint_train.plan.ladder import LADDER, lowest, rungs
from joint_train.plan.machine import ATTENTION, Machine
from joint_train.plan.planner import make_plan
from joint_train.weights.composite import meta_pair
from joint_train.weights.folders import read_configs

# NeMo AutoModel, pull request 2436, comment of 27 June 2026: tokens a second of each of 8 H100, gemma-4-31B-it, one row
# of S = 4096 a GPU, no drafter; by what computed attention. The recipe there (gemma4_31b_ffpa_mock_8k.yaml): FSDP2,
# bfloat16 weights and AdamW, frozen embeddings, every layer recomputed, whole logits. Assumed here: text alone (each of
# its rows has an image), and norms as transformers writes them.
#   FFPA: its kernels at head_dim 512 do what ffpa-attn's bench/README.md says of an H200.
#   Flex: at head_dim 512 in blocks of 32 x 32, which no one has measured alone: what the difference from FFPA leaves.
#   SDPA: dense masks; cuDNN at head_dim 256, by what the difference leaves; memory-efficient at 512.
NEMO = [
    ("FFPA", 1117.5, "auto", {"flex 512 forward": 340.0, "flex 512 backward": 215.0}),
    ("Flex", 943.6, "auto", {"flex 512 forward": 45.0, "flex 512 backward": 26.0}),
    ("SDPA", 883.35, "sdpa", {"memory-efficient 256 forward": 350.0, "memory-efficient 256 backward": 220.0}),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("time")
    make_pair(folder, "31b")
    return folder


@pytest.mark.parametrize(("name", "measured", "attention", "kernels"), NEMO)
def test_a_published_step_within_a_fifth(name, measured, attention, kernels):
    settings = {"precision.params": "bfloat16", "freeze.embeddings": True, "model.attn_implementation": attention}
    machine = Machine(attention_tflops=ATTENTION | kernels)
    with written_out():
        plan = make_plan(released("31B", **{"data.max_length": 4096, **settings}), machine, base_alone=True)
    planned = plan.tokens / plan.ranks / plan.seconds(machine)
    print(f"{name}: planned {planned:.0f}, measured {measured}")
    assert planned == pytest.approx(measured, rel=0.2)


def test_products_are_those_of_the_layers(pair):
    """Without recomputation: two FLOPs a weight and token forward, four backward; the drafter's K times."""
    settings = {f"activation_checkpointing.{part}": "none" for part in ("base", "drafter")}
    cfg = configure(pair, **settings, **{"data.max_length": 512, "drafter.num_steps": 3})
    plan = make_plan(cfg, Machine(gpus=1))
    model = meta_pair(cfg, *read_configs(cfg.model.base, cfg.model.drafter), torch.float32)

    def weights(module, times):
        found = [
            m.weight.numel() for n, m in module.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n
        ]
        return times * sum(found)

    base = weights(model.base.model.language_model, 1) + weights(model.drafter.model, 3)
    drafter = 3 * model.drafter.pre_projection.weight.numel() + 2 * model.drafter.post_projection.weight.numel()
    assert plan.work["products"].flops["product"] == pytest.approx(6 * 512 * (base + drafter), rel=1e-6)
    vocabulary = [head.lm_head.weight.numel() for head in (model.base, model.drafter)]
    assert plan.work["loss"].flops["product"] == pytest.approx(6 * 512 * (vocabulary[0] + 3 * vocabulary[1]), rel=0.03)
    assert sum(work.flops.total() for work in plan.work.values()) == plan.flops
    # 31b's shape has 3 sliding layers and 1 full one, base and drafter: heads x head_dim is 4 x 16 and 4 x 32.
    ratio = plan.work["full attention"].flops.total() / plan.work["sliding attention"].flops.total()
    assert ratio > 2 * (1 + 3) / (3 + 3 * 3)


def test_norms_have_their_backward(pair):
    """Every operation of a norm that is written out counts as the norm's, forward, again and backward."""
    cfg = configure(pair)
    launches = {}
    for base in ("none", "full"):
        with written_out():
            plan = make_plan(with_overrides(cfg, {"activation_checkpointing.base": base}), Machine(gpus=1), "cpu")
        launches[base] = {part: work.launches for part, work in plan.work.items()}
    norms = launches["none"]["norms"]
    forward = launches["full"]["norms"] - norms
    assert norms >= 2 * forward > 0  # a backward is as many operations as a forward at least
    assert launches["full"]["loss"] == launches["none"]["loss"]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_fused_operators_belong_to_their_part_by_name(pair, recompute, monkeypatch):
    """Also where checkpointing repeats them; a norm's backward has a second kernel where there is a weight."""
    ran, charge = Counter(), meter.Meter.charge

    def charged(self, name, seen):
        before = {part: work.launches for part, work in self.work.items()}
        charge(self, name, seen)
        for part, work in self.work.items():
            ran[name, part] += work.launches - before[part]

    monkeypatch.setattr(meter.Meter, "charge", charged)
    settings = {f"activation_checkpointing.{part}": recompute for part in ("base", "drafter")}
    make_plan(configure(pair, **settings), Machine(gpus=1))
    parts = {name: {part for (other, part), count in ran.items() if other == name and count} for name, _ in ran}
    for name in ("rms_norm", "rms_norm_backward"):
        assert parts[name] == {"norms"}
    for name in ("geglu", "geglu_backward", "rotate", "rotate_backward"):
        assert parts[name] == {"element-wise"}
    if recompute == "none":
        layers = read_configs(str(pair / "base"), str(pair / "drafter"))[0].get_text_config().num_hidden_layers
        assert (
            ran["rms_norm_backward", "norms"] == 2 * ran["rms_norm", "norms"] - layers
        )  # values' norms have no weight


def test_each_part_takes_the_longer_of_its_two_times_and_the_host_bounds_the_sum(pair):
    plan, machine = make_plan(configure(pair), Machine()), Machine()
    times = plan.times(machine)
    for part, time in times.items():
        work = plan.work[part]
        assert time.memory == pytest.approx(work.bytes / 2900e9)
        assert time.seconds == max(time.compute, time.memory)
    device = sum(time.seconds for time in times.values()) + plan.exposed_seconds(machine)
    launches = sum(work.launches for work in plan.work.values())
    assert plan.seconds(machine) == pytest.approx(max(device, launches * 10e-6))
    slow = replace(machine, launch_us=1e4)
    assert plan.seconds(slow) == pytest.approx(launches * 1e-2) and plan.bound(slow).startswith("the host")
    quick = replace(machine, launch_us=0.0)
    assert plan.seconds(quick) == pytest.approx(device) and plan.bound(quick) in (*times, "communication")


def test_full_layers_are_dense_where_flex_has_no_room():
    cfg = released("E4B", **{"data.max_length": 4096})
    fits, dense = (make_plan(cfg, Machine(flex_head_dim=size)) for size in (512, 256))
    assert {kernel.split()[0] for kernel in fits.work["full attention"].flops} == {"flex"}
    assert {kernel.split()[0] for kernel in dense.work["full attention"].flops} == {"memory-efficient"}
    assert dense.work["sliding attention"] == fits.work["sliding attention"]
    assert dense.flops > fits.flops and dense.seconds(Machine()) > fits.seconds(Machine())


@pytest.mark.parametrize("shape", ["31b", "e2b"])
def test_loss_chunks_that_are_alike_are_counted_once(tmp_path, monkeypatch, shape):
    make_pair(tmp_path, shape)
    cfg = configure(tmp_path, **{"data.max_length": 2048 + 300, "loss.memory_budget_mb": 1})
    rows, chunks = [], Pass._chunk

    def counted(self, part, terms):
        rows.append(part.stop - part.start)
        return chunks(self, part, terms)

    monkeypatch.setattr(Pass, "_chunk", counted)
    short = make_plan(cfg, Machine(gpus=1))
    some, _ = list(rows), rows.clear()
    monkeypatch.setattr(stand_ins, "_chunks", lambda meter: Pass.walk_chunks)
    every = make_plan(cfg, Machine(gpus=1))
    assert len(rows) > 4 and some == [*rows[:2], *([rows[-1]] if rows[-1] != rows[0] else [])]
    assert short == every


def test_a_compiled_loss_reads_logits_a_few_times():
    """26 bytes a logit and round, 30 with ordered embeddings, against some hundred of separate operations."""
    cfg = released("E4B", **{"data.max_length": 4096})
    plain, compiled = (make_plan(with_overrides(cfg, {"loss.compile": way}), Machine()) for way in (False, True))
    logits = 4096 * 262_144
    apart = plain.work["loss"].bytes - compiled.work["loss"].bytes
    assert apart > 4 * 60 * logits
    assert compiled.work["loss"].flops.total() == pytest.approx(plain.work["loss"].flops.total(), rel=0.01)
    assert compiled.work["loss"].launches < 0.6 * plain.work["loss"].launches


@pytest.mark.parametrize(("model", "steps"), [("gemma4_e2b", 5), ("gemma4_31b", 6)])
def test_a_plan_simulates_few_steps_whatever_the_rows(model, steps, monkeypatch, capsys):
    """It took three minutes for E2B, whose rows reach 2**20 tokens."""
    calls, simulate, before = [], planner.simulate, process_time()
    monkeypatch.setattr(planner, "simulate", lambda *args, **kwargs: calls.append(1) or simulate(*args, **kwargs))
    assert command.main([f"model={model}"]) == 0
    assert len(calls) <= steps and "The longest rows that fit" in capsys.readouterr().out
    assert process_time() - before < 30  # 5 s on a core that nobody shares; imports are 4 s of a command's 10


# What auto chooses


@pytest.mark.parametrize("fitting", range(len(LADDER) + 1))
def test_the_first_rung_that_fits(fitting):
    for guess in range(len(LADDER)):
        tried = []
        found = lowest(
            len(LADDER), lambda rung, tried=tried: tried.append(rung) or rung >= fitting, lambda guess=guess: guess
        )
        assert found == min(fitting, len(LADDER) - 1)
        assert len(tried) == len(set(tried)) <= 3 + abs(found - max(guess, 1))


def test_auto_is_the_least_that_fits(tmp_path):
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024}
    make_pair(tmp_path, "31b", **sizes)
    auto = {f"activation_checkpointing.{part}": "auto" for part in ("base", "drafter")}
    cfg = configure(tmp_path, **auto, **{"data.max_length": 1024, "loss.memory_budget_mb": 1})
    plans = [make_plan(with_overrides(cfg, rung), Machine(gpus=1)) for rung in rungs(cfg.activation_checkpointing)]
    peaks, recomputed = [plan.peak for plan in plans], [plan.recomputed for plan in plans]
    # The drafter by layers repeats a little less than by rounds, and keeps more where rows are short.
    assert len(plans) == len(LADDER) and recomputed[:-1] == sorted(recomputed[:-1])
    for memory in (max(peaks), *peaks, min(peaks) - 1):
        machine = Machine(gpus=1, gpu_memory_gb=memory / 2**30, reserve=0.0)
        plan = make_plan(cfg, machine)
        first = next((i for i, peak in enumerate(peaks) if peak <= memory), len(peaks) - 1)
        if sorted(peaks, reverse=True) == peaks:
            assert plan.chosen == rungs(cfg.activation_checkpointing)[first]
        assert plan.peak <= memory or memory < min(peaks)
    cfg.activation_checkpointing.base = "full"  # what is set stays
    assert set(make_plan(cfg, Machine(gpus=1)).chosen) == {"activation_checkpointing.drafter"}
    assert make_plan(configure(tmp_path), Machine(gpus=1)).chosen == {}


def test_inputs_on_the_host_are_counted():
    settings = {"activation_checkpointing.offload": True, "checkpoint.background": True}
    machine, length = Machine(), 32_768
    here, moved = (
        make_plan(released("E4B", **{"data.max_length": length}, **more), machine) for more in ({}, settings)
    )
    layers, hidden, per_layer, rounds = 42, 2560, 256, 4
    inputs = 2 * length * (layers * (hidden + per_layer) + rounds * hidden)  # a round's is the state
    assert moved.host["inputs of what is recomputed"] == pytest.approx(inputs, rel=0.02)
    assert moved.transfers["to host"] == moved.transfers["to device"] == moved.host["inputs of what is recomputed"]
    assert here.peak - moved.peak > 0.25 * inputs  # the peak is elsewhere then
    shards = sum(moved.memory[part] for part in ("weights (this rank's shard)", "frozen towers", "optimizer states"))
    assert moved.host["staging of background saves"] == pytest.approx(shards, rel=0.1) and here.host == {}
