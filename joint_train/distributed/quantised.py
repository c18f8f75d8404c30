"""A frozen base's weights kept in 4 or 8 bits (QLoRA: Dettmers et al., arXiv 2305.14314), dequantised layer by layer.

    y = D(codes, scales) x          the gradient reaches x alone; D is made again in the backward

A weight ``[…, out, in]`` is two frozen parameters of bytes: its codes ``[…, out, in * bits / 8]``, and the float32
scales of blocks along a row ``[…, out, 4 * blocks]``. FSDP2 cuts and gathers bytes as it does numbers, and never casts
them. A block lies within a row, so that the codes of a row are the same on any mesh.

The linear layers of the decoder, the experts and the per-layer embeddings are kept so. The embedding isn't: it is the
head as well, which the losses read chunk by chunk. Nor are the router, the norms and the towers.
"""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import _grouped_mm
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts, Gemma4TextScaledWordEmbedding

from joint_train.distributed.placement import local_tensor
from joint_train.distributed.ranks import Ranks
from joint_train.errors import ConfigError
from joint_train.torch_private import local_shape_and_offset

log = logging.getLogger(__name__)

# NormalFloat of 4 bits: quantiles of the normal distribution, symmetric, with a zero (the paper's appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
LEAST_TORCH = (2, 13)
PIECE = 2**25  # numbers that are dequantised at once: in float32, beside the weight in its own dtype


class Kind(NamedTuple):
    """How numbers become codes.

    Attributes:
        values: in a byte.
        block: numbers that share a scale, at most.
        highest: the largest code, by which the largest number of a block is divided.
        encode: numbers over their scale, in float32, as bytes, one for each.
        decode: bytes as numbers in float32.
    """

    values: int
    block: int
    highest: float
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def _nearest_nf4(x: Tensor) -> Tensor:
    levels = torch.tensor(NF4, device=x.device)
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


_TABLES: dict[torch.device, Tensor] = {}


def _nf4_pairs(codes: Tensor) -> Tensor:
    """The two numbers of each byte: a table of all 256 bytes is read once a byte."""
    table = _TABLES.get(codes.device)
    if table is None:
        both = torch.arange(256)
        table = torch.tensor(NF4)[torch.stack([both & 15, both >> 4], 1)].to(codes.device)
        if codes.device.type != "meta" and not torch.compiler.is_compiling():
            _TABLES[codes.device] = table
    return nn.functional.embedding(codes.int(), table).flatten(-2)


KINDS = {
    "nf4": Kind(2, 64, 1.0, _nearest_nf4, _nf4_pairs),
    "int8": Kind(
        1, 128, 127.0,
        lambda x: x.round().to(torch.int8).view(torch.uint8),
        lambda codes: codes.view(torch.int8).float(),
    ),
    "fp8": Kind(
        1, 128, 448.0,
        lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8),
        lambda codes: codes.view(torch.float8_e4m3fn).float(),
    ),
}  # fmt: skip


def block_size(kind: str, columns: int) -> int:
    """Numbers of a row that share a scale: the kind's, or what of it divides the row."""
    return math.gcd(columns, KINDS[kind].block)


def quantise(weight: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Codes ``[…, in / values]`` and scales ``[…, 4 * in / block]``, both uint8, of numbers ``[…, in]``."""
    how = KINDS[kind]
    blocks = weight.float().unflatten(-1, (-1, block))
    scales = blocks.abs().amax(-1) / how.highest
    codes = how.encode(blocks / torch.where(scales > 0, scales, 1.0).unsqueeze(-1)).flatten(-2)
    if how.values == 2:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, scales.contiguous().view(torch.uint8)


def dequantise(codes: Tensor, scales: Tensor, kind: str, block: int, dtype: torch.dtype) -> Tensor:
    """Numbers ``[…, in]`` of codes and scales, multiplied in float32 and rounded once."""
    columns = codes.shape[-1] * KINDS[kind].values
    if codes.numel() * KINDS[kind].values > PIECE and codes.dim() > 1:
        out = torch.empty(*codes.shape[:-1], columns, dtype=dtype, device=codes.device)
        step = max(1, PIECE // (out.numel() // out.shape[0]))
        for start in range(0, len(out), step):
            piece = slice(start, start + step)
            out[piece] = _multiply(codes[piece], scales[piece], kind, block)
        return out
    return _multiply(codes, scales, kind, block).to(dtype)


def _multiply(codes: Tensor, scales: Tensor, kind: str, block: int) -> Tensor:
    numbers = KINDS[kind].decode(codes).unflatten(-1, (-1, block))
    return (numbers * scales.contiguous().view(torch.float32).unsqueeze(-1)).flatten(-2)


class Store:
    """A quantised weight of a module: its two parameters, by the name that it had.

    Attributes:
        shape, dtype: of the weight.
        dense: on the meta device, to stand for it where only its shape counts.
        errors: sums of squares over this rank's part: of what quantising changed, and of the weight.
    """

    def __init__(self, module: nn.Module, name: str, kind: str):
        weight = cast(Tensor, getattr(module, name))
        self.module, self.name, self.kind = module, name, kind
        self.shape, self.dtype = tuple(weight.shape), weight.dtype
        self.block = block_size(kind, self.shape[-1])
        self.errors = torch.zeros(2, dtype=torch.float64)
        self.dense = torch.empty(self.shape, dtype=self.dtype, device="meta")
        self.dense.store = self  # type: ignore[attr-defined]
        *rows, columns = self.shape
        delattr(module, name)
        for part, size in (("codes", columns // KINDS[kind].values), ("scales", 4 * columns // self.block)):
            data = torch.empty(*rows, size, dtype=torch.uint8, device="meta")
            module.register_parameter(f"{name}_{part}", nn.Parameter(data, requires_grad=False))

    @property
    def codes(self) -> Tensor:
        return getattr(self.module, f"{self.name}_codes")

    @property
    def scales(self) -> Tensor:
        return getattr(self.module, f"{self.name}_scales")

    def numbers(self, dtype: torch.dtype, part: Any = ...) -> Tensor:
        """The weight, or rows of it, dequantised; of a shard, those that are here."""
        codes, scales = (local_tensor(t)[part] for t in (self.codes, self.scales))
        return dequantise(codes, scales, self.kind, self.block, dtype)

    def part(self) -> tuple[slice, ...]:
        """The part of the weight whose codes are on this rank."""
        codes, values = self.codes, KINDS[self.kind].values
        if not isinstance(codes, DTensor):
            return tuple(slice(0, size) for size in self.shape)
        shape, offset = local_shape_and_offset(codes.shape, codes.device_mesh, codes.placements)
        *rows, columns = (slice(first, first + size) for first, size in zip(offset, shape, strict=True))
        return (*rows, slice(columns.start * values, columns.stop * values))

    def sharded(self, numbers: Tensor) -> Tensor:
        """Numbers of :meth:`part` as a tensor that is cut as the codes are."""
        codes = self.codes
        if not isinstance(codes, DTensor):
            return numbers
        whole = self.dense
        return DTensor.from_local(
            numbers, codes.device_mesh, codes.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )


class _Product(torch.autograd.Function):
    """``x Wᵀ`` of ``x [*, in]``; neither W nor x is kept for the backward."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor, kind: str, block: int) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.kind, ctx.block = kind, block
        return nn.functional.linear(x, dequantise(codes, scales, kind, block, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        codes, scales = ctx.saved_tensors
        return grad @ dequantise(codes, scales, ctx.kind, ctx.block, grad.dtype), None, None, None, None


class _GroupedProduct(torch.autograd.Function):
    """The same for rows that are sorted by expert, ``ends`` being where each expert's end."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor, ends: Tensor, kind: str, block: int) -> Tensor:
        ctx.save_for_backward(codes, scales, ends)
        ctx.kind, ctx.block = kind, block
        return _grouped_mm(x, dequantise(codes, scales, kind, block, x.dtype).transpose(-2, -1), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, ends = ctx.saved_tensors
        weight = dequantise(codes, scales, ctx.kind, ctx.block, grad.dtype)
        return _grouped_mm(grad.contiguous(), weight, ends), None, None, None, None, None


class QuantisedLinear(nn.Linear):
    """A linear layer, of which :func:`keep_quantised` has made this in place."""

    store: Store

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """On the meta device: whoever needs more than its shape and dtype asks for the codes."""
        return self.store.dense

    def forward(self, input: Tensor) -> Tensor:
        store = self.store
        return _Product.apply(input, store.codes, store.scales, store.kind, store.block)


class QuantisedExperts(Gemma4TextExperts):
    """Experts whose two weights are quantised: tokens are sorted by expert, and each of the two products is one."""

    stores: dict[str, Store]

    @property
    def gate_up_proj(self) -> Tensor:  # type: ignore[override]
        return self.stores["gate_up_proj"].dense

    @property
    def down_proj(self) -> Tensor:  # type: ignore[override]
        return self.stores["down_proj"].dense

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As :class:`Gemma4TextExperts`; ``[N, H]``, with ``[N, k]`` experts and weights."""
        each = top_k_index.shape[-1]
        chosen, order = torch.sort(top_k_index.flatten(), stable=True)
        experts = torch.arange(len(self.gate_up_proj), device=chosen.device, dtype=chosen.dtype)
        ends = torch.searchsorted(chosen, experts, right=True).int()
        gate, up = self.product("gate_up_proj", hidden_states[order // each], ends).chunk(2, dim=-1)
        out = self.product("down_proj", self.act_fn(gate) * up, ends) * top_k_weights.flatten()[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return out[back].unflatten(0, (-1, each)).sum(1).to(hidden_states.dtype)

    def product(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        store = self.stores[name]
        return _GroupedProduct.apply(x, store.codes, store.scales, ends, store.kind, store.block)


class QuantisedEmbedding(Gemma4TextScaledWordEmbedding):
    """A table of which the rows that are read are dequantised."""

    store: Store
    compute_dtype: torch.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.store.dense

    def forward(self, input_ids: Tensor) -> Tensor:
        store = self.store
        codes, scales = (nn.functional.embedding(input_ids, bytes_) for bytes_ in (store.codes, store.scales))
        rows = dequantise(codes, scales, store.kind, store.block, self.compute_dtype)
        return rows * self.embed_scale.to(rows.dtype)


def keep_quantised(text: nn.Module, kind: str) -> None:
    """Keep the weights of a language model's decoder in codes, in place, on the meta device; the adapters are there
    already.

    Raises:
        ConfigError: for an older torch, whose FSDP2 refuses parameters that are bytes.
    """
    if (version := tuple(int(n) for n in torch.__version__.split(".")[:2])) < LEAST_TORCH:
        raise ConfigError(
            f"model.quantization={kind} needs torch {'.'.join(map(str, LEAST_TORCH))}, and this is "
            f"{'.'.join(map(str, version))}, whose FSDP2 can't shard parameters of bytes: update torch, or set "
            "model.quantization=none."
        )
    for layer in cast(Any, text).layers:
        for name, module in layer.named_modules():
            if isinstance(module, Gemma4TextExperts):
                kept = {name: Store(module, name, kind) for name in ("gate_up_proj", "down_proj")}
                module.stores = kept  # type: ignore[assignment]
                module.__class__ = QuantisedExperts
            elif type(module) is nn.Linear and "router" not in name and "lora_" not in name:
                if module.bias is None:
                    module.store = Store(module, "weight", kind)
                    module.__class__ = QuantisedLinear
    if (table := getattr(text, "embed_tokens_per_layer", None)) is not None:
        table.compute_dtype = table.weight.dtype
        table.store = Store(table, "weight", kind)
        table.__class__ = QuantisedEmbedding


def stores(model: nn.Module) -> dict[str, Store]:
    """The quantised weights of a model, by the names that they would have."""
    found: dict[str, Store] = {}
    for name, module in model.named_modules():
        of_module = getattr(module, "stores", None) or ({"weight": module.store} if hasattr(module, "store") else {})
        found |= {f"{name}.{part}": store for part, store in of_module.items()}
    return found


def rounding(kept: Iterable[Store], ranks: Ranks) -> float:
    """How far weights that are kept in codes are from what they were, as a share of them; it is logged. Collective."""
    kept = list(kept)
    mine = sum((store.errors for store in kept), torch.zeros(2, dtype=torch.float64)).tolist()
    changed, size = (sum(of_rank) for of_rank in zip(*ranks.each("comparing weights", lambda: mine), strict=True))
    error = (changed / size) ** 0.5 if size else 0.0
    log.info(
        "%d weights of the base are kept as %s, which changes them by %.2f %% (root mean square). An export has "
        "the weights of the folder", len(kept), kept[0].kind, 100 * error,
    )  # fmt: skip
    return error
