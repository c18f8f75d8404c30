"""The private parts of torch that joint-train needs, each with what breaks without it. No other module names one.

They were tried on the releases in :data:`TRIED`. Each is looked up when it is first used, so that a release of torch
that moves one stops only what needs it, in a sentence that names it.
"""

import functools
import importlib
import inspect
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # public in practice: torch's own docs

TRIED = ("2.11", "2.13")

PRIVATE = {
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset": (
        "nothing knows which part of a weight a rank holds: loading, adapters, row-sharded tables and optimizers stop"
    ),
    "torch.distributed.distributed_c10d._set_pg_timeout": "parallel.timeout_seconds doesn't reach the mesh's groups",
    "torch.distributed.fsdp.FSDPModule._get_fsdp_state": (
        "base and drafter can't share their streams (its _lazy_init has to come before share_comm_ctx)"
    ),
    "torch.distributed.checkpoint.filesystem._StorageInfo": "no checkpoint can be read",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING": "no checkpoint can be read",
    "torch.serialization._get_layout": "no checkpoint can be read",
    "torch.distributed.checkpoint.FileSystemReader._slice_file": (
        "a checkpoint isn't verified while it is read, but read twice (checkpoint/reader.py overrides it)"
    ),
    "torch.optim._muon._zeropower_via_newtonschulz": "optim.name=muon stops",
    "torch._foreach_norm": "gradient norms stop: the public get_total_norm adds them up in the gradients' dtype",
    "torch.ops.aten._fused_rms_norm": "the norms of a GPU have no kernel",
    "torch.ops.aten._fused_rms_norm_backward": "the norms of a GPU have no kernel for their backward",
    "torch._dynamo.maybe_mark_dynamic": "loss.compile=true makes kernels anew for each number of rows",
    "torch._dynamo.config.recompile_limit": (
        "parallel.compile=true and FlexAttention stop at too few graphs (before torch 2.13)"
    ),
    "torch.utils._triton.has_triton": "model.attn_implementation=auto can't choose FlexAttention",
    "torch._C._current_graph_task_id": "joint_train.plan can't tell what activation checkpointing repeats",
    "torch._C._current_autograd_node": "joint_train.plan can't tell which part of a step a backward belongs to",
    "torch._C._autograd._get_sequence_nr": "joint_train.plan can't tell which part of a step a backward belongs to",
    "torch.cuda.memory._record_memory_history": "profile.steps takes no memory snapshot",
    "torch.cuda.memory._dump_snapshot": "profile.steps takes no memory snapshot",
}
"""What is used, by its full name, and what breaks without it."""


@functools.cache
def find(path: str) -> Any:
    """What has a name of :data:`PRIVATE`.

    Raises:
        ImportError: if this torch doesn't have it, with what that breaks and which releases have it.
    """
    breaks, parts = PRIVATE[path], path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        try:
            return functools.reduce(getattr, parts[split:], found)
        except AttributeError:
            break
    raise ImportError(
        f"torch {torch.__version__} has no {path}: {breaks}. Releases {' to '.join(TRIED)} have it: install one."
    )


def local_shape_and_offset(shape: Sequence[int], mesh: Any, placements: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of this rank's shard of a tensor, and where in the whole it starts."""
    return find("torch.distributed.tensor._utils.compute_local_shape_and_global_offset")(shape, mesh, placements)


def set_group_timeout(group: Any, timeout: timedelta) -> None:
    """The time-out of a process group that is there already."""
    find("torch.distributed.distributed_c10d._set_pg_timeout")(timeout, group)


def initialise_fsdp(root: FSDPModule) -> None:
    """What FSDP2 otherwise does in a root's first forward."""
    find("torch.distributed.fsdp.FSDPModule._get_fsdp_state")(root)._lazy_init()


def pickled_in_checkpoints() -> dict[tuple[str, str], Any]:
    """The private names in a distributed checkpoint's ``.metadata``: the object for each (module, name)."""
    paths = (
        "torch.serialization._get_layout",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    )
    return {(path.rpartition(".")[0], path.rpartition(".")[2]): find(path) for path in paths}


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """``[rows, columns]`` with all singular values brought near 1, in bfloat16."""
    return find("torch.optim._muon._zeropower_via_newtonschulz")(matrix, coefficients, steps, eps)


def norms(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The L2 norm of each tensor, summed in ``dtype``, in few kernels; scalars."""
    tensors = list(tensors)
    return list(find("torch._foreach_norm")(tensors, 2, dtype=dtype)) if tensors else []


def fused_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The norm over the last dimension of ``x``, and 1 / its root mean square, ``[..., 1]``, in one kernel."""
    find("torch.ops.aten._fused_rms_norm")
    return torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)


def fused_rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Its gradients by ``x`` and, if there is one, by the weight; ``scale`` is the forward's second result."""
    find("torch.ops.aten._fused_rms_norm_backward")
    mask = [True, weight is not None]
    return torch.ops.aten._fused_rms_norm_backward(grad, x, [x.shape[-1]], scale, weight, mask)


def mark_rows_dynamic(tensor: Tensor) -> None:
    """Let one kernel of ``torch.compile`` be for any number of rows of a tensor."""
    find("torch._dynamo.maybe_mark_dynamic")(tensor, 0)


def graph_limit(count: int, isolated: bool = False) -> dict[str, Any]:
    """Arguments of ``torch.compile`` that let it make this many graphs of a function.

    A torch whose ``torch.compile`` has no such argument (2.11) gets the limit for the whole process instead.

    Args:
        isolated: neither count graphs that others have compiled of the same function, nor let ours count with theirs.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": count, "isolate_recompiles": isolated}
    find("torch._dynamo.config.recompile_limit")
    config: Any = importlib.import_module("torch._dynamo.config")
    config.recompile_limit = max(config.recompile_limit, count)
    return {}


def has_triton() -> bool:
    """Whether Triton is there and compiles for this device."""
    return find("torch.utils._triton.has_triton")()


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread."""
    return find("torch._C._current_graph_task_id")() != -1


def sequence_number() -> int:
    """The sequence number of this thread's next autograd operation."""
    return find("torch._C._autograd._get_sequence_nr")()


def number_in_backward() -> int | None:
    """The number of the operation whose backward runs in this thread."""
    node = find("torch._C._current_autograd_node")()
    return None if node is None else node._sequence_nr()


def record_memory(max_entries: int | None) -> None:
    """Start recording up to this many GPU allocations; None stops it."""
    record = find("torch.cuda.memory._record_memory_history")
    record(max_entries=max_entries) if max_entries else record(enabled=None)


def dump_memory(file: str) -> None:
    """Write the recorded allocations, for pytorch.org/memory_viz."""
    find("torch.cuda.memory._dump_snapshot")(file)
