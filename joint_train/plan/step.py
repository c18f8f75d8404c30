"""One training step on the meta device: the real joint forward, loss and backward. FSDP2's part is simulated."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from joint_train.config import Config
from joint_train.distributed.parallelize import (
    DTYPES,
    exchanges_rows,
    per_layer_table,
    rounded_parameters,
    text_model,
    whole_parameters,
)
from joint_train.distributed.placement import local_numel
from joint_train.distributed.quantised import QuantisedEmbedding, Store
from joint_train.distributed.rows import RowShardedEmbedding, even_lookup
from joint_train.pair.recompute import HostCopies
from joint_train.pair.targets import joint_targets
from joint_train.pair.visibility import attention_masks
from joint_train.plan.meter import COPIES, LOSS, Meter, Work
from joint_train.plan.stand_ins import stand_ins
from joint_train.torch_private import in_backward
from joint_train.weights.composite import Gemma4WithDrafter

if TYPE_CHECKING:
    from joint_train.pair.halves import Base

PER_LAYER = "per-layer embeddings"
SAVED = "saved inputs"


class _Unit:
    """An FSDP2 unit: when its weights are gathered, and what the reduction of its gradients holds.

    Args:
        stays: the weights stay gathered after a forward.
        late: the gradients wait for the end of the backward, since nothing that the unit reads has a gradient.
        copied: bytes of this rank's shard, which with ``parallel.cpu_offload=all`` each gather copies to the device
            first, and of which each reduction copies the gradients back; None without.
    """

    def __init__(
        self,
        name: str,
        parameters: list[nn.Parameter],
        stays: bool,
        late: bool,
        meter: Meter,
        cfg: Config,
        shard: int,
        copied: int | None,
    ):
        self.name, self.meter, self.stays, self.late = name, meter, stays, late
        self.trained = [p for p in parameters if p.requires_grad]
        itemsize = DTYPES[cfg.precision.reduce].itemsize
        self.size = sum(padded(p, shard) * p.dtype.itemsize for p in parameters)
        self.reduced = sum(padded(p, shard) for p in self.trained) * itemsize
        self.copied_in = sum(padded(p, shard) * p.dtype.itemsize for p in self.trained)
        self.gradient, self.accumulates = local_bytes(self.trained, shard, cfg), cfg.optim.grad_accum > 1
        self.copied = copied
        self.gathered, self.waiting = False, len(self.trained)
        self.hooks = [p.register_post_accumulate_grad_hook(self.count_accumulated) for p in self.trained]

    def wrap(self, module: nn.Module) -> None:
        """Gather before a forward and a backward of the module."""
        self.hooks += [module.register_forward_pre_hook(self.gather), module.register_forward_hook(self.after_forward)]

    def gather(self, *_) -> None:
        if not self.gathered:
            self.gathered = True
            if self.copied is not None:
                self.meter.moved["to device", self.name] += self.copied
                self.meter.hold("gathered weights", self.copied)
            self.meter.moved["all-gather", self.name] += self.size
            self.meter.move(COPIES, 2 * self.size, launches=4)  # out of the buffer that the collective fills
            self.meter.hold("gathered weights", self.size)
            if self.copied is not None:
                self.meter.hold("gathered weights", -self.copied)

    def reshard(self) -> None:
        if self.gathered:
            self.gathered = False
            self.meter.hold("gathered weights", -self.size)

    def after_forward(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if not self.stays and not in_backward():  # in a backward it is a recomputation: its own backward follows
            self.reshard()
        if output.requires_grad and not isinstance(module, nn.Embedding):  # the gradient of a look-up needs no table
            output.register_hook(self.gather)

    def count_accumulated(self, _) -> None:
        self.waiting -= 1
        if self.waiting == 0 and not self.late:
            self.reduce()

    def reduce(self) -> None:
        """Free the weights, copy the gradients into one buffer and reduce it; the buffer before it is free by then."""
        self.reshard()
        if self.trained:
            self.meter.hold("gradient reduction", self.reduced - self.meter.held["gradient reduction"])
            self.meter.moved["reduce-scatter", self.name] += self.reduced
            self.meter.move(COPIES, self.copied_in + self.reduced, launches=4)  # into the buffer that it reduces
            self.meter.hold("gradients", self.gradient)  # the reduced ones, beside those that they are made of
            for parameter in self.trained:
                parameter.grad = None
            if self.copied is not None:
                self.meter.moved["to host", self.name] += self.gradient
            # To the host, or into those of the micro-batch before, which are there all the time.
            if self.copied is not None or self.accumulates:
                self.meter.hold("gradients", -self.gradient)


class _PlannedRows(RowShardedEmbedding):
    """The per-layer table whose rows are exchanged: the same forward, without other ranks."""

    meter: Meter
    params_dtype: torch.dtype
    gradient: int  # bytes of the shard's gradient, where it isn't there from an earlier micro-batch

    def read(self, wanted: Tensor) -> Tensor:
        return self.weight.new_empty(len(wanted), self.weight.shape[1], dtype=self.params_dtype).to(self.compute_dtype)

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        self.meter.moved["all-to-all", PER_LAYER] += rows.nbytes
        return rows.new_empty(sum(received), rows.shape[1])

    def add_gradient(self, rows: Tensor, wanted: Tensor) -> None:
        self.meter.hold("gradients", self.gradient)
        rows.to(self.params_dtype)


class _PlannedQuantisedRows(_PlannedRows):
    """The same of a table that is kept in codes."""

    store: Store

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.store.dense


class _PlannedCopies(HostCopies):
    """Inputs that wait on the host: what is copied, without a host."""

    meter: Meter

    def to_host(self, tensor: Tensor) -> Tensor:
        self.meter.moved["to host", SAVED] += tensor.nbytes
        with self.meter.paused():
            return torch.empty_like(tensor)

    def to_device(self, buffer: Tensor, device: torch.device) -> tuple[Tensor, None]:
        self.meter.moved["to device", SAVED] += buffer.nbytes
        return torch.empty_like(buffer), None

    def release(self, buffer: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Step:
    """One micro-batch on a rank: FLOPs, and what lives when most does, besides the shard and the optimizer's states."""

    flops: int
    recomputed: int
    work: dict[str, Work]  # by part of the step
    at_peak: Counter[str]
    moved: Counter[tuple[str, str]]  # bytes by collective and unit, of the whole buffer


def simulate(
    model: Gemma4WithDrafter,
    cfg: Config,
    shard: int,
    device_type: str = "cpu",
    flex_head_dim: int | None = None,
    base_alone: bool = False,
    drafter_alone: bool = False,
    target_share: float = 1.0,
) -> Step:
    """Run a micro-batch on the meta device.

    Args:
        model: from :func:`joint_train.weights.loading.meta_pair` with this configuration, in the dtype of compute.
        shard: ranks that a weight is sharded over.
        device_type: "cuda" plays the products of cuBLAS; "cpu" runs what the CPU runs.
        flex_head_dim: the largest that FlexAttention runs with on the device; None: any.
        base_alone: without the drafter, and with the base's whole logits: what plain fine-tuning does.
        drafter_alone: after ``freeze.base_after``; the base is frozen when this returns.
        target_share: of the tokens of a row: its last ones are its targets.
    """
    text, meter, units, hooks = text_model(model.base), Meter(), [], []
    offloaded = cfg.parallel.cpu_offload == "all"
    sizes = {id(p): DTYPES[cfg.precision.params].itemsize for p in model.parameters()}
    sizes |= {id(p): p.dtype.itemsize for p in rounded_parameters(model.base)}
    whole = whole_parameters(model.base)
    if drafter_alone:
        model.freeze_base()

    def unit(name: str, parameters: list[nn.Parameter], stays: bool, late: bool = False) -> _Unit:
        copied = sum(local_numel(p.shape, shard) * sizes[id(p)] for p in parameters) if offloaded else None
        units.append(_Unit(name, parameters, stays, late, meter, cfg, shard, copied))
        return units[-1]

    model.train()
    for layer in text.layers:
        unit("layers", list(layer.parameters()), not cfg.parallel.reshard_after_forward).wrap(layer)
    largest = max(layer.size for layer in units)
    late = []
    table = per_layer_table(model.base)
    if table is not None and exchanges_rows(model.base, cfg.parallel):
        table.__class__ = _PlannedQuantisedRows if isinstance(table, QuantisedEmbedding) else _PlannedRows
        rows = cast(_PlannedRows, table)
        rows.meter, rows.compute_dtype, rows.params_dtype = meter, rows.weight.dtype, DTYPES[cfg.precision.params]
        rows.gradient = 0 if cfg.optim.grad_accum > 1 else local_bytes(list(rows.parameters()), shard, cfg)
        # Each token another one, and one for the padding: the most that there can be.
        rows.lookup = even_lookup(cfg.data.micro_batch_size * cfg.data.max_length + 1, shard, "meta")
    elif table is not None:
        late.append(unit(PER_LAYER, list(table.parameters()), False, late=True))
        late[0].wrap(table)
    taken = {id(p) for layer in (*text.layers, *([table] if table is not None else [])) for p in layer.parameters()}
    taken |= {id(p) for p in whole}
    root = unit("base root", [p for p in model.base.parameters() if id(p) not in taken], True, late=True)
    late.insert(0, root)
    drafter = unit("drafter", list(model.drafter.parameters()), True)
    drafter.hooks.append(model.drafter.pre_projection.register_forward_pre_hook(drafter.gather))
    if model.drafter.masked_embedding is not None:
        ordering = model.drafter.masked_embedding.token_ordering
        model._token_centroid = ordering._version, torch.empty_like(ordering)

    if model.host_copies is not None:
        model.host_copies.__class__ = _PlannedCopies
        cast(_PlannedCopies, model.host_copies).meter = meter

    ids = torch.ones(cfg.data.micro_batch_size, cfg.data.max_length, dtype=torch.long)
    labels = ids.clone()
    labels[:, : round((1 - target_share) * ids.shape[1])] = -100
    targets = joint_targets(labels, None, model.drafter_num_steps, model.pairing).to("meta")
    documents = torch.ones_like(ids, device="meta") if cfg.data.packing else None
    weights = torch.ones(1 + model.drafter_num_steps, device="meta")
    try:
        hooks += meter.watch(model)
        with meter, stand_ins(meter, device_type, flex_head_dim):
            for tensor in (*model.parameters(), *model.buffers()):
                meter.ignore(tensor)
            if cfg.optim.grad_accum > 1 and not offloaded:
                meter.hold("gradients", local_bytes([p for p in model.parameters() if p.requires_grad], shard, cfg))
            root.gather()
            meter.hold("gathered weights", largest)  # the next layer's, on their way while one is computed
            if base_alone:
                loss = _loss_of_base(model.base, ids.to("meta"), documents, meter)
            else:
                loss = model(ids.to("meta"), document_ids=documents, targets=targets, weights=weights).loss
            if loss.requires_grad:
                loss.backward()
                meter.hold("gathered weights", -largest)
                for waiting in late:
                    waiting.reduce()
    finally:
        for hook in (*hooks, *(hook for unit in units for hook in unit.hooks)):
            hook.remove()
        for parameter in model.parameters():
            parameter.grad = None
    return Step(meter.flops, meter.recomputed, meter.work, meter.at_peak, meter.moved)


def _loss_of_base(base: "Base", ids: Tensor, documents: Tensor | None, meter: Meter) -> Tensor:
    """Cross-entropy of the base's logits in fp32, ``[B, S, V]``."""
    config = base.config.get_text_config()
    masks = attention_masks(config, (ids.shape[0], ids.shape[1]), base.lm_head.weight.dtype, ids.device, documents)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    hidden = base.model(input_ids=ids, attention_mask=masks, position_ids=positions, use_cache=False).last_hidden_state
    with meter.within(LOSS):
        logits = base.lm_head(hidden)
        if (cap := config.final_logit_softcapping) is not None:
            logits = torch.tanh(logits / cap) * cap
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


def padded(parameter: nn.Parameter, shard: int) -> int:
    """Elements of a weight as FSDP2 gathers and reduces it."""
    return local_numel(parameter.shape, shard) * shard


def local_bytes(parameters: list[nn.Parameter], shard: int, cfg: Config) -> int:
    """Bytes of a rank's shards, padding included, in ``precision.params``."""
    return sum(local_numel(p.shape, shard) for p in parameters) * DTYPES[cfg.precision.params].itemsize
