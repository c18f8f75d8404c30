"""An embedding table of which every rank holds some rows, and asks the others for those that it reads.

As a unit of FSDP2 a table is gathered whole for each look-up, and its gradient reduced whole: of E4B's per-layer
embeddings 5.25 and 10.5 GiB in each micro-batch, for some 40 MiB that are read. Here the ranks of ``dp_shard`` exchange
ids and rows (all-to-all), and the gradient goes back the same way, to be added to the shard of who holds the row.

Which rows a micro-batch reads is found on the CPU (:meth:`RowShardedEmbedding.look_up`), where its ids still are: the
exchange needs the numbers of rows on the host, and so nothing waits for the device. A forward that wasn't told finds it
out itself.
"""

import dataclasses
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextScaledWordEmbedding

from joint_train.distributed.placement import sharded_like
from joint_train.distributed.quantised import QuantisedEmbedding, Store
from joint_train.pair.targets import send
from joint_train.torch_private import local_shape_and_offset


@dataclasses.dataclass
class Lookup:
    """Who reads which rows in a micro-batch.

    Attributes:
        ids: ``[U]`` int64, ascending: those that this rank reads, and the padding's. Rows are asked for once.
        padding: where in `ids` the padding's is, whose row is never trained; -1 in a table without one.
        asked: how many of `ids` each rank of the shard group holds.
        wanted: ``[M]`` int64, rows of this rank's shard that others read, in the order of those who do.
        answered: how many of `wanted` each rank reads.
    """

    ids: Tensor
    padding: int
    asked: list[int]
    wanted: Tensor
    answered: list[int]

    def to(self, device: torch.device) -> "Lookup":
        """The same with its tensors on a device; nothing waits for it."""
        ids, wanted = (send(x, device) for x in (self.ids, self.wanted))
        return dataclasses.replace(self, ids=ids, wanted=wanted)


def even_lookup(count: int, ranks: int, device: torch.device | str) -> Lookup:
    """What is exchanged when `count` ids are all different and spread evenly over the ranks; for plans."""
    each = [count // ranks + (i < count % ranks) for i in range(ranks)]
    ids = torch.empty(count, dtype=torch.long, device=device)
    return Lookup(ids, 0, each, torch.empty_like(ids), each)


class RowShardedEmbedding(Gemma4TextScaledWordEmbedding):
    """Made of a table by :func:`shard_rows`; its weight is a shard on the mesh that FSDP2's are on."""

    weight: Any  # a DTensor
    compute_dtype: torch.dtype
    cpu_group: dist.ProcessGroup  # the shard group's, for what is on the CPU
    lookup: Lookup | None = None  # of the next forward
    all_reduces = True  # with HSDP: the next backward is the last that adds to this gradient
    partial: Tensor | None = None  # with HSDP: the shard's gradient, of this replica's ranks only

    @property
    def group(self) -> dist.ProcessGroup:
        mesh = self.weight.device_mesh
        return mesh.get_group(mesh.ndim - 1)

    def look_up(self, ids: Tensor) -> Lookup:
        """What a forward of these ids exchanges; tensors on the CPU. All ranks of the shard group together.

        Args:
            ids: int64, of any shape.

        Raises:
            ValueError: for an id that the table doesn't have.
        """
        size, rank = self.group.size(), self.group.rank()
        rows = -(-self.num_embeddings // size)
        pad = [] if self.padding_idx is None else [self.padding_idx]
        ids = torch.cat([ids.detach().flatten().cpu(), torch.tensor(pad, dtype=torch.long)]).unique()
        if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < self.num_embeddings:
            raise ValueError(f"ids from {ids[0]} to {ids[-1]} in a table of {self.num_embeddings} rows.")
        padding = int(torch.searchsorted(ids, pad[0])) if pad else -1
        asked = torch.bincount(ids // rows, minlength=size)
        if size == 1:
            return Lookup(ids, padding, asked.tolist(), ids, asked.tolist())
        answered = torch.empty_like(asked)
        dist.all_to_all_single(answered, asked, group=self.cpu_group)
        wanted = ids.new_empty(int(answered.sum()))
        dist.all_to_all_single(wanted, ids, answered.tolist(), asked.tolist(), group=self.cpu_group)
        return Lookup(ids, padding, asked.tolist(), wanted - rank * rows, answered.tolist())

    def forward(self, input_ids: Tensor) -> Tensor:
        """``[B, S, D]`` of ids ``[B, S]``, in the dtype of compute."""
        lookup, self.lookup = self.lookup, None
        if lookup is None:
            lookup = self.look_up(input_ids).to(input_ids.device)
        rows = _Rows.apply(self.weight, self, lookup)
        index = torch.searchsorted(lookup.ids, input_ids).clamp(max=len(lookup.ids) - 1)
        out = _Picked.apply(rows, index, lookup.padding)
        # An id that wasn't asked for would read another's row: NaN, so that the loss says that something is wrong.
        scale = self.embed_scale.to(out.dtype).where(lookup.ids[index] == input_ids, float("nan"))
        return out * scale[..., None]

    def read(self, wanted: Tensor) -> Tensor:
        """Rows ``[M, D]`` of this rank's shard, in the dtype of compute."""
        return self.weight.to_local()[wanted].to(self.compute_dtype)

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send the ranks of the shard group so many rows ``[_, D]`` each; what they send."""
        if len(sent) == 1:
            return rows
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.group)
        return out

    def add_gradient(self, rows: Tensor, wanted: Tensor) -> None:
        """Add gradients ``[M, D]`` to the rows ``wanted`` of this rank's shard."""
        weight, mesh = self.weight, self.weight.device_mesh
        total = self.partial
        if total is None:
            direct = mesh.ndim == 1 and weight.grad is not None
            total = weight.grad.to_local() if direct else torch.zeros_like(weight.to_local())
        total.index_put_((wanted,), rows.to(total.dtype), accumulate=True)
        if mesh.ndim > 1:
            self.partial = None if self.all_reduces else total
            if not self.all_reduces:
                return
            dist.all_reduce(total, group=mesh.get_group(0))
        if weight.grad is None:
            weight.grad = sharded_like(total, weight)
        elif mesh.ndim > 1:
            weight.grad.to_local().add_(total)


class _Rows(torch.autograd.Function):
    """The rows ``[U, D]`` that a look-up asks for; the backward adds to the table's gradient where the rows are."""

    @staticmethod
    def forward(ctx, weight: DTensor, table: RowShardedEmbedding, lookup: Lookup) -> Tensor:
        ctx.table, ctx.lookup = table, lookup
        return table.exchange(table.read(lookup.wanted), lookup.answered, lookup.asked)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, ...]:
        table, lookup = ctx.table, ctx.lookup
        if table.weight.requires_grad:
            table.add_gradient(table.exchange(grad, lookup.asked, lookup.answered), lookup.wanted)
        return None, None, None


class _Picked(torch.autograd.Function):
    """``rows[index]``. The gradients of a row are summed in fp32: in bfloat16 a sum of ones stops growing at 256."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count, ctx.padding = len(rows), padding
        return nn.functional.embedding(index, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        sums = torch.ops.aten.embedding_dense_backward(wide, index, ctx.count, ctx.padding, False)
        return sums.to(grad.dtype), None, None


class QuantisedRows(RowShardedEmbedding):
    """The same of a table that is kept in codes: rows are dequantised where they are, and sent as numbers."""

    store: Store

    @property
    def weight(self) -> Any:  # type: ignore[override]
        return self.store.codes

    def read(self, wanted: Tensor) -> Tensor:
        return self.store.numbers(self.compute_dtype, wanted)


def shard_rows(table: nn.Embedding, mesh: DeviceMesh, compute_dtype: torch.dtype, timeout_seconds: int) -> None:
    """Make a :class:`RowShardedEmbedding` of a table in place; works on the meta device.

    Args:
        table: a ``Gemma4TextScaledWordEmbedding``.
        mesh: as ``fully_shard`` takes it: its last dimension shards, and the first of two replicates.
        compute_dtype: of the rows that are exchanged, and so of what a forward returns.
        timeout_seconds: longest wait for the other ranks' ids.
    """
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    for name, weight in dict(table.named_parameters()).items():
        shape, offset = local_shape_and_offset(weight.shape, mesh, placements)
        local = weight.detach()[offset[0] : offset[0] + shape[0]].clone()
        sharded = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )
        table.register_parameter(name, nn.Parameter(sharded, requires_grad=weight.requires_grad))
    table.__class__ = QuantisedRows if isinstance(table, QuantisedEmbedding) else RowShardedEmbedding
    table = cast(RowShardedEmbedding, table)
    table.compute_dtype = compute_dtype
    table.cpu_group = _cpu_group(mesh, timeout_seconds)


def _cpu_group(mesh: DeviceMesh, timeout_seconds: int) -> dist.ProcessGroup:
    """The ranks of the mesh's last dimension, on gloo; a mesh on GPUs may have groups of NCCL alone."""
    if mesh.device_type == "cpu":
        return mesh.get_group(mesh.ndim - 1)
    groups = mesh.mesh.reshape(-1, mesh.mesh.shape[-1]).tolist()
    return dist.new_subgroups_by_enumeration(groups, timedelta(seconds=timeout_seconds), backend="gloo")[0]
