"""Sharded equals unsharded: the same losses and full gradients on 1, 2 and 4 ranks, FSDP and HSDP, however a batch is
split over ranks and micro-batches, with and without activation checkpointing."""

import pytest
import torch
from omegaconf import OmegaConf
from pairs import build_pair
from ranks import run_ranks
from torch import Tensor

from joint_train.config import Config, ConfigError
from joint_train.loss import joint_targets
from joint_train.mesh import data_rank, init_mesh, mesh_shape
from joint_train.model import Gemma4WithDrafter
from joint_train.parallelize import parallelize, prepare, set_last_micro_batch

ROWS, LENGTH, K = 8, 20, 3


def batch() -> dict[str, Tensor]:
    """Rows with very different numbers of targets, one of them with none, some of two documents."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 240, (ROWS, LENGTH), generator=generator)
    labels, documents = ids.clone(), torch.ones_like(ids)
    for row in range(ROWS):
        labels[row, : 2 * row] = -100
    labels[5] = -100
    documents[1::2, 12:] = 2
    documents[2, -4:] = 0
    labels[documents == 0] = -100
    positions = torch.arange(LENGTH).repeat(ROWS, 1)
    positions[1::2, 12:] = torch.arange(LENGTH - 12)
    return {"input_ids": ids, "labels": labels, "document_ids": documents, "position_ids": positions}


def config(**overrides):
    cfg = OmegaConf.structured(Config)
    cfg.drafter.num_steps = K
    cfg.loss.drafter = {"ce": 0.5, "kl": 0.5}
    for name, value in overrides.items():
        OmegaConf.update(cfg, name.replace("__", "."), value)
    return cfg


def build(shape: str, cfg) -> Gemma4WithDrafter:
    base, drafter = build_pair(shape)
    model = Gemma4WithDrafter(
        base,
        drafter,
        drafter_num_steps=K,
        drafter_loss_weight=cfg.drafter.loss_weight,
        freeze_base_for_drafter=cfg.freeze.base,
        loss=cfg.loss,
    )
    prepare(model, cfg)
    return model.train()


def step(model: Gemma4WithDrafter, micro_batches: list[dict], counts: Tensor) -> Tensor:
    """Loss and gradients of one step, as the trainer makes them."""
    total = torch.zeros(())
    for micro in micro_batches:
        targets = joint_targets(micro["labels"], micro["document_ids"], K, model.pairing)
        inputs = {name: x for name, x in micro.items() if name != "labels"}
        out = model(**inputs, targets=targets, weights=model.loss_weights(counts))
        out.loss.backward()
        total += out.loss.detach()
    return total


def all_counts(rows: dict) -> Tensor:
    return joint_targets(rows["labels"], rows["document_ids"], K, "serving").counts


def gradients(model) -> dict[str, Tensor]:
    full = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            full[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    return full


def sharded_step(rank: int, shape: str, options: dict, accumulate: int):
    cfg = config(**options)
    mesh = init_mesh(cfg.parallel)
    model = build(shape, cfg)
    parallelize(model, mesh, cfg)
    index, size = data_rank(mesh)
    rows = batch()
    mine = {name: x.chunk(size)[index] for name, x in rows.items()}
    micro_batches = [{name: x.chunk(accumulate)[i] for name, x in mine.items()} for i in range(accumulate)]
    total = torch.zeros(())
    for i, micro in enumerate(micro_batches):
        set_last_micro_batch(model, i == accumulate - 1)
        total += step(model, [micro], all_counts(rows))
    torch.distributed.all_reduce(total)
    full = gradients(model)
    return (total, full) if rank == 0 else None


def compare(shape, options, world_size, accumulate):
    whole = {"activation_checkpointing__base": "none", "activation_checkpointing__drafter": "none"}
    cfg = config(**{name: x for name, x in options.items() if not name.startswith("parallel")} | whole)
    model = build(shape, cfg)
    loss = step(model, [batch()], all_counts(batch()))
    expected = gradients(model)
    sharded_loss, full = run_ranks(sharded_step, world_size, shape, options, accumulate)[0]
    torch.testing.assert_close(sharded_loss, loss, rtol=1e-5, atol=0)
    # What only images and sound reach has no gradient in one process, and zeros where ranks must agree.
    assert {n for n, g in full.items() if g.abs().max() > 0} >= {n for n, g in expected.items() if g.abs().max() > 0}
    for name, gradient in full.items():
        reference = expected.get(name, torch.zeros_like(gradient))
        error = (gradient - reference).norm() / reference.norm().clamp(min=1e-8)
        assert error <= 1e-5, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("base, drafter", [("none", "none"), ("full", "full"), ("every_n", "full"), ("full", "none")])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_two_ranks_equal_one_process(base, drafter, accumulate):
    recompute = {"activation_checkpointing__base": base, "activation_checkpointing__drafter": drafter}
    compare("e2b", recompute, 2, accumulate)


@pytest.mark.parametrize("shape", ["text", "multimodal", "26b_a4b", "31b", "12b_unified"])
def test_every_shape_sharded_equals_unsharded(shape):
    compare(shape, {"activation_checkpointing__base": "full"}, 2, 2)


def test_one_rank_equals_one_process():
    compare("e2b", {"activation_checkpointing__base": "full"}, 1, 4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hsdp_on_four_ranks_equals_one_process(accumulate):
    compare("e2b", {"parallel__dp_replicate": 2, "activation_checkpointing__base": "full"}, 4, accumulate)


def test_frozen_base_and_frozen_embeddings_sharded():
    compare("e2b", {"freeze__base": True}, 2, 2)
    compare("e2b", {"freeze__embeddings": True}, 2, 1)


def test_a_trained_teacher_and_trained_centroids_sharded():
    compare("e2b", {"loss__teacher_grad": True, "loss__centroid_weight": 0.1}, 2, 2)


def drafter_gradients(rank: int, options: dict):
    """Gradients of the drafter's loss alone, sharded."""
    cfg = config(**options)
    mesh = init_mesh(cfg.parallel)
    model = build("e2b", cfg)
    parallelize(model, mesh, cfg)
    rows = batch()
    targets = joint_targets(rows["labels"], rows["document_ids"], K, "serving")
    weights = model.loss_weights(targets.counts)
    weights[0] = 0
    del rows["labels"]
    model(**rows, targets=targets, weights=weights).loss.backward()
    return {name: g.norm().item() for name, g in gradients(model).items()}


def test_the_drafters_loss_alone_reaches_the_base_under_fsdp2():
    norms = run_ranks(drafter_gradients, 2, {"activation_checkpointing__base": "full"})[0]
    store = "base.model.language_model.layers.{}.self_attn.{}.weight"
    for layer in (1, 2):  # the last layers of each type that compute their own keys and values
        assert norms[store.format(layer, "k_proj")] > 0 and norms[store.format(layer, "v_proj")] > 0
    assert norms["base.model.language_model.embed_tokens.weight"] > 0
    assert norms["base.model.language_model.layers.4.mlp.down_proj.weight"] > 0


def test_the_drafters_loss_reaches_nothing_of_a_frozen_base_under_fsdp2():
    norms = run_ranks(drafter_gradients, 2, {"freeze__base": True})[0]
    assert norms and all(name.startswith("drafter.") for name in norms)


def test_mesh_shape_says_what_does_not_fit():
    parallel = OmegaConf.structured(Config).parallel
    assert mesh_shape(parallel, 8) == (1, 1, 8, 1, 1)
    parallel.dp_replicate = 2
    assert mesh_shape(parallel, 8) == (1, 2, 4, 1, 1)
    parallel.dp_shard = 3
    with pytest.raises(ConfigError, match=r"2 x 3 = 6.*|doesn't fit 8 ranks"):
        mesh_shape(parallel, 8)
    parallel.dp_replicate, parallel.dp_shard = 3, -1
    with pytest.raises(ConfigError, match="8 / 3 isn't whole"):
        mesh_shape(parallel, 8)
    for name in ("pp", "cp", "tp"):
        wrong = OmegaConf.structured(Config).parallel
        wrong[name] = 2
        with pytest.raises(ConfigError, match=f"parallel.{name}=2 is not supported.*Set parallel.{name}=1"):
            mesh_shape(wrong, None)
