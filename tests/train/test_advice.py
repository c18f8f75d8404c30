"""What a run says at its start about settings that can't work well."""

import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch

from joint_train.config import config_to_save, load
from joint_train.plan.planner import Machine, make_plan, meta_pair, read
from joint_train.train.advice import (
    generation_prompts,
    out_of_memory,
    say_frozen,
    say_plan,
    say_resumed,
    say_run,
    warn_of_base_after,
    warn_of_grace,
    warn_of_memory,
    warn_of_padding,
    warn_of_validation,
    warn_of_warmup,
)
from joint_train.train.optim import lr_factor


@pytest.fixture(scope="module")
def plans():
    def of(model, gpus, *overrides):
        cfg = load([f"model={model}", "data.train=[{path: unused}]", *overrides])
        machine = Machine(gpus=gpus)
        return cfg, make_plan(cfg, machine), machine

    sharded = of("gemma4_26b_a4b", 512, "parallel.dp_shard=512")
    return {"26b over 512": sharded, "31b": of("gemma4_31b", 8), "e2b": of("gemma4_e2b", 1)}


def test_a_generation_that_would_outlast_the_validation_is_off_with_a_sentence(plans, caplog):
    caplog.set_level(logging.INFO)
    cfg, plan, machine = plans["31b"]
    forwards = cfg.eval.max_new_tokens  # one prompt on each of 8 ranks
    # Each forward gathers the 60 layers over NVLink and reads the weights.
    layers = plan.communication["all-gather"]["layers"] / 2
    by_hand = forwards * (7 / 8 * layers / 350e9 + 2 * sum(n for n, _ in plan.parameters.values()) / 2900e9)
    assert plan.generation_seconds(machine, forwards) == pytest.approx(by_hand)
    assert by_hand > plan.validation_seconds(machine, cfg.eval.batches)
    assert generation_prompts(cfg.eval, cfg.parallel, plan, machine, "cuda") == 0
    assert "no assisted generation" in caplog.text and "eval.prompts=8 turns it on" in caplog.text
    assert generation_prompts(cfg.eval, cfg.parallel, plan, machine, "cpu") == 8
    cfg.eval.prompts = 3
    assert generation_prompts(cfg.eval, cfg.parallel, plan, machine, "cuda") == 3
    cfg, plan, machine = plans["e2b"]
    assert plan.generation_seconds(machine, 8 * 64) < plan.validation_seconds(machine, 1000)
    cfg.eval.batches = 1000
    assert generation_prompts(cfg.eval, cfg.parallel, plan, machine, "cuda") == 8


def test_a_grace_period_that_a_save_outlasts_is_named_at_the_start(plans, caplog):
    cfg, plan, machine = plans["31b"]
    slow = Machine(gpus=8, disk_gb_per_second=2.0)
    warn_of_grace(cfg.checkpoint, plan, slow, "cuda")
    seconds = plan.checkpoint / 2e9
    assert seconds > 120 and f"takes {seconds:.0f} s at 2 GB/s" in caplog.text
    assert f"Set checkpoint.grace_seconds={int(1.5 * seconds)}" in caplog.text
    caplog.clear()
    cfg.checkpoint.grace_seconds = 600
    warn_of_grace(cfg.checkpoint, plan, slow, "cuda")
    assert caplog.text == ""


def test_shards_that_do_not_divide_the_weights_are_named_at_the_start(plans, caplog):
    cfg, plan, machine = plans["26b over 512"]
    base_config, drafter_config, _ = read(cfg)
    model = meta_pair(cfg, base_config, drafter_config, torch.bfloat16)
    whole = padded = 0
    for name, p in model.named_parameters():
        if "tower" in name or "embed_vision" in name:
            continue  # frozen: whole on every rank
        even = any(size % 512 == 0 for size in p.shape)
        rows = -(-p.shape[0] // 512) * 512
        keeps = even and (p.shape[0] % 512 == 0 or rows > 1.125 * p.shape[0])
        whole, padded = whole + p.numel(), padded + (p.numel() if keeps else rows * p[0].numel())
    assert plan.padding == pytest.approx(padded / whole - 1) and plan.padding > 0.1
    warn_of_padding(plan)
    assert "over 512 shards the weights take" in caplog.text and "parallel.dp_replicate=8" in caplog.text
    caplog.clear()
    warn_of_padding(plans["31b"][1])
    assert plans["31b"][1].padding < 0.01 and caplog.text == ""


def composed(*overrides: str):
    return load(["model=gemma4_e2b", "data.train=[{path: unused}]", *overrides])


@pytest.mark.parametrize(
    "change, changed",
    [
        ([], []),
        (["max_steps=200"], ["base"]),  # the drafter's rate is still at its peak
        (["max_steps=75"], ["base", "drafter"]),
        (["optim.schedule=constant"], ["base"]),
        (["optim.drafter_schedule=null"], ["drafter"]),
        (["optim.warmup_steps=80"], ["base", "drafter"]),
        (["optim.drafter_lr=2e-4"], ["drafter"]),
        (["optim.weight_decay=0.5", "data.max_length=96"], []),
    ],
)
def test_a_resume_says_where_it_goes_on_and_what_a_change_does_to_the_learning_rates(tmp_path, caplog, change, changed):
    caplog.set_level(logging.INFO)
    old = composed("max_steps=100", "optim.warmup_steps=10")
    new = composed("max_steps=100", "optim.warmup_steps=10", *change)
    (tmp_path / "config.json").write_text(json.dumps(config_to_save(old)))
    say_resumed(new, tmp_path, 72, (new.max_steps, new.max_steps), (None, None))
    assert f"resumed from step 72 of {new.max_steps} ({tmp_path})" in caplog.text
    rates = re.findall(
        r"of the (\w+) at step 73 is ([\de.-]+)(?: \(\S+ %\))?; with .* would be ([\de.-]+)\n", caplog.text
    )
    assert [part for part, _, _ in rates] == changed
    for part, now, before in rates:
        key = "lr" if part == "base" else "drafter_lr"
        for cfg, said in ((old, before), (new, now)):
            assert float(said) == pytest.approx(
                getattr(cfg.optim, key) * lr_factor(72, cfg.optim, cfg.max_steps, part), rel=5e-3
            )


def test_a_resume_after_the_last_step_or_of_another_version_says_so_much(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    say_resumed(composed("max_steps=50"), tmp_path, 50, (50, 50), (None, None))
    assert "resumed from step 50 of 50" in caplog.text and "there is nothing left to train" in caplog.text
    caplog.clear()
    (tmp_path / "config.json").write_text('{"optim": {"lr": "fast"}}')
    say_resumed(composed("max_steps=50"), tmp_path, 20, (50, 50), (None, None))
    assert caplog.messages == [f"resumed from step 20 of 50 ({tmp_path})"]


def test_a_warm_up_that_the_run_does_not_outlast_is_named(caplog):
    warn_of_warmup(composed("max_steps=51", "optim.warmup_steps=50"), 51)
    assert not caplog.messages
    warn_of_warmup(composed("max_steps=40", "optim.warmup_steps=49"), 40)
    assert (
        "optim.warmup_steps=49 isn't over when the run ends, after step 40: the learning rate reaches 80 %"
        in caplog.text
    )
    warn_of_warmup(composed("max_steps=90", "optim.warmup_steps=49", "freeze.base_after=40"), 40)
    assert "when the base's training ends, after step 40" in caplog.text


def test_a_base_that_is_never_frozen_is_named(caplog):
    warn_of_base_after(composed("max_steps=51", "freeze.base_after=50"), 51)
    warn_of_base_after(composed("max_steps=51", "freeze.base_after=0.9"), 51)
    assert not caplog.messages
    warn_of_base_after(composed("max_steps=50", "freeze.base_after=50"), 50)
    assert "freeze.base_after=50 is not below the run's 50 steps: the base is trained in all" in caplog.text


def test_the_freeze_is_named_by_its_step_and_not_by_that_of_a_resume(caplog):
    caplog.set_level(logging.INFO, "joint_train.train.advice")
    say_frozen(composed("freeze.base_after=4"), SimpleNamespace(peak=2**30), 6, (8, 4))
    assert "frozen after step 4 (freeze.base_after=4): steps 7 to 8 train the drafter alone" in caplog.text


def test_a_resume_across_the_freeze_says_what_becomes_of_the_base(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "joint_train.train.advice")
    old = composed("max_steps=100", "freeze.base_after=0.5", "optim.warmup_steps=10")
    (tmp_path / "config.json").write_text(json.dumps(config_to_save(old)))
    say_resumed(old, tmp_path, 60, (100, 50), (100, 50))
    assert not caplog.messages
    say_resumed(
        composed("max_steps=100", "freeze.base_after=0.7", "optim.warmup_steps=10"), tmp_path, 60, (100, 70), (100, 50)
    )
    assert caplog.messages == [
        "the base was frozen after step 50, and is trained again from step 61 to 70, with new optimizer state"
    ]
    caplog.clear()
    longer = composed("max_steps=200", "freeze.base_after=0.5", "optim.warmup_steps=10")
    say_resumed(longer, tmp_path, 40, (200, 100), (100, 50))  # the base's schedule is stretched; the drafter's is flat
    assert [re.search(r"of the (\w+) at step 41", line)[1] for line in caplog.messages] == ["base"]


def test_the_first_line_names_what_is_run(caplog):
    caplog.set_level(logging.INFO)
    say_run(composed("output_dir=/runs/a"), 8, "NVIDIA H100")
    say_run(composed("freeze.base=true"), 1, None)
    say_run(composed("lora.r=8"), 2, None)
    whole, frozen, adapters = caplog.messages
    pair = "google/gemma-4-E2B-it and its drafter google/gemma-4-E2B-it-assistant, on 8 x NVIDIA H100; "
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d, joint-train [\d.]+: training ", whole)
    assert whole.endswith(f"{pair}everything is written to /runs/a")
    assert "which stays as it is, on the CPU;" in frozen and "adapters of rank 8 on" in adapters


def test_a_plan_above_the_memory_is_a_warning_before_the_load_and_an_out_of_memory_names_changes(plans, caplog):
    cfg, plan, machine = plans["e2b"]
    warn_of_memory(plan, machine)
    assert not caplog.messages
    small = Machine(gpus=1, gpu_memory_gb=40)
    warn_of_memory(plan, small)
    assert f"peak of {plan.peak / 2**30:.2f} GiB is above the 37.60 GiB" in caplog.text
    caplog.clear()
    caplog.set_level(logging.INFO)
    say_plan(plan, plan.peak, machine, "cuda", 1800.0)
    hours = 1800 * plan.seconds(machine) / 3600
    assert f"{plan.seconds(machine):.2f} s a step, {hours:.1f} h in all; activation_checkpointing.base" in caplog.text
    text = out_of_memory(cfg, plan, small, RuntimeError("CUDA out of memory. Tried to allocate 2 GiB."))
    assert text.startswith("out of memory: CUDA out of memory. Tried to allocate 2 GiB. The plan was a peak of")
    named = re.findall(r"([\w.]+=\w+)(?: [\w.=]+)* \(planned: ([\d.]+) GiB\)", text)
    assert named and all(float(peak) < 0.97 * plan.peak / 2**30 for _, peak in named)


def test_a_run_without_validation_data_is_named(caplog):
    warn_of_validation(composed("data.val=val.jsonl"))
    assert not caplog.messages
    warn_of_validation(composed())
    assert "data.val is empty" in caplog.text
