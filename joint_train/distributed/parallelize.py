"""Freezing, activation checkpointing, compilation and FSDP2 of the pair.

Units of the base: each decoder layer; the root with the rest (the embedding and the head tied to it, the final norm,
trained towers). Units of the drafter: one, the whole of it. The per-layer embedding table is none: ranks exchange its
rows (:mod:`joint_train.distributed.rows`).

- The root's weights stay gathered from the forward to the end of the backward, since the loss reads the head.
- The drafter runs K rounds: as a unit of its own, a layer would be gathered and reduced K times each way.
- Trained towers belong to the root because only some ranks may have images in a step: a unit that runs on some ranks
  only would leave the others waiting. Frozen ones are whole on every rank, in the dtype of compute: in the root they
  would be gathered in every micro-batch, also of text, and held as long as the root is.
"""

from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
    share_comm_ctx,
)
from transformers.utils import is_liger_kernel_available

from joint_train.config import Config, FreezeConfig, ParallelConfig, PrecisionConfig
from joint_train.config.schema import ActivationCheckpointingConfig
from joint_train.distributed.mesh import fsdp_mesh
from joint_train.distributed.placement import placement
from joint_train.distributed.quantised import QuantisedEmbedding
from joint_train.distributed.rows import Lookup, RowShardedEmbedding, shard_rows
from joint_train.errors import ConfigError
from joint_train.pair.fused import ATTENTION, fuse
from joint_train.pair.model import JointModel
from joint_train.pair.recompute import HostCopies, checkpointed
from joint_train.torch_private import graph_limit, initialise_fsdp

if TYPE_CHECKING:
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

    from joint_train.pair.halves import Base

LOOKUP = "per_layer_lookup"  # the pair's input that look_up makes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_dtype(precision: PrecisionConfig, device_type: str) -> torch.dtype:
    """``precision.compute``, with auto being bfloat16 on GPU and float32 on CPU (where bfloat16 is 7 times slower)."""
    auto = "bfloat16" if device_type == "cuda" else "float32"
    return DTYPES[auto if precision.compute == "auto" else precision.compute]


def text_model(base: nn.Module) -> "Gemma4TextModel":
    """The base's language model: where its decoder layers and embedding tables are."""
    model = cast("Base", base).model
    return cast("Gemma4TextModel", getattr(model, "language_model", model))


def towers(base: nn.Module) -> list[nn.Module]:
    """The base's vision and audio towers and their projections, as far as it has them."""
    names = ("vision_tower", "embed_vision")
    return [tower for name in names if (tower := getattr(base.model, name, None)) is not None] + audio_towers(base)


def audio_towers(base: nn.Module) -> list[nn.Module]:
    """Those of them that only process audio."""
    return [tower for name in ("audio_tower", "embed_audio") if (tower := getattr(base.model, name, None)) is not None]


def per_layer_table(base: nn.Module) -> nn.Embedding | None:
    """The base's per-layer embeddings, ``[V, layers * D]``, if it has them."""
    return getattr(text_model(base), "embed_tokens_per_layer", None)


def exchanges_rows(base: nn.Module, parallel: ParallelConfig) -> bool:
    """Whether the per-layer embeddings are row-sharded. In CPU memory they aren't: there is no exchange from there."""
    return per_layer_table(base) is not None and parallel.cpu_offload != "all"


def whole_parameters(base: nn.Module) -> list[nn.Parameter]:
    """The base's weights that every rank holds whole: those of frozen towers."""
    return [p for tower in towers(base) for p in tower.parameters() if not p.requires_grad]


def rounded_parameters(base: nn.Module) -> list[nn.Parameter]:
    """The base's weights that are kept in the dtype of compute: those that aren't trained."""
    return [p for p in base.parameters() if not p.requires_grad]


def freeze(model: JointModel, cfg: FreezeConfig) -> None:
    """Apply the ``freeze`` group to the base (``freeze.base`` is the composite's own argument).

    What only sound reaches is frozen always: there is no data for it.
    """
    base = model.base
    for tower in towers(base) if cfg.towers else audio_towers(base):
        tower.requires_grad_(False)
    if cfg.embeddings:
        base.get_input_embeddings().requires_grad_(False)
        base.lm_head.requires_grad_(False)
        if (table := per_layer_table(base)) is not None:
            table.requires_grad_(False)


def prepare(model: JointModel, cfg: Config) -> None:
    """What is done before sharding, and also without it: freezing, kernels, checkpointing, compilation.

    Raises:
        ConfigError: for liger's kernels without its package.
    """
    freeze(model, cfg.freeze)
    text = text_model(model.base)
    if cfg.model.use_liger_kernel:
        if not is_liger_kernel_available():
            raise ConfigError("model.use_liger_kernel=true needs the liger-kernel package: pip install liger-kernel")
        from transformers.integrations.liger import apply_liger_kernel  # it imports every integration that is installed

        kernels = {"rms_norm": True, "geglu": True}
        others = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
        for part in (text, model.drafter.model):
            apply_liger_kernel(part, kernels | others)
            fuse(part, (ATTENTION,))
    else:
        for part in (text, model.drafter.model):
            fuse(part)
    recompute(model, cfg.activation_checkpointing)
    if cfg.parallel.compile:
        layers = (*text.layers, *model.drafter.model.layers)
        # All layers run one function, and a layer's number and kind are constants in it: each may need a graph, with
        # and without a gradient. Past the limit a layer would run uncompiled, in the forward but not in its replay.
        limit = graph_limit(4 * len(layers))
        for layer in layers:
            # Static shapes: after a second length dynamo would compile for any, and then the forward and the replay of
            # activation checkpointing save different tensors under FSDP2 (torch 2.13: CheckpointError in the backward).
            layer.compile(dynamic=False, **limit)


def recompute(model: JointModel, settings: ActivationCheckpointingConfig) -> None:
    """Apply the ``activation_checkpointing`` group. ``auto`` is for :mod:`joint_train.plan` to decide, which knows the
    memory: where it hasn't, everything is recomputed."""
    text = text_model(model.base)
    base, drafter = ("full" if way == "auto" else way for way in (settings.base, settings.drafter))
    model.drafter_recompute = drafter
    model.host_copies = HostCopies() if settings.offload and (base, drafter) != ("none", "none") else None
    if base == "none":
        return
    text.gradient_checkpointing_enable({"use_reentrant": False}, settings.every_n if base == "every_n" else 1)
    for layer in text.layers:
        layer._gradient_checkpointing_func = partial(  # type: ignore[assignment]  # of transformers, and undeclared
            checkpointed, keep_attention=base == "selective", host=model.host_copies
        )


def parallelize(model: JointModel, mesh: DeviceMesh, cfg: Config) -> None:
    """Shard the pair in place; works on the meta device.

    Args:
        model: the pair after :func:`prepare`.
        mesh: from :func:`joint_train.distributed.mesh.init_mesh`.
        cfg: the whole configuration.
    """
    text = text_model(model.base)
    params, compute = DTYPES[cfg.precision.params], compute_dtype(cfg.precision, mesh.device_type)
    whole = set(whole_parameters(model.base))
    for parameter in filter(torch.is_floating_point, rounded_parameters(model.base)):
        parameter.data = parameter.data.to(compute)
    options: dict = {
        "mesh": fsdp_mesh(mesh),
        "shard_placement_fn": placement(mesh["dp_shard"].size()),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute if compute != params else None, reduce_dtype=DTYPES[cfg.precision.reduce]
        ),
    }
    if cfg.parallel.cpu_offload == "all":
        # Pinned memory is CUDA's: copies from and to it go on beside the computation.
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for layer in text.layers:
        fully_shard(layer, reshard_after_forward=cfg.parallel.reshard_after_forward, **options)
    table, ignored = per_layer_table(model.base), whole
    if isinstance(table, QuantisedEmbedding):
        table.compute_dtype = compute
    if table is not None and exchanges_rows(model.base, cfg.parallel):
        shard_rows(table, options["mesh"], compute, cfg.parallel.timeout_seconds)
        ignored = whole | set(table.parameters())
        model.register_forward_pre_hook(_hand_over_lookup, with_kwargs=True)
    elif table is not None:
        sharded = fully_shard(table, reshard_after_forward=True, **options)
        sharded.set_unshard_in_backward(False)  # the gradient of a look-up doesn't need the table
    for root in (model.base, model.drafter):
        name = type(root).__name__
        fully_shard(root, reshard_after_forward=False, ignored_params=ignored, **options)
        type(root).__name__ = name  # transformers' generation knows an assistant by the name of its class
        register_fsdp_forward_method(root, "within")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already a mean over the targets of all ranks: gradients add up.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # not a sum of products by 1, which gloo can't do
    # Ranks with and without images in a step must reduce the same gradients.
    if hasattr(model.base, "set_reduce_scatter_unused_params"):
        cast(FSDPModule, model.base).set_reduce_scatter_unused_params(True)
    elif any(p.requires_grad for tower in towers(model.base) for p in tower.parameters()):
        raise ConfigError(
            f"freeze.towers=false needs torch 2.13, and this is {torch.__version__}: before, FSDP2 can't reduce "
            "the gradients of a tower that saw an image on some ranks only. Set freeze.towers=true, or update torch."
        )


def share_streams(model: JointModel) -> None:
    """Let both roots gather and reduce on the same streams, the drafter's weights while the base's last layer computes;
    after the weights are there, before the first forward.

    Each root has a communication context of its own otherwise, and keeps the last buffer that it reduced until the end
    of the backward: the whole drafter in fp32, for as long as the base's layers go backward.
    """
    roots = sharded_roots(model)
    for root in roots:
        initialise_fsdp(root)  # a context that is shared earlier would be made anew (torch 2.13)
    share_comm_ctx(roots)
    cast(FSDPModule, text_model(model.base).layers[-1]).set_modules_to_forward_prefetch(roots[1:])


def sharded_roots(model: JointModel) -> list[FSDPModule]:
    """Base and drafter as what :func:`parallelize` made of them: FSDP2 changes a module's class in place."""
    return [cast(FSDPModule, root) for root in (model.base, model.drafter)]


def look_up(model: JointModel, ids: Tensor, device: torch.device) -> dict[str, Lookup]:
    """What a forward of ids ``[B, S]`` on the CPU needs besides, if anything, as inputs of the pair.

    Without it a forward waits for the device to know its ids. All ranks together.
    """
    table = per_layer_table(model.base)
    return {LOOKUP: table.look_up(ids).to(device)} if isinstance(table, RowShardedEmbedding) else {}


def _hand_over_lookup(model: JointModel, args: tuple, inputs: dict) -> tuple[tuple, dict]:
    """A forward's pre-hook: the table gets what :func:`look_up` found, or nothing."""
    cast(RowShardedEmbedding, per_layer_table(model.base)).lookup = inputs.pop(LOOKUP, None)
    return args, inputs


def set_last_micro_batch(model: JointModel, last: bool) -> None:
    """With HSDP, let only a step's last micro-batch reduce over the replicas."""
    for root in sharded_roots(model):
        root.set_requires_all_reduce(last)
    if isinstance(table := per_layer_table(model.base), RowShardedEmbedding):
        table.all_reduces = last


def reshard(model: JointModel) -> None:
    """Free the weights that a forward without a backward leaves gathered, and show the shards as the parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
