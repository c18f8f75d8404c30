"""Counts what code would hold, compute and move on a GPU while it runs on the meta device.

Every operation's work belongs to a part of a step (:data:`PARTS`): its FLOPs by the kernel that does them, the bytes
that it reads and writes, and its launches. What is computed in a backward belongs to the part whose forward made it,
which autograd's sequence numbers tell.
"""

import contextlib
import math
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, Gemma4TextAttention

from joint_train.torch_private import TorchDispatchMode, in_backward, number_in_backward, sequence_number

PRODUCTS, LOSS, NORMS, OTHERS, COPIES = "products", "loss", "norms", "element-wise", "FSDP2's copies"
PARTS = (PRODUCTS, "sliding attention", "full attention", LOSS, NORMS, OTHERS, COPIES)
PRODUCT = "product"  # the kernel of a matrix product; attention's are named by ``stand_ins``


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
    """An operation with arguments of these layouts: its cost, and the layouts of its results, where that is all."""

    flops: int
    bytes: int
    launches: int
    results: list[tuple] | None
    several: bool = False


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
            self.charge(_name(func), seen)
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
        if seen is not None and seen.results is not None:
            made = [
                torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in seen.results
            ]
            return seen, tuple(made) if seen.several else made[0]
        if kind == "in place":
            out = kwargs["out"] if "out" in kwargs else args[0] if func._schema.returns else func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if seen is None:
            several = isinstance(out, tuple)
            outs = out if several else (out,)
            given = {id(x) for x in (*args, *kwargs.values())}
            fresh = all(isinstance(x, Tensor) and x.is_meta and id(x) not in given for x in outs)
            results = [(x.shape, x.stride(), x.dtype) for x in outs] if kind != "in place" and fresh else None
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            seen = self._seen[key] = _Seen(flops, *_moved(func, args, kwargs, out), results, several)
        return seen, out

    def charge(self, name: str, seen: _Seen) -> None:
        again, part = in_backward() and torch.is_grad_enabled(), _FUSED.get(name) or self.part()
        if part is None:
            part = PRODUCTS if name in _PRODUCTS else OTHERS
        work = self.work[part]
        work.bytes += seen.bytes
        work.launches += seen.launches
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
        """Count bytes that are read and written outside of operations."""
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
# The operators of `joint_train.pair.fused`, by their part. Gradients are off in their forwards, which so look like a
# backward where checkpointing repeats them: only their names tell.
_FUSED = {
    "rms_norm": NORMS, "rms_norm_backward": NORMS,
    "geglu": OTHERS, "geglu_backward": OTHERS, "rotate": OTHERS, "rotate_backward": OTHERS,
}  # fmt: skip
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


def _moved(func, args, kwargs, out) -> tuple[int, int]:
    """Bytes that an operation reads and writes (inputs and outputs once each, of rows only those), and its kernels."""
    outputs = [out] if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else []
    inputs = [*args, *kwargs.values()]
    inputs += [x for many in args if isinstance(many, (tuple, list)) for x in many]
    tensors = [x for x in (*inputs, *outputs) if isinstance(x, Tensor)]
    if _name(func) == "rms_norm_backward" and args[2] is not None:
        grad, x = args[:2]  # the weight's gradient has a kernel of its own, which reads them again
        return sum(map(size_of, (*tensors, grad, x))), 2
    if _name(func) not in _OF_ROWS:
        return sum(map(size_of, tensors)), 1
    rows = [x for x in tensors if x is not args[0]]
    source = [x for x in rows if x.dtype == args[0].dtype]
    return sum(map(size_of, rows)) + sum(map(size_of, source)), 1


def size_of(tensor: Tensor) -> int:
    """Bytes, without repetitions of an expanded tensor."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in pairs if stride or size == 0) * tensor.dtype.itemsize


def _describe(value):
    """A hashable description of an operation's arguments, tensors by their layout."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_describe, value)) if isinstance(value, (tuple, list)) else value
