"""Bytes that live and FLOPs that are done while code runs on the meta device."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

from joint_train.pair import attention as attention_module
from joint_train.pair import heads
from joint_train.pair.blocks import visible
from joint_train.torch_private import TorchDispatchMode, in_backward


class Meter(TorchDispatchMode):
    """Counts bytes of living tensors and FLOPs of the operations under it; `hold` adds what isn't a tensor here."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.flops, self.recomputed, self.traffic, self.peak = 0, 0, 0, 0, 0
        self.moved: Counter[tuple[str, str]] = Counter()
        self.held: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.results: dict[tuple, tuple | None] = {}
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = self.run(func, args, kwargs)
        if count := flop_registry.get(func._overloadpacket):
            # A backward has gradients off, but for the forwards that checkpointing repeats.
            self.count(count(*args, **kwargs, out_val=out), again=in_backward() and torch.is_grad_enabled())
        outputs = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]
        if func._schema.is_mutable or not any(result.alias_info for result in func._schema.returns):  # no view
            self.traffic += sum(x.numel() * x.dtype.itemsize for x in (*args, *outputs) if isinstance(x, Tensor))
        for tensor in outputs:
            self.see(tensor)
        return out

    def count(self, flops: int, again: bool = False) -> None:
        self.flops += flops
        self.recomputed += flops * again

    def run(self, func, args, kwargs):
        """The operation's result. Layers repeat: one that was seen before gets an empty tensor like that of then."""
        if func._schema.is_mutable:
            return kwargs["out"] if "out" in kwargs else args[0] if func._schema.returns else func(*args, **kwargs)
        if any(result.alias_info is not None for result in func._schema.returns):
            return func(*args, **kwargs)  # a view
        key = (func, _describe(args), _describe(tuple(kwargs.items())))
        if key not in self.results:
            out = func(*args, **kwargs)
            fresh = isinstance(out, Tensor) and out.is_meta and not any(out is arg for arg in args)
            self.results[key] = (out.shape, out.stride(), out.dtype) if fresh else None
            return out
        if (result := self.results[key]) is None:
            return func(*args, **kwargs)
        shape, stride, dtype = result
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

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


def _describe(value):
    """A hashable description of an operation's arguments, tensors by their layout."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_describe, value)) if isinstance(value, (tuple, list)) else value


class _Attention(torch.autograd.Function):
    """What a fused attention kernel keeps and computes: q, k, v, bias, output and one fp32 number a row.

    Two matrix products forward, and five backward, as the scores are recomputed (Dao, arXiv 2307.08691, section 3.1).
    """

    @staticmethod
    def forward(ctx, query, key, value, bias, meter, keys=None):
        out = torch.empty_like(query[..., :1]).expand(*query.shape[:-1], value.shape[-1]).contiguous()
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, rows)
        ctx.meter = meter
        ctx.product = int(2 * query.shape[:-1].numel() * (keys or key.shape[-2]) * query.shape[-1])
        meter.count(2 * ctx.product, again=in_backward())
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        ctx.meter.count(4 * ctx.product)
        ctx.meter.count(ctx.product, again=True)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None, None


def _experts(self: Gemma4TextExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts' work without their choice: each token passes through as many experts, of the same size."""
    rows = hidden.repeat_interleave(index.shape[-1], dim=0)
    gate, up = nn.functional.linear(rows, self.gate_up_proj[0]).chunk(2, dim=-1)
    out = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[0]) * weights.reshape(-1, 1)
    return out.view(*index.shape, -1).sum(1).to(hidden.dtype)


@contextlib.contextmanager
def stand_ins(meter: Meter, device_type: str = "cpu") -> Iterator[None]:
    """What the meta device can't run, or only in another form than the device: attention kernels, the experts' choice,
    and on a GPU the loss's products of half-precision inputs with a result in fp32."""

    def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        meter.count(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32) if out is None else out

    def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
        product(a, b, total)

    def attention(query, key, value, attn_mask=None, **kwargs):
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # every kernel makes an additive mask of it
        return _Attention.apply(query, key, value, attn_mask, meter)

    def flex(query, key, value, mask, scaling, window):
        keys = visible(key.shape[-2], window)  # of one document a row: more of them are less work
        return _Attention.apply(query, key, value, None, meter, keys)

    played = [(attention_module, "flex", flex)]
    played += [(nn.functional, "scaled_dot_product_attention", attention), (Gemma4TextExperts, "forward", _experts)]
    if device_type == "cuda":
        played += [(heads, "_matmul", product), (heads, "_add_matmul", add_product)]
    kept = [getattr(owner, name) for owner, name, _ in played]
    for owner, name, stand_in in played:
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(played, kept, strict=True):
            setattr(owner, name, original)
