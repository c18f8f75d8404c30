"""Sharded equals unsharded: the same losses and full gradients on 1, 2 and 4 ranks, FSDP and HSDP, however a batch is
split over ranks and micro-batches, with and without activation checkpointing."""

from collections.abc import Sequence

import pytest
import torch
from configs import compose
from pairs import build_pair
from ranks import run_ranks
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from joint_train.config.values import mesh_sentence, mesh_shape
from joint_train.distributed import parallelize as parallelize_module
from joint_train.distributed.mesh import data_rank, init_mesh
from joint_train.distributed.parallelize import (
    parallelize,
    prepare,
    reshard,
    set_last_micro_batch,
    share_streams,
    text_model,
)
from joint_train.errors import ConfigError
from joint_train.pair.targets import joint_targets
from joint_train.train.optim import build_optimizer, update
from joint_train.weights.composite import Gemma4WithDrafter

ROWS, LENGTH, K = 8, 20, 3


def batch(silent: Sequence[int] = (), length: int = LENGTH) -> dict[str, Tensor]:
    """Rows with very different numbers of targets, one of them and the silent ones with none, some of two documents."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 240, (ROWS, length), generator=generator)
    labels, documents = ids.clone(), torch.ones_like(ids)
    for row in range(ROWS):
        labels[row, : 2 * row] = -100
    labels[[5, *silent]] = -100
    second = 3 * length // 5
    documents[1::2, second:] = 2
    documents[2, -4:] = 0
    labels[documents == 0] = -100
    positions = torch.arange(length).repeat(ROWS, 1)
    positions[1::2, second:] = torch.arange(length - second)
    return {"input_ids": ids, "labels": labels, "document_ids": documents, "position_ids": positions}


def config(**overrides):
    settings = {"drafter.num_steps": K, "loss.drafter": {"ce": 0.5, "kl": 0.5}}
    return compose(settings | {name.replace("__", "."): value for name, value in overrides.items()})


def build(shape: str, cfg, dtype: torch.dtype = torch.float32) -> Gemma4WithDrafter:
    base, drafter = build_pair(shape, dtype=dtype)
    model = Gemma4WithDrafter(
        base,
        drafter,
        drafter_num_steps=cfg.drafter.num_steps,
        drafter_loss_weight=cfg.drafter.loss_weight,
        freeze_base_for_drafter=cfg.freeze.base,
        base_grad_scale=cfg.drafter.base_grad_scale,
        loss=cfg.loss,
    )
    prepare(model, cfg)
    return model.train()


def step(model: Gemma4WithDrafter, rows: dict, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and sums of a micro-batch, as the trainer makes them; the gradients are added to what there is."""
    targets = joint_targets(rows["labels"], rows["document_ids"], model.drafter_num_steps, model.pairing)
    inputs = {name: x for name, x in rows.items() if name != "labels"}
    out = model(**inputs, targets=targets, weights=model.loss_weights(counts))
    out.loss.backward()
    return out.loss.detach(), out.stats.named()


def all_counts(rows: dict, num_steps: int = K) -> Tensor:
    return joint_targets(rows["labels"], rows["document_ids"], num_steps, "serving").counts


def gradients(model) -> dict[str, Tensor]:
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded(shape: str, cfg) -> tuple[Gemma4WithDrafter, int, int]:
    """The sharded pair, and which part of the rows is this rank's."""
    mesh = init_mesh(cfg.parallel)
    model = build(shape, cfg)
    parallelize(model, mesh, cfg)
    return model, *data_rank(mesh)


def sharded_steps(rank: int, shape: str, options: dict, accumulate: int, silent: list[tuple[int, ...]]):
    """Loss, sums and gradients of a step over all ranks' micro-batches, for each choice of silent rows."""
    cfg = config(**options)
    model, index, size = sharded(shape, cfg)
    found = []
    for rows in map(batch, silent):
        counts = all_counts(rows, cfg.drafter.num_steps)
        micro_batches = [
            {name: x.chunk(size * accumulate)[index * accumulate + i] for name, x in rows.items()}
            for i in range(accumulate)
        ]
        model.zero_grad()
        loss, sums = torch.zeros(()), {}
        for i, micro in enumerate(micro_batches):
            set_last_micro_batch(model, i == accumulate - 1)
            part, stats = step(model, micro, counts)
            loss += part
            sums = {name: sums.get(name, 0) + x for name, x in stats.items()}
        # One without would have no optimizer state, for a resume to miss.
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        for x in (loss, *sums.values()):
            torch.distributed.all_reduce(x)
        found.append((loss, sums, gradients(model)))
    return found if rank == 0 else None


def compare(shape, options, world_size, accumulate, silent=((),)):
    whole = {"activation_checkpointing__base": "none", "activation_checkpointing__drafter": "none"}
    cfg = config(**{name: x for name, x in options.items() if not name.startswith("parallel")} | whole)
    model = build(shape, cfg)
    found = run_ranks(sharded_steps, world_size, shape, options, accumulate, list(silent))[0]
    for rows, (sharded_loss, sharded_stats, full) in zip(map(batch, silent), found, strict=True):
        model.zero_grad()
        loss, stats = step(model, rows, all_counts(rows, cfg.drafter.num_steps))
        expected = gradients(model)
        torch.testing.assert_close(sharded_loss, loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(sharded_stats, stats, rtol=1e-5, atol=1e-5)
        # What only images and sound reach has no gradient in one process, and zeros where ranks must agree.
        assert {n for n, g in full.items() if g.abs().max() > 0} >= {
            n for n, g in expected.items() if g.abs().max() > 0
        }
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


def test_fewer_experts_than_ranks():
    """Three experts on four ranks are cut along another dimension."""
    compare("26b_a4b", {}, 4, 1)


def frozen_towers(rank: int):
    """The types and dtypes of the towers' weights, and of the others."""
    cfg = config(precision__compute="bfloat16")
    model, _, _ = sharded("multimodal", cfg)
    towers = {name: p for name, p in model.named_parameters() if "_tower." in name or ".embed_vision." in name}
    found = {(isinstance(p, DTensor), p.dtype) for p in towers.values()}
    others = {(isinstance(p, DTensor), p.dtype) for name, p in model.named_parameters() if name not in towers}
    return found, others


def test_frozen_towers_are_whole_and_in_the_dtype_of_compute():
    for towers, others in run_ranks(frozen_towers, 2):
        assert towers == {(False, torch.bfloat16)}
        assert others - {(False, torch.bfloat16)} == {(True, torch.float32)}


@pytest.mark.parametrize("shape", ["e2b", "31b"])
def test_attention_kept_and_inputs_on_the_host_sharded(shape):
    recompute = {"activation_checkpointing__base": "selective", "activation_checkpointing__drafter": "layers"}
    compare(shape, recompute | {"activation_checkpointing__offload": True}, 2, 2)


def test_one_rank_equals_one_process():
    compare("e2b", {"activation_checkpointing__base": "full"}, 1, 4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hsdp_on_four_ranks_equals_one_process(accumulate):
    compare("e2b", {"parallel__dp_replicate": 2, "activation_checkpointing__base": "full"}, 4, accumulate)


def test_frozen_base_and_frozen_embeddings_sharded():
    compare("e2b", {"freeze__base": True}, 2, 2)
    compare("e2b", {"freeze__embeddings": True}, 2, 1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("loss", ["kl", {"ce": 0.1, "nla": 0.5, "js": 0.4}])
def test_losses_metrics_and_gradients_on_any_number_of_ranks(loss, ranks):
    trained = {} if loss == "kl" else {"loss__teacher_grad": True, "loss__centroid_weight": 0.1}
    compare("e2b", {"loss__drafter": loss, **trained}, ranks, 2)


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_share_of_the_drafters_gradient_sharded(scale):
    options = {"drafter__base_grad_scale": scale, "loss__drafter": "kl", "loss__teacher_grad": 0.5}
    compare("e2b", options | {"activation_checkpointing__base": "full"}, 2, 2)


def test_one_round_freezes_the_projection_that_makes_the_next_state():
    compare("e2b", {"drafter__num_steps": 1}, 2, 1)


@pytest.mark.parametrize(
    "ranks, options",
    [(2, {"loss__teacher_grad": True, "loss__centroid_weight": 0.1}), (2, {"freeze__base": True}),
     (4, {"parallel__dp_replicate": 2})],
    ids=["fsdp", "frozen base", "hsdp"],
)  # fmt: skip
def test_ranks_without_a_target(ranks, options):
    """None in a whole step of a rank or two; none in one micro-batch of each; none anywhere."""
    compare("e2b", options, ranks, 2, [(4, 5, 6, 7), (0, 1, 6, 7), (0, 2, 4, 6), range(ROWS)])


def test_bfloat16_compute_on_two_ranks_equals_one_process():
    """The forward is the same; each rank's gradient is rounded to bfloat16 once, by at most 2^-9 of an entry, and so is
    the one process's."""
    options = {"precision__compute": "bfloat16"}
    loss, _, found = run_ranks(sharded_steps, 2, "e2b", options, 1, [()])[0][0]
    model = build("e2b", config(), torch.bfloat16)
    expected_loss, _ = step(model, batch(), all_counts(batch()))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    expected = gradients(model)
    assert found.keys() == expected.keys()
    error = sum((found[n] - g.float()).square().sum() for n, g in expected.items())
    assert error.sqrt() <= 2**-8 * sum(g.float().square().sum() for g in expected.values()).sqrt()


def parameters_after_a_forward(rank: int):
    """Whether each parameter is a shard, after a forward without a backward and what the trainer does then."""
    model, _, _ = sharded("e2b", config(parallel__reshard_after_forward=False))
    with torch.no_grad():
        model(batch()["input_ids"])
    gathered = [isinstance(p, DTensor) for p in model.parameters()]
    reshard(model)
    return gathered, [isinstance(p, DTensor) for p in model.parameters()]


def test_a_forward_without_a_backward_leaves_nothing_gathered():
    gathered, after = run_ranks(parameters_after_a_forward, 1)[0]
    assert not all(gathered) and all(after)


def order_of_a_step(rank: int):
    """What happens in a step: gathers of FSDP2's units, and forwards of the base's last layer and of the drafter."""
    cfg = config(activation_checkpointing__base="full", activation_checkpointing__drafter="none")
    model, _, _ = sharded("e2b", cfg)
    share_streams(model)
    last, happened = text_model(model.base).layers[-1], []
    gathered = {id(module._get_fsdp_state()._fsdp_param_group): name for name, module in
                (("last", last), ("drafter", model.drafter))}  # fmt: skip
    unshard = FSDPParamGroup.unshard

    def logged(group, *args):
        if id(group) in gathered and group._all_gather_result is None and group.is_sharded:
            happened.append(f"gather {gathered[id(group)]}")
        return unshard(group, *args)

    FSDPParamGroup.unshard = logged
    last.mlp.register_forward_pre_hook(lambda *_: happened.append("last"))
    model.drafter.pre_projection.register_forward_pre_hook(lambda *_: happened.append("drafter"))
    step(model, batch(), all_counts(batch()))
    return happened


def test_the_drafter_is_gathered_while_the_bases_last_layer_computes():
    happened = run_ranks(order_of_a_step, 2)[0]
    assert happened == ["gather last", "gather drafter", "last", *["drafter"] * K, "gather last", "last"]


UPDATE = {"optim__eps": 0.01, "optim__lr": 0.01, "optim__drafter_lr": 0.02, "optim__max_grad_norm": 0.5}


def updates(model, cfg, rows: dict) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], AdamW]:
    """Norms of two steps, the weights after them, and the optimizer."""
    optimizer, norms = build_optimizer(model, cfg.optim), []
    for _ in range(2):
        model.zero_grad()
        step(model, rows, all_counts(batch()))
        norms.append(update(optimizer, model, cfg.optim.max_grad_norm, 1.0))
    return norms, {name: full(p.detach()).clone() for name, p in model.named_parameters()}, optimizer


def sharded_updates(rank: int, options: dict, shape: str):
    """:func:`updates`, and the weights after a third step whose gradient isn't finite in one of two shards."""
    cfg = config(**UPDATE, **options)
    model, index, size = sharded(shape, cfg)
    norms, weights, optimizer = updates(model, cfg, {name: x.chunk(size)[index] for name, x in batch().items()})
    gradient = model.drafter.pre_projection.weight.grad
    if gradient.device_mesh.get_coordinate()[-1] == 1:
        gradient.to_local()[0, 0] = float("nan")
    bad = update(optimizer, model, cfg.optim.max_grad_norm, 1.0)
    assert not bad["grad_norm"].isfinite() and bad["grad_norm_base"].isfinite()
    return norms, weights, {name: full(p.detach()) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "ranks, options, shape",
    [(2, {}, "e2b"), (4, {"parallel__dp_replicate": 2}, "e2b"), (2, {}, "26b_a4b"), (4, {}, "26b_a4b")],
    ids=["fsdp", "hsdp", "experts on 2", "experts on 4"],
)
def test_clipped_updates_sharded_equal_one_process(ranks, options, shape):
    cfg = config(**UPDATE)
    expected_norms, expected, _ = updates(build(shape, cfg), cfg, batch())
    assert expected_norms[0]["grad_norm"] > 1  # it is clipped
    for norms, weights, after_nan in run_ranks(sharded_updates, ranks, options, shape):
        torch.testing.assert_close(norms, expected_norms, rtol=1e-4, atol=0)
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(weights[name], x) for name, x in after_nan.items())


def drafter_gradients(rank: int, options: dict):
    """Gradients of the drafter's loss alone, sharded."""
    model, _, _ = sharded("e2b", config(**options))
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


def step_of_a_frozen_base(rank: int, masters: bool):
    """The dtypes of each model's weights, and the gradients of a step that computes in bfloat16."""
    if masters:  # as if the base were trained
        parallelize_module.rounded_parameters = parallelize_module.whole_parameters
    cfg = config(freeze__base=True, precision__compute="bfloat16")
    model, _, _ = sharded("e2b", cfg)
    rows = batch()
    step(model, rows, all_counts(rows))
    return [{p.dtype for p in part.parameters()} for part in (model.base, model.drafter)], gradients(model)


def test_a_frozen_base_is_kept_in_the_dtype_of_compute_without_a_change_of_gradients():
    (base, drafter), found = run_ranks(step_of_a_frozen_base, 2, False)[0]
    (masters, _), expected = run_ranks(step_of_a_frozen_base, 2, True)[0]
    assert base == {torch.bfloat16} and drafter == masters == {torch.float32}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], g) for name, g in expected.items())
    assert any(g.any() for g in found.values())


def test_mesh_shape_says_what_does_not_fit():
    parallel = compose().parallel
    assert mesh_shape(parallel, 8) == (1, 1, 8, 1, 1)
    parallel.dp_replicate = 2
    assert mesh_shape(parallel, 8) == (1, 2, 4, 1, 1)
    parallel.dp_shard = 3
    with pytest.raises(ConfigError, match="2 x 3 = 6 doesn't fit 8 ranks"):
        mesh_shape(parallel, 8)
    parallel.dp_replicate, parallel.dp_shard = 3, -1
    with pytest.raises(ConfigError, match="dp_replicate = 3 doesn't divide 8 ranks"):
        mesh_shape(parallel, 8)
    parallel.dp_replicate = 1
    for ranks, node, (replicate, shard) in (
        (64, 8, (1, 64)),
        (512, 8, (8, 64)),
        (72, 8, (3, 24)),
        (88, 8, (11, 8)),
        (96, 4, (2, 48)),
        (65, 1, (5, 13)),
    ):
        assert mesh_shape(parallel, ranks, node) == (1, replicate, shard, 1, 1)
    for ranks, node in ((67, 1), (68, 8), (100, 8), (134, 67)):  # no whole nodes
        with pytest.raises(ConfigError, match=f"nodes of {node}, .* divides {ranks} ranks. Set parallel.dp_shard and"):
            mesh_shape(parallel, ranks, node)
    assert mesh_shape(parallel, 256, 128) == (1, 4, 64, 1, 1)  # half of a large node
    assert "over 64 of 512 ranks, 8 replicas (HSDP): parallel.dp_shard=-1 shards" in mesh_sentence(parallel, 512, 8)
    assert mesh_sentence(parallel, 8, 8) == "weights are sharded over 8 of 8 ranks"
    parallel.dp_shard = 512  # what is set is kept
    assert mesh_shape(parallel, 512, 8) == (1, 1, 512, 1, 1)
    for name in ("pp", "cp", "tp"):
        wrong = compose().parallel
        setattr(wrong, name, 2)
        with pytest.raises(ConfigError, match=f"parallel.{name}=2 is not supported.*Set parallel.{name}=1"):
            mesh_shape(wrong, None)
