"""Kernels for a CUDA card that isn't there: inductor lowers for it, and Triton compiles, which takes no GPU.

    made = lowered(H100, function, *inputs)     # of what function does to fake tensors, and of its backward
    shared_memory(H100, made[0])                # bytes a block, as Triton's compiler says

The graphs are traced on CPU, by the same torch.compile, and given to inductor as graphs of the card.
"""

import ctypes
import functools
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch._dynamo import device_interface
from torch._inductor import compile_fx, scheduler
from torch._inductor import config as inductor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.attention import flex_attention
from torch.utils._pytree import tree_leaves, tree_map

triton = pytest.importorskip("triton")

GPU = torch.device("cuda", 0)
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using namespace c10;
using namespace c10::impl;
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>);
}
"""


class Card(NamedTuple):
    """What the compilers ask a card for. ``shared`` is the most shared memory of a block, in bytes."""

    capability: tuple[int, int]
    shared: int

    @property
    def number(self) -> int:
        return 10 * self.capability[0] + self.capability[1]

    @property
    def properties(self) -> SimpleNamespace:
        return SimpleNamespace(
            major=self.capability[0],
            minor=self.capability[1],
            shared_memory_per_block_optin=self.shared,
            multi_processor_count=132,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048,
            max_threads_per_block=1024,
            warp_size=32,
        )


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
A100, H100, B200 = Card((8, 0), 163 << 10), Card((9, 0), 227 << 10), Card((10, 0), 227 << 10)
SMALL = Card((8, 9), 99 << 10)  # L4, L40S, RTX 4090


class Kernel(NamedTuple):
    name: str
    source: str


@functools.cache
def _allow_fake_cuda_tensors() -> None:
    """A torch for CPU has no idea of a current CUDA device, which some operations on fake tensors set."""
    try:
        with torch._subclasses.FakeTensorMode():
            torch.empty(1, device=GPU)[None]
    except RuntimeError:
        folder = Path(torch.__file__).parent
        library = Path(inductor_cache()) / "no_cuda_device.so"
        if not library.exists():
            include = [f"-I{folder / 'include'}", f"-L{folder / 'lib'}", "-lc10"]
            command = ["g++", "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-", *include, "-o", str(library)]
            subprocess.run(command, input=GUARD, text=True, check=True, timeout=120)
        ctypes.CDLL(str(library))


def inductor_cache() -> str:
    from torch._inductor.runtime.runtime_utils import cache_dir

    Path(cache_dir()).mkdir(parents=True, exist_ok=True)
    return cache_dir()


@contextmanager
def _in_place_of_cuda(card: Card, kernels: list[Kernel]):
    """Let inductor find the card, and keep what it wants compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Interface(device_interface.CudaInterface):
        get_device_properties = staticmethod(lambda device=None: card.properties)
        get_compute_capability = staticmethod(lambda device=None: card.number)
        is_available = staticmethod(lambda: True)
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)
        is_triton_capable = staticmethod(lambda device=None: True)
        current_device = staticmethod(lambda: 0)

        class Worker(device_interface.CudaInterface.Worker):
            get_device_properties = staticmethod(lambda device=None: card.properties)
            current_device = staticmethod(lambda: 0)

    def keep(compiler: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> None:
        if Kernel(name, source) not in kernels:
            kernels.append(Kernel(name, source))

    target = GPUTarget("cuda", card.number, 32)
    found = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0, is_active=lambda: True)
    interfaces = {"cuda": Interface, "cuda:0": Interface}
    device_interface.get_interface_for_device("cuda")  # fills the table first
    with ExitStack() as stack:
        change = stack.enter_context
        change(mock.patch.dict(device_interface.device_interfaces, interfaces))
        change(mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: card.capability))
        change(mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: card.properties))
        change(mock.patch.object(torch.cuda, "current_device", lambda: 0))
        change(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True))
        change(mock.patch.object(scheduler, "has_triton", lambda: True))
        change(mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        change(mock.patch.object(driver, "_active", found))
        change(mock.patch.object(AsyncCompile, "triton", keep))
        change(inductor.patch(fx_graph_cache=False, fx_graph_remote_cache=False))
        DeviceProperties.create.cache_clear()
        stack.callback(DeviceProperties.create.cache_clear)
        yield


def _move(module: torch.fx.GraphModule, inputs: list, device: torch.device) -> None:
    """Make a graph and its inputs those of a device, in place."""

    def moved(x):
        if isinstance(x, FakeTensor):
            x.fake_device = device
        return x

    tree_map(moved, inputs)
    for graph in module.modules():
        if isinstance(graph, torch.fx.GraphModule):
            for node in graph.graph.nodes:
                tree_map(moved, node.meta.get("val"))
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": device}
            graph.recompile()


def backend(card: Card, kernels: list[Kernel]) -> Callable:
    """A backend of ``torch.compile`` that adds to ``kernels`` what inductor makes for the card; the graph runs as it
    is, on fake tensors of the CPU."""
    _allow_fake_cuda_tensors()

    def inner(module: torch.fx.GraphModule, inputs: list, **options):
        _move(module, inputs, GPU)
        with _in_place_of_cuda(card, kernels):
            compile_fx.compile_fx_inner(module, inputs, **options)
        _move(module, inputs, torch.device("cpu"))
        return compile_fx.make_boxed_func(module.forward)

    return functools.partial(compile_fx.compile_fx, inner_compile=inner)


def lowered(card: Card, function: Callable, make_inputs: Callable[[], tuple], **options) -> list[Kernel]:
    """The kernels that ``torch.compile`` makes of a function for the card, with its backward where it has one.

    Args:
        make_inputs: makes the arguments, on the CPU; called under a ``FakeTensorMode``.
        options: of ``torch.compile``.
    """
    torch.compiler.reset()
    kernels: list[Kernel] = []
    with FakeTensorMode(), mock.patch.object(flex_attention, "_validate_device", lambda *tensors: None):
        compiled = torch.compile(function, backend=backend(card, kernels), fullgraph=True, **options)
        out = compiled(*make_inputs())
        loss = sum(x.sum() for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.requires_grad)
        if isinstance(loss, torch.Tensor):
            loss.backward()
    torch.compiler.reset()
    return kernels


def shared_memory(card: Card, kernel: Kernel) -> int:
    """Bytes of shared memory that a block of the compiled kernel takes: the most of its configurations."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", card.number, 32)
    with _in_place_of_cuda(card, []):
        made = getattr(PyCodeCache.load(kernel.source), kernel.name)
        most = 0
        for config in made.configs:
            meta = made._create_compile_meta(config)
            source = ASTSource(made.fn, meta["signature"], meta["constants"], meta["configs"][0])
            binary = triton.compile(source, target=target, options=made._create_compile_options(config, meta))
            most = max(most, binary.metadata.shared)
    return most
