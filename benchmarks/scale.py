"""What FSDP2 does at released sizes on many ranks: memory of a rank, and every byte that is gathered and reduced.

    python -m benchmarks.scale --models gemma4_31b gemma4_e4b --ranks 8 64 512 [--results FILE] [overrides]

The project's own pair, loss, backward and optimizer step run through torch's own FSDP2 code, in this process, on fake
tensors (they have a size and no contents) and a fake process group (rank 0 of as many ranks as wanted). What is played:
attention keeps what a fused kernel keeps, the loss's matrix products allocate what cuBLAS does, and collectives are
written down instead of done. Two steps run, the second is reported. The plan of the same run stands beside it, and the
least that could be moved: each weight gathered once forward and once backward, each gradient reduced once.
"""

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks import results
from joint_train import config
from joint_train.config import DIMENSIONS, Config, mesh_shape, with_overrides
from joint_train.distributed import parallelize
from joint_train.distributed.rows import even_lookup
from joint_train.pair import attention as attention_module
from joint_train.pair import heads
from joint_train.pair.recompute import HostCopies
from joint_train.pair.targets import joint_targets
from joint_train.plan import stand_ins
from joint_train.plan.planner import GIB, Machine, make_plan, read
from joint_train.torch_private import local_shape_and_offset
from joint_train.train import compact
from joint_train.train.optim import build_optimizer, update
from joint_train.weights.composite import meta_pair

UNCOUNTED = mock.Mock(layer_type="full_attention")  # a meter
AS_ON_A_GPU = ["precision.compute=bfloat16", "loss.memory_budget_mb=1024", "data.train=[{path: unused}]"]


class Memory(TorchDispatchMode):
    """Bytes of the storages that live; a storage that FSDP2 resizes to 0 and back comes and goes with its size."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, weakref.ref] = {}
        self._elsewhere = False

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is made inside is in another memory."""
        self._elsewhere = True
        try:
            yield
        finally:
            self._elsewhere = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, FakeTensor) and not self._elsewhere:
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._gone(key))
            self._sizes[key] = 0
            self.resized(storage)

    def resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            self.live += storage.nbytes() - self._sizes[key]
            self._sizes[key] = storage.nbytes()
            self.peak = max(self.peak, self.live)

    def leave_out(self, tensor: Tensor) -> None:
        """Don't count a tensor any more: it is in another memory."""
        self._gone((tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()._cdata)

    def _gone(self, key: int) -> None:
        if self._alive.pop(key, None) is not None:
            self.live -= self._sizes.pop(key)


class Traffic:
    """Collectives by kind and FSDP2 unit: how many, and bytes of the whole buffer."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.unit = ["none"]

    def log(self, kind: str, tensor: Tensor) -> None:
        self.calls[kind, self.unit[-1]] += 1
        self.bytes[kind, self.unit[-1]] += tensor.numel() * tensor.dtype.itemsize

    def total(self, kind: str) -> int:
        return sum(size for (what, _), size in self.bytes.items() if what == kind)

    def inside(self, method):
        """A method of a parameter group, with its unit's name."""

        def named(group, *args):
            name = group._module_fqn or type(group.modules[0]).__name__
            self.unit.append("layers" if ".layers." in name else name.rpartition(".")[2])
            try:
                return method(group, *args)
            finally:
                self.unit.pop()

        return named


def plain_matmul(a: Tensor, b: Tensor, out: Tensor | None = None, narrow: bool = False) -> Tensor:
    """cuBLAS's product of half-precision inputs in fp32, or in their dtype: nothing but the result."""
    return a.new_empty(a.shape[0], b.shape[1], dtype=a.dtype if narrow else torch.float32) if out is None else out


@contextlib.contextmanager
def played(memory: Memory, traffic: Traffic) -> Iterator[None]:
    """What stands in for the GPU and the network."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage, size):
        resize(storage, size)
        memory.resized(storage)
        return storage

    def attention(query, key, value, attn_mask=None, **_):
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        return stand_ins._Attention.apply(query, key, value, attn_mask, UNCOUNTED)

    def flex(query, key, value, mask, scaling, window):
        return attention(query, key, value)

    def shard_of(*args):
        with _disable_current_modes():  # the mesh's own tensors have contents
            return local_shape_and_offset(*args)

    def to_host(copies, tensor):
        with memory.elsewhere():
            return torch.empty_like(tensor)

    def gather(output, input, group=None, async_op=False):
        traffic.log("all-gather", output)

    def scatter(output, input, op=None, group=None, async_op=False):
        traffic.log("reduce-scatter", input)

    def reduce(tensor, op=None, group=None, async_op=False):
        traffic.log("all-reduce", tensor)

    def exchange(output, input, received=None, sent=None, group=None, async_op=False):
        traffic.log("all-to-all", input)

    patches = [
        mock.patch.object(dist, "all_to_all_single", exchange),
        mock.patch.object(torch.UntypedStorage, "resize_", resize_),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", attention),
        mock.patch.object(attention_module, "flex", flex),
        mock.patch.object(HostCopies, "to_host", to_host),
        mock.patch.object(compact, "local_shape_and_offset", shard_of),
        mock.patch.object(heads, "_matmul", plain_matmul),
        mock.patch.object(heads, "_add_matmul", lambda total, a, b, beta: None),
        mock.patch.object(dist, "all_gather_single", gather),
        mock.patch.object(dist, "reduce_scatter_single", scatter),
        mock.patch.object(dist, "all_reduce", reduce),
        *(
            mock.patch.object(FSDPParamGroup, name, traffic.inside(getattr(FSDPParamGroup, name)))
            for name in ("unshard", "wait_for_unshard", "post_backward")
        ),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def measure(cfg: Config, ranks: int) -> dict[str, float]:
    """One step of a run on rank 0 of so many ranks. Once in a process: it makes the process group."""
    plan = make_plan(cfg, Machine(gpus=ranks))
    cfg = with_overrides(cfg, plan.chosen)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    shape = mesh_shape(cfg.parallel, ranks, 8)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS)
    model = meta_pair(cfg, *read(cfg)[:2], parallelize.DTYPES[cfg.precision.params], "cuda")
    ids = torch.ones(cfg.data.micro_batch_size, cfg.data.max_length, dtype=torch.long)
    real = joint_targets(ids, None, model.drafter_num_steps, model.pairing)
    fake, memory, traffic = FakeTensorMode(allow_non_fake_inputs=True), Memory(), Traffic()
    parallelize.parallelize(model, mesh, cfg)
    with played(memory, traffic), fake:
        with memory:
            for part in (model.base, model.drafter):
                part.to_empty(device="cpu")
                part.tie_weights(recompute_mapping=False)
            parallelize.share_streams(model)
            model.train()
            optimizer = build_optimizer(model, cfg.optim)
            inputs = {"input_ids": torch.empty_like(ids), "position_ids": torch.empty_like(ids)}
            if cfg.data.packing:
                inputs["document_ids"] = torch.empty_like(ids)
            fakes = {f.name: getattr(real, f.name) for f in dataclasses.fields(real)}
            fakes = {name: torch.empty_like(x) if isinstance(x, Tensor) else x for name, x in fakes.items()}
            targets = dataclasses.replace(real, **fakes)
            weights = torch.empty(1 + model.drafter_num_steps)
            if (embedding := model.drafter.masked_embedding) is not None:
                order = embedding.token_ordering
                model._token_centroid = order._version, torch.empty(order.shape, dtype=torch.long)
            for _ in range(2):
                memory.peak = memory.live
                traffic.calls.clear()
                traffic.bytes.clear()
                optimizer.zero_grad()
                for i in range(cfg.optim.grad_accum):
                    parallelize.set_last_micro_batch(model, i == cfg.optim.grad_accum - 1)
                    if parallelize.exchanges_rows(model.base, cfg.parallel):
                        inputs[parallelize.LOOKUP] = even_lookup(ids.numel() + 1, shape[2], "cpu")
                    out = model(**inputs, targets=targets, weights=weights)
                    out.loss.backward()
                    del out
                update(optimizer, model, cfg.optim.max_grad_norm, 1.0)
                if cfg.parallel.cpu_offload == "optimizer":  # the states are the host's
                    for tensor in chain.from_iterable(state.values() for state in optimizer.state.values()):
                        memory.leave_out(tensor)
    table = parallelize.per_layer_table(model.base) if parallelize.exchanges_rows(model.base, cfg.parallel) else None
    gathered = [p for p in model.parameters() if isinstance(p, DTensor) and (table is None or p is not table.weight)]
    compute, reduce = 2, parallelize.DTYPES[cfg.precision.reduce].itemsize
    least = {
        "all-gather": 2 * compute * sum(p.numel() for p in gathered) * cfg.optim.grad_accum,
        "reduce-scatter": reduce * sum(p.numel() for p in gathered if p.requires_grad) * cfg.optim.grad_accum,
    }
    return {
        "recomputed": {part: getattr(cfg.activation_checkpointing, part) for part in ("base", "drafter", "offload")},
        "ranks": ranks,
        "mesh": f"{shape[1]} x {shape[2]}",
        "peak": memory.peak,
        "planned": plan.peak,
        **{kind: traffic.total(kind) for kind in ("all-gather", "reduce-scatter", "all-to-all", "all-reduce")},
        **{f"least {kind}": size for kind, size in least.items()},
        "units": {f"{kind} {unit}": size for (kind, unit), size in sorted(traffic.bytes.items())},
        "planned communication": plan.communication,
    }


COLUMNS = {
    "model": ("pair", ""),
    "ranks": ("ranks (replicas x shards)", ""),
    "length": ("S", ""),
    "peak": ("peak, GiB", ".2f"),
    "planned": ("plan", ".2f"),
    "all-gather": ("all-gather", ".1f"),
    "least all-gather": ("least", ".1f"),
    "reduce-scatter": ("reduce-scatter", ".1f"),
    "least reduce-scatter": ("least", ".1f"),
}


def row(model: str, length: int, found: dict) -> dict[str, results.Value]:
    """One measurement as a row of the table, GiB."""
    sizes = {name: found[name] / GIB for name, (_, form) in COLUMNS.items() if form}
    return {"model": model, "ranks": f"{found['ranks']} ({found['mesh']})", "length": str(length), **sizes}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["gemma4_31b", "gemma4_26b_a4b", "gemma4_e4b"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 512])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048])
    results.add_option(parser)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("overrides", nargs="*", help="of the configuration, after --")
    args = parser.parse_args(argv)
    if args.one:
        overrides = [f"model={args.models[0]}", f"data.max_length={args.lengths[0]}", *AS_ON_A_GPU, *args.overrides]
        print(json.dumps(measure(config.load(overrides), args.ranks[0])))
        return 0
    rows, measured = [], []
    for model in args.models:
        for ranks in args.ranks:
            for length in args.lengths:
                command = [sys.executable, "-m", "benchmarks.scale", "--one", "--models", model, "--ranks", str(ranks)]
                command += ["--lengths", str(length), "--", *args.overrides]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=1800)
                if done.returncode:
                    return done.returncode
                measured.append({"model": model, "length": length, **json.loads(done.stdout.splitlines()[-1])})
                rows.append(row(model, length, measured[-1]))
                print(results.table({"columns": COLUMNS, "rows": rows[-1:]}).splitlines()[-1], flush=True)
    results.finish(results.record("scale", COLUMNS, rows, measured=measured), args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
