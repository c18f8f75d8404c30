"""What code would hold, compute and move on a GPU, counted while it runs on the meta device.

Every operation's work belongs to a part of a step (:data:`PARTS`): its FLOPs by the kernel that does them, the bytes
that it reads and writes, and its launches. What is computed in a backward belongs to the part whose forward made it,
which autograd's sequence numbers tell.
"""

import contextlib
import math
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, Gemma4TextAttention, Gemma4TextExperts

from joint_train.pair import attention as attention_module
from joint_train.pair import heads, loss, terms, visibility
from joint_train.pair import model as model_module
from joint_train.pair.blocks import visible
from joint_train.pair.centroids import Centroids
from joint_train.torch_private import TorchDispatchMode, in_backward, number_in_backward, sequence_number

PRODUCTS, LOSS, NORMS, OTHERS, COPIES = "products", "loss", "norms", "element-wise", "FSDP2's copies"
PARTS = (PRODUCTS, "sliding attention", "full attention", LOSS, NORMS, OTHERS, COPIES)
PASSES = 3  # over the logits, of the loss's compiled kernels (counted in those that are made for sm_90)
PRODUCT = "product"  # the kernel of a matrix product; attention's are named by `_kernel`


@dataclass
class Work:
    """FLOPs by kernel, bytes that are read and written, and launches of kernels."""

    flops: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    launches: int = 0

    def add(self, other: "Work", times: int = 1) -> None:
        for kernel, flops in other.flops.items():
            self.flops[kernel] += flops * times
        self.bytes += other.bytes * times
        self.launches += other.launches * times


@dataclass(frozen=True)
class _Seen:
    """An operation with arguments of these layouts: its cost, and the layout of its result where that is all of it."""

    flops: int
    bytes: int
    result: tuple | None


class Meter(TorchDispatchMode):
    """Counts bytes of living tensors and work of the operations under it; `hold` adds what isn't a tensor here."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.flops, self.recomputed, self.peak = 0, 0, 0, 0
        self.work: dict[str, Work] = {part: Work() for part in PARTS}
        self.moved: Counter[tuple[str, str]] = Counter()
        self.held: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.layer_type = "full_attention"  # of the attention that runs
        self._paused = False
        self._seen: dict[tuple, _Seen] = {}
        self._known: dict[int, weakref.ref | None] = {}
        self._within: list[str] = []
        self._marks: tuple[list[int], list[str | None]] = ([], [])  # sequence numbers, and the part from each on

    @property
    def traffic(self) -> int:
        """Bytes that all operations read and write, each its inputs and its output once."""
        return sum(work.bytes for work in self.work.values())

    @property
    def launches(self) -> int:
        return sum(work.launches for work in self.work.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        kind = _kind(func)
        if kind == "view":
            out = func(*args, **kwargs)
            if isinstance(out, Tensor):
                self.see(out)
            return out
        seen, out = self.run(func, kind, args, kwargs)
        if kind != "allocation":
            self.charge(_name(func) in _PRODUCTS, seen)
        if isinstance(out, Tensor):
            self.see(out)
        elif isinstance(out, (tuple, list)):
            for tensor in out:
                if isinstance(tensor, Tensor):
                    self.see(tensor)
        return out

    def run(self, func, kind: str, args, kwargs) -> tuple[_Seen, object]:
        """The operation's result. Layers repeat: one that was seen before gets an empty tensor like that of then."""
        key = (func, _describe(args), _describe(tuple(kwargs.items())) if kwargs else None)
        seen = self._seen.get(key)
        if seen is not None and seen.result is not None:
            shape, stride, dtype = seen.result
            return seen, torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        if kind == "in place":
            out = kwargs["out"] if "out" in kwargs else args[0] if func._schema.returns else func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if seen is None:
            fresh = kind != "in place" and isinstance(out, Tensor) and out.is_meta and not any(out is x for x in args)
            result = (out.shape, out.stride(), out.dtype) if fresh else None
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            seen = self._seen[key] = _Seen(flops, _moved(func, args, kwargs, out), result)
        return seen, out

    def charge(self, is_product: bool, seen: _Seen) -> None:
        again, part = in_backward() and torch.is_grad_enabled(), self.part()
        if part is None:
            part = PRODUCTS if is_product else OTHERS
        work = self.work[part]
        work.bytes += seen.bytes
        work.launches += 1
        if seen.flops:
            self.count(seen.flops, again, part)

    def part(self) -> str | None:
        """What the operation that runs belongs to; None where its own kind says it."""
        # A backward has gradients off, but for the forwards that checkpointing repeats.
        if self._within:
            return self._within[-1]
        if not in_backward() or torch.is_grad_enabled():
            return None
        if (number := number_in_backward()) is None:
            return None
        numbers, parts = self._marks
        at = bisect_right(numbers, number)
        return parts[at - 1] if at else None

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What runs inside belongs to a part, and so does its backward."""
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is counted of what runs inside."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def enter(self, part: str) -> None:
        self._within.append(part)
        self._mark()

    def leave(self) -> None:
        self._within.pop()
        self._mark()

    def _mark(self) -> None:
        numbers, parts = self._marks
        numbers.append(sequence_number())
        parts.append(self._within[-1] if self._within else None)

    def count(self, flops: int, again: bool = False, part: str = PRODUCTS, kernel: str = PRODUCT) -> None:
        self.flops += flops
        self.recomputed += flops * again
        self.work[part].flops[kernel] += flops

    def move(self, part: str, size: int, launches: int = 1) -> None:
        """Bytes that are read and written by what isn't an operation here."""
        self.work[part].bytes += size
        self.work[part].launches += launches

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_, self=self, key=key, size=size):
            if self._known.pop(key, None) is not None:
                self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.look()

    def ignore(self, tensor: Tensor) -> None:
        """Don't count a tensor that is there already."""
        self._known[tensor.untyped_storage()._cdata] = None

    def hold(self, what: str, size: int) -> None:
        self.held[what] += size
        self.look()

    def look(self) -> None:
        total = self.live + self.held.total()
        if total > self.peak:
            self.peak = total
            self.at_peak = self.held + Counter({"activations": self.live})

    def watch(self, model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Hooks by which norms and the layer types of attention are known."""
        hooks = []
        for module in model.modules():
            if isinstance(module, Gemma4RMSNorm):
                hooks.append(module.register_forward_pre_hook(lambda *_: self.enter(NORMS)))
                # Also where checkpointing ends a replay early, by an exception.
                hooks.append(module.register_forward_hook(lambda *_: self.leave(), always_call=True))
            elif isinstance(module, Gemma4TextAttention):
                hooks.append(module.register_forward_pre_hook(self._of_layer_type))
        return hooks

    def _of_layer_type(self, module: Gemma4TextAttention, args: tuple) -> None:
        self.layer_type = module.layer_type or "full_attention"


# Operations by the names that torch.ops.aten has them by.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
# What reads or writes only rows of its first argument.
_OF_ROWS = {
    "embedding", "index", "index_select", "gather", "index_add_", "index_fill_", "scatter_add_", "index_put_",
    "_index_put_impl_",
}  # fmt: skip
_ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}


@cache
def _name(func) -> str:
    return func._overloadpacket.__name__


@cache
def _kind(func) -> str:
    if _name(func) in _ALLOCATIONS:
        return "allocation"
    if func._schema.is_mutable:
        return "in place"
    aliases = any(result.alias_info is not None for result in func._schema.returns)
    return "view" if aliases or _name(func) in ("_unsafe_view", "_reshape_alias") else "new"


def _moved(func, args, kwargs, out) -> int:
    """Bytes that an operation reads and writes: its inputs and outputs once each, of rows only those."""
    outputs = [out] if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else []
    inputs = [*args, *kwargs.values()]
    inputs += [x for many in args if isinstance(many, (tuple, list)) for x in many]
    tensors = [x for x in (*inputs, *outputs) if isinstance(x, Tensor)]
    if _name(func) not in _OF_ROWS:
        return sum(map(_size, tensors))
    rows = [x for x in tensors if x is not args[0]]
    source = [x for x in rows if x.dtype == args[0].dtype]
    return sum(map(_size, rows)) + sum(map(_size, source))


def _size(tensor: Tensor) -> int:
    """Bytes, without repetitions of an expanded tensor."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in pairs if stride or size == 0) * tensor.dtype.itemsize


def _describe(value):
    """A hashable description of an operation's arguments, tensors by their layout."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_describe, value)) if isinstance(value, (tuple, list)) else value


def _kernel(name: str, head_dim: int, direction: str) -> str:
    """How a kernel of attention is named in ``Machine.attention_tflops``: kernels are made for both head sizes."""
    return f"{name} {256 if head_dim <= 256 else 512} {direction}"


class _Attention(torch.autograd.Function):
    """What a fused attention kernel keeps and computes: q, k, v, bias, output and one fp32 number a row.

    Two matrix products forward, and five backward, as the scores are recomputed (Dao, arXiv 2307.08691, section 3.1).
    """

    @staticmethod
    def forward(ctx, query, key, value, bias, meter, keys=None, name="flex"):
        out = torch.empty_like(query[..., :1]).expand(*query.shape[:-1], value.shape[-1]).contiguous()
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, rows)
        ctx.meter, ctx.part, ctx.name = meter, meter.layer_type.replace("_", " "), name
        ctx.product = int(2 * query.shape[:-1].numel() * (keys or key.shape[-2]) * query.shape[-1])
        ctx.moved = sum(_size(x) for x in (query, key, value, out, rows)) + (0 if bias is None else _size(bias))
        again = in_backward()
        meter.count(2 * ctx.product, again, ctx.part, _kernel(name, query.shape[-1], "forward"))
        meter.move(ctx.part, ctx.moved)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        kernel = _kernel(ctx.name, query.shape[-1], "backward")
        ctx.meter.count(4 * ctx.product, False, ctx.part, kernel)
        ctx.meter.count(ctx.product, True, ctx.part, kernel)
        ctx.meter.move(ctx.part, 2 * ctx.moved, launches=3)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None, None, None


class _RMSNorm(torch.autograd.Function):
    """What CUDA's fused kernel keeps: its input and one fp32 number a row."""

    @staticmethod
    def forward(ctx, x, weight, meter):
        rows = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, rows)
        ctx.meter = meter
        meter.move(NORMS, 2 * _size(x))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        ctx.meter.move(NORMS, 3 * _size(x) + (0 if weight is None else 2 * _size(x)), launches=1 + (weight is not None))
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight), None


@contextlib.contextmanager
def stand_ins(meter: Meter, device_type: str = "cpu", flex_head_dim: int | None = None) -> Iterator[None]:
    """What the meta device can't run, or only in another form than the device: attention kernels, the experts' choice,
    and on a GPU norms by one kernel and the loss's products of half-precision inputs with a result in fp32.

    Args:
        flex_head_dim: the largest that FlexAttention runs with on the device; None: any.
    """

    def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        result = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32) if out is None else out
        meter.count(2 * a.shape[0] * a.shape[1] * b.shape[1], part=LOSS)
        meter.move(LOSS, _size(a) + _size(b) + _size(result))
        return result

    def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
        product(a, b, total)
        meter.move(LOSS, beta * _size(total), launches=0)

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # every kernel makes an additive mask of it
        # Only a kernel that knows of causality leaves out what isn't seen.
        keys = visible(key.shape[-2], None) if is_causal and query.shape[-2] == key.shape[-2] else None
        name = "flash" if attn_mask is None and query.shape[-1] <= 256 else "memory-efficient"
        return _Attention.apply(query, key, value, attn_mask, meter, keys, name)

    def flex(query, key, value, mask, scaling, window):
        keys = visible(key.shape[-2], window)  # of one document a row: more of them are less work
        return _Attention.apply(query, key, value, None, meter, keys)

    def rms_norm(input, normalized_shape, weight=None, eps=None):
        return _RMSNorm.apply(input, weight, meter)

    def experts(self: Gemma4TextExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The experts' work without their choice: each token passes through as many experts, of the same size."""
        rows = hidden.repeat_interleave(index.shape[-1], dim=0)
        others = (self.gate_up_proj.shape[0] - 1) * (_size(self.gate_up_proj[0]) + _size(self.down_proj[0]))
        meter.move(PRODUCTS, others, launches=0)  # all of them are read
        gate, up = nn.functional.linear(rows, self.gate_up_proj[0]).chunk(2, dim=-1)
        out = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[0]) * weights.reshape(-1, 1)
        if out.requires_grad:
            out.register_hook(lambda _: meter.move(PRODUCTS, others, launches=0))
        return out.view(*index.shape, -1).sum(1).to(hidden.dtype)

    def joint_loss(*args, _joint_loss=model_module.joint_loss, **kwargs):
        with meter.within(LOSS):
            return _joint_loss(*args, **kwargs)

    def compiled(function):
        """What torch.compile makes of the loss's terms: its logits are read in so many passes, its results written."""

        def run(*args):
            with meter.paused():
                results = function(*args)
            logits = [x for x in args if isinstance(x, Tensor) and x.dim() == 2 and x.dtype == torch.float32]
            ordered = function.__name__ == "_round" and any(isinstance(x, Centroids) for x in args)
            read = sum(map(_size, logits)) * PASSES
            written = [x for x in results if isinstance(x, Tensor)]
            meter.move(LOSS, read + ordered * _size(logits[-1]) + sum(map(_size, written)), launches=10)
            for tensor in written:
                meter.see(tensor)
            return results

        return run

    played: list[tuple[Any, str, Callable]] = [
        (attention_module, "flex", flex),
        (model_module, "joint_loss", joint_loss),
    ]
    played += [(nn.functional, "scaled_dot_product_attention", attention), (Gemma4TextExperts, "forward", experts)]
    played += [(loss.Pass, "walk_chunks", _chunks(meter))]
    if flex_head_dim is not None:
        takes = visibility.flex_takes
        played += [(visibility, "flex_takes", lambda size, *args: size <= flex_head_dim and takes(size, *args))]
    if device_type == "cuda":
        played += [(heads, "_matmul", product), (heads, "_add_matmul", add_product)]
        played += [(nn.functional, "rms_norm", rms_norm), (terms, "compiled", compiled)]
    kept = [getattr(owner, name) for owner, name, _ in played]
    for owner, name, stand_in in played:
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(played, kept, strict=True):
            setattr(owner, name, original)


def _chunks(meter: Meter):
    """The loss's chunks, of which all but the first, the second and the last are counted as the second was."""

    def walk(self: loss.Pass, terms) -> None:
        parts = self.parts()
        alike = [part for part in parts[1:] if part.stop - part.start == self.chunk]
        for part in parts:
            if part in alike[1:]:
                continue
            before, flops = _copy(meter.work[LOSS]), meter.flops
            self._chunk(part, terms)
            if alike and part == alike[0]:
                again, one = len(alike) - 1, Work()
                one.add(meter.work[LOSS])
                one.add(before, -1)
                meter.work[LOSS].add(one, again)
                meter.flops += again * (meter.flops - flops)

    return walk


def _copy(work: Work) -> Work:
    return Work(Counter(work.flops), work.bytes, work.launches)
