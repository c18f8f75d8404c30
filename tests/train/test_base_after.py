"""``freeze.base_after``: the base stops in fact, on any mesh, with any optimizer; a resume on either side is exact."""

import json
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from configs import compose
from pairs import build_pair, make_pair
from ranks import run_ranks
from test_parallel import K, all_counts, batch, full, step
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from joint_train.config import load, with_overrides
from joint_train.distributed.mesh import data_rank, init_mesh
from joint_train.distributed.parallelize import parallelize, prepare, set_last_micro_batch
from joint_train.distributed.preemption import Preemption
from joint_train.errors import ConfigError
from joint_train.plan.planner import Machine, make_plan
from joint_train.plan.report import alone_sentence, length_sentence
from joint_train.plan.stages import joint_share, steps_before_frozen
from joint_train.train import stages, trainer
from joint_train.train.optim import build_optimizer, freeze_base, update
from joint_train.weights.composite import Gemma4WithDrafter, load_pair

OPTIONS = {"drafter.num_steps": K, "optim.weight_decay": 0.3, "optim.lr": 1e-2, "optim.drafter_lr": 1e-2}
CASES = [
    ("e2b", {}),
    ("e2b", {"precision.compute": "bfloat16", "loss.teacher_grad": 0.5}),
    ("e2b", {"optim.name": "muon"}),
    ("31b", {"optim.name": "adamw_8bit", "parallel.cpu_offload": "optimizer"}),
    ("multimodal", {"freeze.towers": False}),
    ("text", {"lora.r": 4}),
]


def train(model, optimizer, cfg, rows: dict, steps: int, mine: tuple[int, int], sharded: bool) -> bool:
    """Steps of two micro-batches each, the rows over the ranks; whether the base had gradients in the last."""
    index, size = mine
    for _ in range(steps):
        optimizer.zero_grad()
        for i in range(2):
            if sharded:
                set_last_micro_batch(model, i == 1)
            part = {name: x.chunk(2 * size)[index * 2 + i] for name, x in rows.items()}
            step(model, part, all_counts(rows))
        update(optimizer, model, 1.0, 1.0, 1.0)
    return any(p.grad is not None for p in model.base.parameters())


def two_stages(rank: int, cases: list, folder=None) -> list:
    """For each case: the base at the freeze and at the end, the drafter's weights, what was reduced of the base."""
    found = []
    for shape, options in cases:
        cfg = compose(OPTIONS | options)
        mesh = init_mesh(cfg.parallel)
        if cfg.lora.r:
            base, drafter = (str(path) for path in folder)
            model = load_pair(with_overrides(cfg, {"model.base": base, "model.drafter": drafter}), mesh, "cpu").train()
        else:
            model = build(shape, cfg)
            parallelize(model, mesh, cfg)
        on_host = cfg.parallel.cpu_offload == "optimizer"
        optimizer = build_optimizer(model, cfg.optim, on_host)
        rows, mine = batch(), data_rank(mesh)
        assert train(model, optimizer, cfg, rows, 2, mine, True)  # the base has momentum
        freeze_base(model, optimizer)
        before = {name: full(p.detach()).clone() for name, p in model.named_parameters()}
        reduced, reduce = [], _fsdp_param_group.foreach_reduce

        def count(params, *args, reduced=reduced, reduce=reduce, **kwargs):
            reduced += [p._module_info.module for p in params]
            return reduce(params, *args, **kwargs)

        with mock.patch.object(_fsdp_param_group, "foreach_reduce", count):
            has_gradients = train(model, optimizer, cfg, rows, 2, mine, True)
        of_base = set(model.base.modules()) & set(reduced)
        kept = sum(p in optimizer.state for p in model.base.parameters())
        after = {name: full(p.detach()).clone() for name, p in model.named_parameters()}
        hidden = model(**{n: x[:1] for n, x in rows.items()}).hidden_states[-1]
        assert reduced
        found.append((before, after, has_gradients, len(of_base), kept, hidden.requires_grad))
    return found


def build(shape: str, cfg) -> Gemma4WithDrafter:
    model = Gemma4WithDrafter(*build_pair(shape), drafter_num_steps=K, base_grad_scale=0.5, loss=cfg.loss)
    prepare(model, cfg)
    return model.train()


def check(found: list, cases: list) -> None:
    for (before, after, has_gradients, reduced, kept, graph), case in zip(found, cases, strict=True):
        assert not has_gradients and not reduced and not kept and not graph, case
        for name in before:
            if name.startswith("base."):
                assert torch.equal(before[name], after[name]), (case, name)
        assert not torch.equal(before["drafter.pre_projection.weight"], after["drafter.pre_projection.weight"])


def test_nothing_of_the_base_moves_or_is_reduced_and_the_drafter_trains_as_in_one_process(tmp_path):
    found = run_ranks(two_stages, 2, CASES, make_pair(tmp_path, "text"))[0]
    check(found, CASES)
    cfg = compose(OPTIONS)
    model = build("e2b", cfg)
    optimizer = build_optimizer(model, cfg.optim)
    rows = batch()
    train(model, optimizer, cfg, rows, 2, (0, 1), False)
    freeze_base(model, optimizer)
    train(model, optimizer, cfg, rows, 2, (0, 1), False)
    for name, p in model.named_parameters():
        error = (found[0][1][name] - p.detach()).norm() / p.detach().norm().clamp(min=1e-6)
        assert error < 1e-3, (name, error)


def test_nothing_of_the_base_moves_with_replicas():
    cases = [("e2b", {"parallel.dp_replicate": 2})]
    check(run_ranks(two_stages, 4, cases)[0], cases)


# A real run: 6 steps, the base in the first 3 of them


STEPS, JOINT, LR, DRAFTER_LR = 6, 3, 3e-3, 6e-3


def settings(pair, output_dir, *more: str) -> list[str]:
    return [
        "+experiment=starter", f"pair={pair}", f"output_dir={output_dir}", "data.max_length=64", "data.num_workers=0",
        "data.micro_batch_size=1", "optim.grad_accum=2", "optim.warmup_steps=1", f"optim.lr={LR}",
        f"optim.drafter_lr={DRAFTER_LR}", "optim.drafter_schedule=wsd", "optim.drafter_min_lr_ratio=0",
        "optim.decay_share=0.4", "drafter.num_steps=2", "eval.every=0", "eval.batches=1", "eval.prompts=0",
        "tracking.wandb=disabled", "checkpoint.every=1", "checkpoint.keep_last=0", "model.export.at_end=false",
        "freeze.base_after=auto", f"max_steps={STEPS}", *more,
    ]  # fmt: skip


def runs(rank: int, pair, folder) -> list[dict]:
    """A whole run, and runs that go on from its steps; the weights and the optimizer's state at the end of each."""
    ends = []
    for name, more in (
        ("whole", []),
        *((f"from_{at}", [f"resume={folder}/whole/checkpoints/step_0000000{at}"]) for at in (2, 3, 4)),
    ):
        # A resume takes the share that the run began with, whatever the plan says now.
        share = JOINT / STEPS if name == "whole" else 1 / STEPS
        with (
            mock.patch("torch.distributed.destroy_process_group"),
            mock.patch.object(stages, "joint_share", return_value=share),
        ):
            job = trainer.Trainer(load(settings(pair, folder / name, *more)), Preemption(60))
            job.train()
        tensors = {n: full(p.detach()).clone() for n, p in job.model.named_parameters()}
        for n, p in job.model.named_parameters():
            tensors |= {f"{n}/{entry}": full(x).clone() for entry, x in job.optimizer.state.get(p, {}).items()}
        ends.append(tensors)
    return ends


@pytest.fixture(scope="module")
def made(starter_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base_after")
    return folder, run_ranks(runs, 2, starter_dir, folder)[0]


def records(folder) -> dict[int, dict]:
    return {record["step"]: record for record in map(json.loads, (folder / "metrics.jsonl").open())}


def test_a_resume_on_either_side_of_the_freeze_and_at_it_is_exact(made):
    folder, (whole, *others) = made
    assert not any(name.startswith("base.") and "/" in name for name in whole)
    assert any(name.startswith("drafter.") and name.endswith("/exp_avg") for name in whole)
    for other in others:
        assert other.keys() == whole.keys()
        assert all(torch.equal(other[name], x) for name, x in whole.items())
    for start in (2, 3, 4):
        mine, theirs = records(folder / f"from_{start}"), records(folder / "whole")
        for at in range(start + 1, STEPS + 1):
            for name in ("base_loss", "drafter_loss", "grad_norm_base", "grad_norm_drafter", "lr", "drafter_lr"):
                assert mine[at][name] == theirs[at][name], (start, at, name)


def test_each_model_has_its_own_schedule_in_a_real_run(made):
    """The base: cosine over its 3 steps down to a tenth. The drafter: constant, then linear to 0 in the last 40 %."""
    lines = records(made[0] / "whole")
    base = [1 / 2, 1.0, 0.1 + 0.9 * (1 + math.cos(math.pi)) / 2, 0, 0, 0]
    drafter = [1 / 2, 1.0, 1.0, 1.0, 0.5, 0.0]
    assert [lines[s]["lr"] / LR for s in range(1, STEPS + 1)] == pytest.approx(base)
    assert [lines[s]["drafter_lr"] / DRAFTER_LR for s in range(1, STEPS + 1)] == pytest.approx(drafter)
    assert all((lines[s]["grad_norm_base"] > 0) == (s <= JOINT) for s in range(1, STEPS + 1))
    costs = [lines[s]["tflops_per_gpu"] * lines[s]["seconds"] for s in range(1, STEPS + 1)]
    assert costs == pytest.approx([costs[0]] * JOINT + [costs[-1]] * (STEPS - JOINT)) and costs[-1] < 0.9 * costs[0]


def test_the_share_that_auto_takes_costs_what_one_model_after_the_other_does():
    cfg = compose({"model.base": "google/gemma-4-E2B-it", "model.drafter": "google/gemma-4-E2B-it-assistant",
                   "data.max_length": 256, "activation_checkpointing.base": "full",
                   "activation_checkpointing.drafter": "none", "freeze.base_after": "auto"})  # fmt: skip
    machine = Machine(gpus=8)
    joint, base, drafter = (
        make_plan(cfg, machine, **alone) for alone in ({}, {"base_alone": True}, {"drafter_alone": True})
    )
    share = joint_share(cfg, machine, joint=joint)
    assert share * joint.flops + (1 - share) * drafter.flops == pytest.approx(share * (base.flops + drafter.flops))
    assert 0.5 < share < 0.75
    # With a frozen base there are no gradients and states of it, and its weights are still float32 shards.
    one, other = joint.memory, drafter.memory
    assert other["weights (this rank's shard)"] == one["weights (this rank's shard)"]
    assert other["optimizer states"] < 0.1 * one["optimizer states"] and drafter.peak < joint.peak
    assert drafter.communication["reduce-scatter"].keys() == {"drafter"}
    assert drafter.communication["all-gather"]["layers"] < joint.communication["all-gather"]["layers"]


def test_the_planned_peak_is_that_of_the_steps_that_a_run_does():
    """Both stages of a run from its beginning; of one that was resumed after the freeze, only the second."""
    both, alone = SimpleNamespace(peak=5, flops=2), SimpleNamespace(peak=3, flops=1)
    with mock.patch.object(stages, "make_plan", return_value=alone):
        for after, step, peak in ((3, 0, 5), (3, 2, 5), (3, 3, 3), (None, 2, 5), (None, 6, 5)):
            saved = {"step": step} if step else None
            cfg = compose({"freeze.base_after": after})
            assert stages.Stages(cfg, 6, both, Machine(), "cpu", saved).peak == peak, (after, step)


def test_steps_and_shares():
    assert [steps_before_frozen(after, 100) for after in (None, 30, 200, 0.3, 0.001)] == [100, 30, 100, 30, 1]


@pytest.mark.parametrize("wrong", [0, -1, 1.0, 1.5, True, "later", [3]])
def test_a_value_that_is_none_of_them_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"freeze.base_after=.*: give a number of steps, a share of the run"):
        compose({"freeze.base_after": wrong})


def test_a_base_that_is_frozen_already_is_refused():
    with pytest.raises(ConfigError, match="freeze.base=true before its first step: set only one"):
        compose({"freeze.base_after": 10, "freeze.base": True})


@pytest.mark.parametrize("more, said, hours", [
    ({"max_steps": 900, "freeze.base_after": 0.5}, "after step 450 (freeze.base_after=0.5): 2.00 s a step, 25%", 1.25),
    ({"max_steps": 900, "freeze.base_after": 300}, "after step 300 (freeze.base_after=300): 2.00 s a step", 1.0),
    ({"epochs": 2.0, "freeze.base_after": 0.5}, "after 50% of the steps (freeze.base_after=0.5)", None),
])  # fmt: skip
def test_a_plan_says_when_the_base_is_frozen_and_how_long_both_stages_take(more, said, hours):
    both, alone = (
        SimpleNamespace(seconds=lambda machine, s=seconds: s, flops=flops, peak=3 * 2**30, ranks=8)
        for seconds, flops in ((8.0, 400), (2.0, 100))
    )
    cfg, machine = compose(more), Machine()
    after = cfg.freeze.base_after
    assert alone_sentence(cfg, machine, both, alone, after).startswith(said)
    length = length_sentence(cfg, machine, both, alone, after)
    assert f" {hours:,.1f} h without" in length if hours else "h without" not in length
