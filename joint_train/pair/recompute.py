"""Activation checkpointing: what a backward recomputes, what is kept instead, and where.

- :func:`checkpointed` runs a function whose intermediate tensors are made again in the backward.
- With ``keep_attention`` what attention needs for its backward is kept, and its output: the replay takes that and
  doesn't compute attention again, which is most of a layer's time in long rows. torch's selective checkpointing would
  keep the output alone, but it sees operations one by one, by a Python mode, and FlexAttention is one compiled region.
- :class:`HostCopies` holds the inputs of what is checkpointed in the host's memory until the backward needs them.
"""

import functools
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

SMALL = 2**20  # bytes; smaller tensors stay where they are


def checkpointed(
    function: Callable,
    *args: Any,
    keep_attention: bool = False,
    host: "HostCopies | None" = None,
    preserve_rng_state: bool = True,
) -> Any:
    """``function(*args)``, of which a backward keeps only the tensors in ``args`` and makes the rest again.

    Args:
        keep_attention: also keep the inputs and outputs of attention, which the replay then leaves out.
        host: keep the tensors in ``args`` there.
        preserve_rng_state: let the replay draw the same random numbers.
    """
    contexts = _keeping_attention if keep_attention else _replaying
    with nullcontext() if host is None else host.hooks():
        return checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, context_fn=contexts
        )


class TrainableKernels(AbstractContextManager):
    """Within it SDPA has the kernels that were allowed before, but not cuDNN's, and again those before after it.

    cuDNN's backward gives NaN on Hopper from micro-batches of 2 on (NeMo AutoModel, issues 2208 and 3232). A backward
    runs on its forward's kernel.
    """

    def __enter__(self) -> None:
        flags = torch.backends.cuda
        allowed = {
            SDPBackend.FLASH_ATTENTION: flags.flash_sdp_enabled(),
            SDPBackend.EFFICIENT_ATTENTION: flags.mem_efficient_sdp_enabled(),
            SDPBackend.MATH: flags.math_sdp_enabled(),
        }
        self.kernels = sdpa_kernel([backend for backend, on in allowed.items() if on] or [SDPBackend.MATH])
        self.kernels.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.kernels.__exit__(*error)


def _replaying():
    """A replay is in the backward, so after the forward's choice of kernels."""
    return nullcontext(), TrainableKernels()


REPLAYED = {"use_reentrant": False, "context_fn": _replaying}  # for transformers' gradient_checkpointing_enable


# Attention that is kept


class _Kept:
    """The outputs of attention in one run of a checkpointed function, in order."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.next: int | None = None  # in a replay

    def call(self, function: Callable, args: tuple, kwargs: dict) -> Tensor:
        if self.next is not None:
            self.next += 1
            kept = self.outputs[self.next - 1]
            # A leaf: what attention was computed of has its gradient by the graph of the forward.
            return kept.detach().requires_grad_(kept.requires_grad)
        with saved_tensors_hooks(_same, _same):  # and not those of the checkpoint
            out = function(*args, **kwargs)
        self.outputs.append(out.detach().requires_grad_(out.requires_grad))
        return out


_running = threading.local()  # a backward has a thread of its own for each device


def _same(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _during(kept: _Kept, start: int | None) -> Iterator[None]:
    before, _running.kept = getattr(_running, "kept", None), kept
    kept.next = start
    try:
        yield
    finally:
        _running.kept = before


def _keeping_attention():
    kept = _Kept()
    return _during(kept, None), _Again(kept)


class _Again:
    """The context of a replay, which a graph that is retained runs more than once."""

    def __init__(self, kept: _Kept):
        self.kept = kept

    def __enter__(self) -> None:
        self.context = ExitStack()
        for context in (TrainableKernels(), _during(self.kept, 0)):
            self.context.enter_context(context)

    def __exit__(self, *error) -> None:
        self.context.close()


def run_or_replay(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """``function(*args, **kwargs)``, a kernel of attention, or in a replay what it returned in the forward."""
    current = getattr(_running, "kept", None)
    return function(*args, **kwargs) if current is None else current.call(function, args, kwargs)


def keep_output(attention: Callable) -> Callable:
    """An attention function of transformers whose output is :func:`run_or_replay`."""

    @functools.wraps(attention)
    def wrapped(*args, **kwargs) -> tuple[Tensor, None]:
        return run_or_replay(lambda: attention(*args, **kwargs)[0]), None

    return wrapped


# Inputs that are kept on the host


class HostCopies:
    """Tensors that autograd saves, in the host's memory (pinned, from a GPU) from the forward to the backward.

    On a GPU the copies have a stream of their own. One tensor at a time is on its way out: the next waits for it. When
    the backward, whose order is the reverse, takes those of one function, those of the one before are fetched.
    """

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None
        self.buffers: dict[tuple, list[Tensor]] = defaultdict(list)  # that are free
        self.leaving: tuple[Tensor, Any] | None = None
        self.group: _Group | None = None

    def hooks(self) -> saved_tensors_hooks:
        self.group = _Group(self.group)
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> "Tensor | _OnHost":
        if tensor.nbytes < SMALL or not tensor.is_floating_point() or isinstance(tensor, torch.nn.Parameter):
            return tensor
        return _OnHost(self, tensor)

    def unpack(self, saved: "Tensor | _OnHost") -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self.group = None  # the next forward starts anew
        return saved.take()

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy, which is on its way."""
        free = self.buffers[tensor.shape, tensor.dtype]
        buffer = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if not tensor.is_cuda:
            return buffer.copy_(tensor)
        if self.stream is None:
            self.stream = torch.cuda.Stream(tensor.device)
        computing = torch.cuda.current_stream(tensor.device)
        self.stream.wait_stream(computing)
        with torch.cuda.stream(self.stream):
            buffer.copy_(tensor, non_blocking=True)
        if self.leaving is not None:  # its memory may be used again only when it has left
            computing.wait_event(self.leaving[1])
        self.leaving = tensor, self.stream.record_event()
        return buffer

    def to_device(self, buffer: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """A copy on the device, which is on its way, and what tells that it is there."""
        self.leaving = None
        copy = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        if self.stream is None:
            return copy.copy_(buffer), None
        self.stream.wait_stream(torch.cuda.current_stream(device))  # which had the copy's memory before
        with torch.cuda.stream(self.stream):
            copy.copy_(buffer, non_blocking=True)
        return copy, self.stream.record_event()

    def release(self, buffer: Tensor) -> None:
        """A buffer that isn't needed any more. All copies are on one stream, so the next waits for its last."""
        self.buffers[buffer.shape, buffer.dtype].append(buffer)


class _Group:
    """The tensors on the host of one function, and the function before it."""

    def __init__(self, before: "_Group | None"):
        self.before = before
        self.tensors: weakref.WeakSet[_OnHost] = weakref.WeakSet()


class _OnHost:
    """A saved tensor."""

    def __init__(self, owner: HostCopies, tensor: Tensor):
        assert owner.group is not None, "hooks() makes one before it packs"
        self.owner, self.device, self.group = owner, tensor.device, owner.group
        self.buffer = owner.to_host(tensor.detach())
        self.fetched: tuple[Tensor, Any] | None = None
        self.taken = False
        self.group.tensors.add(self)

    def fetch(self) -> tuple[Tensor, Any]:
        if self.fetched is None:
            self.fetched = self.owner.to_device(self.buffer, self.device)
        return self.fetched

    def take(self) -> Tensor:
        tensor, there = self.fetch()
        self.fetched, self.taken = None, True
        if self.group.before is not None:
            for other in self.group.before.tensors:
                if not other.taken:
                    other.fetch()
        if there is not None:
            torch.cuda.current_stream(self.device).wait_event(there)
        return tensor

    def __del__(self) -> None:
        if hasattr(self, "buffer"):
            self.owner.release(self.buffer)
