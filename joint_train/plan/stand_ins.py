"""Stand-ins for kernels and dense loops in a step on the meta device, which count what those would do."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

from joint_train.distributed import quantised
from joint_train.pair import attention as attention_module
from joint_train.pair import heads, loss, terms, visibility
from joint_train.pair import model as model_module
from joint_train.pair.blocks import visible
from joint_train.pair.centroids import Centroids
from joint_train.plan.meter import LOSS, PRODUCTS, Meter, Work, size_of
from joint_train.torch_private import in_backward

# Of the loss's compiled functions, as made for sm_90.
KERNELS = {"_base": 2, "_base_gradient": 1, "_round": 2}
ROUTING_KERNELS = 3  # that ordered embeddings add to a round
PASSES = 3  # over the logits, of the loss's compiled kernels (counted in those that are made for sm_90)


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
        ctx.moved = sum(size_of(x) for x in (query, key, value, out, rows)) + (0 if bias is None else size_of(bias))
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


@contextlib.contextmanager
def stand_ins(meter: Meter, device_type: str = "cpu", flex_head_dim: int | None = None) -> Iterator[None]:
    """What the meta device can't run, or only in another form than the device: attention kernels, the experts' choice,
    and on a GPU the loss's products of half-precision inputs with a result in fp32.

    Args:
        flex_head_dim: the largest that FlexAttention runs with on the device; None: any.
    """

    def product(a: Tensor, b: Tensor, out: Tensor | None = None, narrow: bool = False) -> Tensor:
        dtype = a.dtype if narrow else torch.float32
        result = a.new_empty(a.shape[0], b.shape[1], dtype=dtype) if out is None else out
        meter.count(2 * a.shape[0] * a.shape[1] * b.shape[1], part=LOSS)
        meter.move(LOSS, size_of(a) + size_of(b) + size_of(result))
        return result

    def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
        product(a, b, total)
        meter.move(LOSS, beta * size_of(total), launches=0)

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

    def experts(self: Gemma4TextExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The experts' work without their choice: each token passes through as many experts, of the same size."""
        rows = hidden.repeat_interleave(index.shape[-1], dim=0)
        others = (self.gate_up_proj.shape[0] - 1) * (size_of(self.gate_up_proj[0]) + size_of(self.down_proj[0]))
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
            if isinstance(results, Tensor) and function.__name__ == "_gather":
                meter.move(LOSS, 2 * size_of(results))
                meter.see(results)
                return results
            logits = [x for x in args if isinstance(x, Tensor) and x.dim() == 2 and x.dtype == torch.float32]
            ordered = function.__name__ == "_round" and any(isinstance(x, Centroids) for x in args)
            read = sum(map(size_of, logits)) * PASSES
            written = [x for x in (results if isinstance(results, tuple) else (results,)) if isinstance(x, Tensor)]
            traffic = read + (size_of(logits[1]) if ordered else 0) + sum(map(size_of, written))
            meter.move(LOSS, traffic, launches=KERNELS[function.__name__] + ROUTING_KERNELS * ordered)
            for tensor in written:
                meter.see(tensor)
            return results

        return run

    played: list[tuple[Any, str, Callable]] = [
        (attention_module, "flex", flex),
        (model_module, "joint_loss", joint_loss),
    ]
    played += [(nn.functional, "scaled_dot_product_attention", attention), (Gemma4TextExperts, "forward", experts)]
    # Of experts in codes: all of them are dequantised, and each token passes through as many as it has.
    played += [(quantised, "_grouped_mm", lambda rows, experts, ends: rows @ experts[0])]
    played += [(loss.Pass, "walk_chunks", _chunks(meter))]
    if flex_head_dim is not None:
        takes = visibility.flex_takes
        played += [(visibility, "flex_takes", lambda size, *args: size <= flex_head_dim and takes(size, *args))]
    if device_type == "cuda":
        played += [(heads, "_matmul", product), (heads, "_add_matmul", add_product)]
        played.append((terms, "compiled", compiled))
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
                for found in self.values:
                    found.append(found[-1])
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
