"""The small steps of a layer as one kernel each: RMS norms, the gated activation, the rotation of queries and keys.

transformers writes them out, each in many kernels and with fp32 copies that the backward keeps. Here each is an
operator with a backward of its own: the numbers are transformers' (computed in fp32 and rounded once), and what is kept
is what goes in. On a GPU the norm is torch's kernel; the other two are made by torch.compile where it works, like those
of the loss. Inside of layers that are compiled as a whole (``parallel.compile``) they stay as transformers has them:
inductor fuses them with what is around.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.library import Library

from joint_train.pair.attention import OF_THE_PAIR
from joint_train.torch_private import fused_rms_norm, fused_rms_norm_backward, has_triton

LIBRARY = Library("joint_train", "DEF")
ops = torch.ops.joint_train


def _operator(schema: str, shapes: Callable, plain: Callable, on_gpu: Callable) -> None:
    """Define an operator by what the meta device, a CPU and a GPU do."""
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    for key, kernel in (("Meta", shapes), ("CPU", plain), ("CUDA", on_gpu)):
        LIBRARY.impl(name, kernel, key)


def compiled_on_gpu(function: Callable) -> Callable:
    """The function by torch.compile, made at the first call; as it is where there is no Triton."""

    @functools.cache
    def compile_or_not() -> Callable:
        return torch.compile(function, dynamic=True, fullgraph=True) if has_triton() else function

    return lambda *args: compile_or_not()(*args)


# RMS norm


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The normed ``[..., H]`` and 1 / rms ``[..., 1]`` in fp32."""
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).pow_(-0.5)
    out = wide * scale
    return (out if weight is None else out.mul_(weight.float())).to(x.dtype), scale


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by x and by the weight (by one that isn't there: empty)."""
    grad_wide, normed = grad.float(), x.float() * scale
    by_weight = grad.new_empty(0)
    if weight is not None:
        by_weight = (grad_wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_wide = grad_wide * weight.float()
    inner = (grad_wide * normed).mean(-1, keepdim=True)
    return (grad_wide - normed * inner).mul_(scale).to(x.dtype), by_weight


def _norm_on_gpu(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    if weight is not None and weight.dtype != x.dtype:
        return _norm(x, weight, eps)
    return fused_rms_norm(x, weight, eps)


def _norm_backward_on_gpu(grad: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    if weight is not None and weight.dtype != x.dtype:
        return _norm_backward(grad, x, weight, scale)
    by_x, by_weight = fused_rms_norm_backward(grad, x, weight, scale)
    return by_x, grad.new_empty(0) if by_weight is None else by_weight


_operator(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    lambda x, weight, eps: (torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)),
    _norm,
    _norm_on_gpu,
)
_operator(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor scale) -> (Tensor, Tensor)",
    lambda grad, x, weight, scale: (
        torch.empty_like(x),
        x.new_empty(0) if weight is None else torch.empty_like(weight),
    ),
    _norm_backward,
    _norm_backward_on_gpu,
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        out, scale = ops.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        by_x, by_weight = ops.rms_norm_backward(grad, *ctx.saved_tensors)
        return by_x, by_weight if ctx.needs_input_grad[1] else None, None


def rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """The forward of ``Gemma4RMSNorm``, as one kernel."""
    if torch.compiler.is_compiling():
        return type(self).written_out(self, hidden_states)  # type: ignore[attr-defined]  # which a fused class has
    return _RMSNorm.apply(hidden_states, self.weight if self.with_scale else None, self.eps)


# Gated activation


def _gelu(gate: Tensor) -> Tensor:
    return nn.functional.gelu(gate, approximate="tanh")


def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    return _gelu(gate) * up


def _geglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    by_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
    return by_gate, grad * _gelu(gate)


_operator("geglu(Tensor gate, Tensor up) -> Tensor", lambda gate, up: torch.empty_like(gate), _geglu,
          compiled_on_gpu(_geglu))  # fmt: skip
_operator(
    "geglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    lambda grad, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
    _geglu_backward,
    compiled_on_gpu(_geglu_backward),
)


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return ops.geglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ops.geglu_backward(grad, *ctx.saved_tensors)


def mlp(self: nn.Module, x: Tensor) -> Tensor:
    """The forward of ``Gemma4TextMLP``."""
    if torch.compiler.is_compiling():
        return type(self).written_out(self, x)  # type: ignore[attr-defined]  # which a fused class has
    layers: Any = self
    return layers.down_proj(_GeGLU.apply(layers.gate_proj(x), layers.up_proj(x)))


# Rotation


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + _turned(x) * sin


def _rotate_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return grad * cos - _turned(grad * sin)


_operator("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor", lambda x, cos, sin: torch.empty_like(x), _rotate,
          compiled_on_gpu(_rotate))  # fmt: skip
_operator(
    "rotate_backward(Tensor grad, Tensor cos, Tensor sin) -> Tensor",
    lambda grad, cos, sin: torch.empty_like(grad),
    _rotate_backward,
    compiled_on_gpu(_rotate_backward),
)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return ops.rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ops.rotate_backward(grad, *ctx.saved_tensors), None, None


def apply_rotary_pos_emb(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
    """transformers' function of this name; ``cos`` and ``sin`` have no gradient, and are of ``x``'s dtype."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if torch.compiler.is_compiling() or cos.dtype != x.dtype:
        return _rotate(x, cos, sin)
    return _Rotate.apply(x, cos, sin)


# In a model

_as_transformers = False


@contextmanager
def written_out() -> Iterator[None]:
    """Inside of it :func:`fuse` does nothing: what another system runs."""
    global _as_transformers
    before, _as_transformers = _as_transformers, True
    try:
        yield
    finally:
        _as_transformers = before


def _attention(forward: Any) -> Callable:
    """The forward of an attention class with this module's :func:`apply_rotary_pos_emb` and the pair's own attention
    functions (:data:`joint_train.pair.attention.OF_THE_PAIR`).

    It is the same code, with names of its own: what else uses transformers' module keeps what transformers has.
    """
    own = {"apply_rotary_pos_emb": apply_rotary_pos_emb, "ALL_ATTENTION_FUNCTIONS": OF_THE_PAIR}
    # torch.compile looks for the names of a function in the module that they say they are of: these are of none.
    names = {name: value for name, value in forward.__globals__.items() if name != "__name__"} | own
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__, made.__module__ = forward.__kwdefaults__, forward.__module__
    return made


ATTENTION = "TextAttention"
FORWARDS: dict[str, Callable[[Any], Callable]] = {
    "RMSNorm": lambda forward: rms_norm,
    "TextMLP": lambda forward: mlp,
    ATTENTION: _attention,
}
"""By the ending of a class's name: its fused forward, made of its own."""


@functools.cache
def _fused_class(cls: Any) -> type | None:
    """A class of transformers' Gemma 4 with a forward of this module; None for another class."""
    if not cls.__module__.startswith("transformers.models.gemma4"):
        return None
    make = next((make for ending, make in FORWARDS.items() if cls.__name__.endswith(ending)), None)
    # One that somebody has replaced already stays as it is.
    if make is None or cls.forward.__module__ != cls.__module__:
        return None
    own = {"forward": make(cls.forward), "written_out": cls.forward, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), own)


def fuse(model: nn.Module, endings: tuple[str, ...] = tuple(FORWARDS)) -> None:
    """Give norms, gated activations and rotations of a Gemma 4 text model or drafter their kernels, in place.

    Other models in the process, and transformers' modules, stay as they are.

    Args:
        endings: of :data:`FORWARDS`, which classes.
    """
    if _as_transformers:
        return
    for module in model.modules():
        activation = getattr(getattr(module, "config", None), "hidden_activation", "gelu_pytorch_tanh")
        kind: Any = type(module)
        if not kind.__name__.endswith(endings):
            continue
        if (fused := _fused_class(kind)) is not None and activation == "gelu_pytorch_tanh":
            module.__class__ = fused
