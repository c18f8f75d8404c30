"""One history in which what is trained changes, each stage on another number of ranks."""

import logging

import numpy as np
import pytest
import torch
from checkpoint_run import TIMEOUT, build, config, everything, full, seed_all, train_step
from pairs import build_pair
from ranks import run_ranks
from test_multimodal import images_and_text, text
from versions import trains_towers

from joint_train.checkpoint import Checkpointer
from joint_train.distributed import parallelize
from joint_train.distributed.mesh import init_mesh
from joint_train.pair.targets import joint_targets
from joint_train.train.optim import build_optimizer, update
from joint_train.weights.composite import Gemma4WithDrafter

STAGES = [
    (2, {"freeze.base": True, "drafter.num_steps": 1, "loss.centroid_weight": 0.0}),
    (1, {"freeze.base": False, "drafter.num_steps": 4, "loss.centroid_weight": 0.1}),
    (3, {"freeze.base": True, "drafter.num_steps": 4, "loss.centroid_weight": 0.0}),
    (2, {"freeze.base": False, "drafter.num_steps": 4, "loss.centroid_weight": 0.1}),
]


# A frozen base is in the dtype of compute.
FROZEN = [
    (2, {"freeze.base": False, "precision.compute": "bfloat16"}),
    (1, {"freeze.base": True, "precision.compute": "bfloat16"}),
    (2, {"freeze.base": False, "precision.compute": "bfloat16"}),
]


# Frozen towers are bfloat16 and whole on every rank, trained ones float32 shards.
TOWERS = [
    (2, {"freeze.towers": True, "precision.compute": "bfloat16"}),
    (1, {"freeze.towers": False, "precision.compute": "bfloat16"}),
    (2, {"freeze.towers": True, "precision.compute": "bfloat16"}),
]


def stage(rank, folder, overrides, until, shape):
    """Go on to step `until`; returns everything as it was loaded and at the end, trained names, and what was said."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("joint_train").addHandler(handler)
    cfg = config(overrides)
    seed_all(rank)
    model, optimizer = build(cfg, shape, seed=until)
    checkpointer = Checkpointer(folder, cfg.checkpoint, timeout_seconds=TIMEOUT, lock_wait_seconds=5)
    step = 0
    if path := checkpointer.find_resume():
        step = checkpointer.load(path, model, optimizer, config=cfg)["step"]
    loaded = everything(model, optimizer)
    for _ in range(step, until):
        train_step(model, optimizer)
    checkpointer.save(until, model, optimizer, {"step": until}, config=cfg)
    checkpointer.close()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return loaded, everything(model, optimizer), trained, said


def optimizer_state(tensors: dict) -> dict[str, np.ndarray]:
    return {name.removeprefix("optimizer:"): x for name, x in tensors.items() if name.startswith("optimizer:")}


@pytest.mark.parametrize(
    ("shape", "stages"),
    [("e2b", STAGES), pytest.param("multimodal", TOWERS, marks=trains_towers), ("text", FROZEN)],
    ids=["parts", "towers", "base"],
)
def test_old_optimizer_state_is_kept_new_is_new_and_each_is_said_once(tmp_path, shape, stages):
    before, trained_before, steps, until = None, set(), {}, 0
    for ranks, overrides in stages:
        until += 2
        loaded, after, trained, said = run_ranks(stage, ranks, tmp_path, overrides, until, shape)[0]
        state = optimizer_state(loaded)
        if before is not None:
            for name, x in before.items():
                if not name.startswith("optimizer:"):
                    tower = any(part in name for part in ("_tower.", "embed_vision.", "embed_audio."))
                    frozen = overrides.get("freeze.towers") if tower else overrides.get("freeze.base")
                    # Frozen weights are in the dtype of compute, towers always in bfloat16.
                    rounded = frozen and (tower or "precision.compute" in overrides) and name.startswith("base")
                    assert np.array_equal(loaded[name], torch.tensor(x).bfloat16().float() if rounded else x), name
            kept = {name: x for name, x in optimizer_state(before).items() if name.rpartition("/")[0] in trained}
            assert state.keys() == kept.keys()
            assert all(np.array_equal(state[name], x) for name, x in kept.items())
            dropped = {name.rpartition("/")[0] for name in optimizer_state(before)} - trained
            assert sum("is dropped: they are not trained now" in line for line in said) == bool(dropped)
            assert sum("has no optimizer state for" in line for line in said) == bool(trained - trained_before)
            coarser = dropped and "precision.compute" in overrides  # what was trained in float32 is frozen now
            assert sum("so they are rounded" in line for line in said) == bool(coarser)
        # AdamW's own count says since when a parameter is trained without a break.
        steps = {name: steps.get(name, 0) * (name in trained_before) + 2 for name in trained}
        counted = {n.removesuffix("/step"): int(x) for n, x in optimizer_state(after).items() if n.endswith("/step")}
        assert counted == steps
        before, trained_before = after, trained
    assert {name.partition(".")[0] for name in trained} == {"base", "drafter"}
    if shape == "e2b":
        assert any("centroid" in name for name in trained) and any("post_projection" in name for name in trained)


# Images on one rank, in the second micro-batch of an accumulation, with trainable towers


def multimodal_steps() -> list[list[dict]]:
    """Micro-batches of each step, of all ranks together."""
    return [[text(), text(), text(), images_and_text()], [text()] * 4, [images_and_text(), text(), text(), text()]]


def multimodal_run(rank, ranks, folder, first: int, last: int):
    """Train steps `first` to `last` - 1, from the checkpoint if it isn't the first; everything at the end."""
    cfg = config({"freeze.towers": False, "drafter.num_steps": 2})
    base, drafter = build_pair("multimodal")
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=2, loss=cfg.loss).train()
    parallelize.prepare(model, cfg)
    if ranks:
        parallelize.parallelize(model, init_mesh(cfg.parallel), cfg)
    optimizer = build_optimizer(model, cfg.optim)
    checkpointer = Checkpointer(folder, cfg.checkpoint, timeout_seconds=TIMEOUT) if ranks else None
    if first:
        checkpointer.load(checkpointer.find_resume(), model, optimizer, config=cfg)
    for step in range(first, last):
        batches = multimodal_steps()[step]
        counts = sum(joint_targets(batch["labels"], None, 2, "serving").counts for batch in batches)
        mine = batches if not ranks else np.split(np.arange(len(batches)), ranks)[rank]
        optimizer.zero_grad()
        for i in range(len(mine)):
            batch = mine[i] if not ranks else batches[mine[i]]
            if ranks:
                parallelize.set_last_micro_batch(model, i == len(mine) - 1)
            model(**batch, weights=model.loss_weights(counts)).loss.backward()
        for parameter in model.parameters():  # a loss that no tower is in has gradient zero there, sharded or not
            if not ranks and parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        update(optimizer, model, 1.0, 1.0, None)
    if ranks:
        checkpointer.save(last, model, optimizer, {"step": last}, config=cfg)
        checkpointer.close()
    return {name: full(p) for name, p in model.named_parameters()}


@trains_towers
def test_images_on_one_rank_in_the_second_micro_batch_then_text_only_then_other_ranks(tmp_path):
    expected = multimodal_run(0, 0, None, 0, 3)
    run_ranks(multimodal_run, 2, 2, tmp_path, 0, 2)
    ours = run_ranks(multimodal_run, 4, 4, tmp_path, 2, 3)[0]
    start = dict(Gemma4WithDrafter(*build_pair("multimodal"), drafter_num_steps=2).named_parameters())
    moved = {name for name, x in expected.items() if "vision_tower" in name and (x != full(start[name])).any()}
    assert moved
    for name, x in expected.items():
        np.testing.assert_allclose(ours[name], x, rtol=0, atol=2e-5, err_msg=name)
