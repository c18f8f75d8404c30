"""What a run would need, before it runs: ``python -m joint_train.plan [overrides] [--gpus 8 --gpu-memory-gb 80 …]``.

No weight is read and no GPU is used. The real joint forward, loss and backward run once on the meta device, where
tensors have a size and no contents, and every tensor is counted while it lives. Around it the plan plays FSDP2's part:
which unit's weights are gathered when, and what a gradient's reduction holds. FLOPs are counted on the way.

The weights of a released pair needn't be there: its sizes are in :mod:`joint_train.released`.
"""

import argparse
import contextlib
import copy
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

from joint_train import config, released
from joint_train.config import ConfigError
from joint_train.loading import check_pair, meta_pair, read_config
from joint_train.loss import joint_targets, memory_budget_mb
from joint_train.model import Gemma4WithDrafter
from joint_train.parallelize import DTYPES, compute_dtype, text_model

GIB = 2**30
PARTS = (
    ("base: embedding and head", "base.", ("embed_tokens.", "lm_head.")),
    ("base: per-layer embeddings", "base.", ("embed_tokens_per_layer.", "per_layer_model_", "per_layer_projection_")),
    ("base: experts", "base.", (".experts.", ".router.")),
    ("base: towers and projections", "base.", ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")),
    ("base: layers", "base.", ("",)),
    ("drafter: embedding and head", "drafter.", ("embed_tokens.", "lm_head.")),
    ("drafter: layers and projections", "drafter.", ("",)),
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """The hardware that a plan is for; the defaults are those of an H100 node."""

    gpus: int = 8
    gpu_memory_gb: float = 80.0  # as vendors count: units of 2**30 bytes
    reserve: float = 0.06  # share of it for CUDA's context, NCCL's buffers and the allocator's gaps
    tflops: float = 989.0  # of a GPU, dense bfloat16
    utilisation: float = 0.4  # share of them that a step reaches, recomputation counted as work
    disk_gb_per_second: float = 5.0  # all ranks together

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a run can fill."""
        return self.gpu_memory_gb * 2**30 * (1 - self.reserve)


@dataclass(frozen=True)
class Plan:
    """An estimate of a run. Memory in bytes on a rank; FLOPs of a step on a rank."""

    parameters: dict[str, tuple[int, int]]  # part -> (all, trained), of the whole pair
    memory: dict[str, int]  # what the peak is made of
    flops: int
    recomputed: int  # those of them that compute something again: by checkpointing, and by attention's backward
    tokens: int  # of a step, on all ranks
    ranks: int
    checkpoint: int  # bytes of a whole checkpoint: weights and optimizer states
    sources: tuple[str, str]  # where the sizes of base and drafter come from

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def flops_per_token(self) -> float:
        return self.flops * self.ranks / self.tokens

    def seconds(self, machine: Machine) -> float:
        """Time of a step."""
        return self.flops / (machine.tflops * 1e12 * machine.utilisation)


# The step on the meta device


class Meter(TorchDispatchMode):
    """Counts bytes of living tensors and FLOPs of the operations under it; `hold` adds what isn't a tensor here."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.flops, self.recomputed, self.peak = 0, 0, 0, 0
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
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
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


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


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
    def forward(ctx, query, key, value, bias, meter):
        out = torch.empty_like(query[..., :1]).expand(*query.shape[:-1], value.shape[-1]).contiguous()
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, rows)
        ctx.meter = meter
        ctx.product = 2 * query.shape[:-1].numel() * key.shape[-2] * query.shape[-1]
        meter.count(2 * ctx.product, again=in_backward())
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        ctx.meter.count(4 * ctx.product)
        ctx.meter.count(ctx.product, again=True)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def _experts(self: Gemma4TextExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts' work without their choice: each token passes through as many experts, of the same size."""
    rows = hidden.repeat_interleave(index.shape[-1], dim=0)
    gate, up = nn.functional.linear(rows, self.gate_up_proj[0]).chunk(2, dim=-1)
    out = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[0]) * weights.reshape(-1, 1)
    return out.view(*index.shape, -1).sum(1).to(hidden.dtype)


class _Unit:
    """An FSDP2 unit: when its weights are gathered, and what the reduction of its gradients holds."""

    def __init__(self, parameters: list[nn.Parameter], stays: bool, meter: Meter, cfg: DictConfig, shard: int) -> None:
        self.meter, self.stays = meter, stays
        self.size = sum(p.numel() * p.dtype.itemsize for p in parameters)
        self.trained = [p for p in parameters if p.requires_grad]
        self.reduced = sum(p.numel() for p in self.trained) * DTYPES[cfg.precision.reduce].itemsize
        self.gradient = 0 if cfg.optim.grad_accum > 1 else local_bytes(self.trained, shard, cfg)
        self.gathered, self.waiting = False, len(self.trained)
        self.hooks = [p.register_post_accumulate_grad_hook(self.accumulated) for p in self.trained]

    def wrap(self, module: nn.Module) -> None:
        """Gather before a forward and a backward of the module."""
        self.hooks += [module.register_forward_pre_hook(self.gather), module.register_forward_hook(self.after_forward)]

    def gather(self, *_) -> None:
        if not self.gathered:
            self.gathered = True
            self.meter.hold("gathered weights", self.size)

    def reshard(self) -> None:
        if self.gathered:
            self.gathered = False
            self.meter.hold("gathered weights", -self.size)

    def after_forward(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if not self.stays and not in_backward():  # in a backward it is a recomputation: its own backward follows
            self.reshard()
        if output.requires_grad and not isinstance(module, nn.Embedding):  # the gradient of a look-up needs no table
            output.register_hook(self.gather)

    def accumulated(self, _) -> None:
        self.waiting -= 1
        if self.waiting == 0:
            self.meter.hold("gradient reduction", self.reduced - self.meter.held["gradient reduction"])
            self.meter.hold("gradients", self.gradient)
            for parameter in self.trained:
                parameter.grad = None
            self.reshard()


@dataclass(frozen=True)
class Step:
    """One micro-batch on a rank: FLOPs, and what lives when most does, besides the shard and the optimizer's states."""

    flops: int
    recomputed: int
    at_peak: Counter[str]


def simulate(model: Gemma4WithDrafter, cfg: DictConfig, shard: int) -> Step:
    """Run a micro-batch on the meta device.

    Args:
        model: from :func:`joint_train.loading.meta_pair` with this configuration, in the dtype of compute.
        shard: ranks that a weight is sharded over.
    """
    text, meter, units = text_model(model.base), Meter(), []

    def unit(parameters: list[nn.Parameter], stays: bool) -> _Unit:
        units.append(_Unit(parameters, stays, meter, cfg, shard))
        return units[-1]

    model.train()
    for layer in text.layers:
        unit(list(layer.parameters()), not cfg.parallel.reshard_after_forward).wrap(layer)
    largest = max(layer.size for layer in units)
    if (per_layer := getattr(text, "embed_tokens_per_layer", None)) is not None:
        unit(list(per_layer.parameters()), False).wrap(per_layer)
    taken = {id(p) for layer in (*text.layers, *([per_layer] if per_layer else [])) for p in layer.parameters()}
    root = unit([p for p in model.base.parameters() if id(p) not in taken], True)
    drafter = unit(list(model.drafter.parameters()), True)
    drafter.hooks.append(model.drafter.pre_projection.register_forward_pre_hook(drafter.gather))
    if model.drafter.masked_embedding is not None:
        ordering = model.drafter.masked_embedding.token_ordering
        model._token_centroid = ordering._version, torch.empty_like(ordering)

    ids = torch.ones(cfg.data.micro_batch_size, cfg.data.max_length, dtype=torch.long)
    targets = joint_targets(ids, None, model.drafter_num_steps, model.pairing).to("meta")  # every token is one
    documents = torch.ones_like(ids, device="meta") if cfg.data.packing else None
    weights = torch.ones(1 + model.drafter_num_steps, device="meta")
    try:
        with meter, stand_ins(meter):
            for tensor in (*model.parameters(), *model.buffers()):
                meter.ignore(tensor)
            if cfg.optim.grad_accum > 1:
                meter.hold("gradients", local_bytes([p for p in model.parameters() if p.requires_grad], shard, cfg))
            root.gather()
            meter.hold("gathered weights", largest)  # the next layer's, on their way while one is computed
            loss = model(ids.to("meta"), document_ids=documents, targets=targets, weights=weights).loss
            if loss.requires_grad:
                loss.backward()
    finally:
        for hook in (hook for unit in units for hook in unit.hooks):
            hook.remove()
        for parameter in model.parameters():
            parameter.grad = None
    return Step(meter.flops, meter.recomputed, meter.at_peak)


@contextlib.contextmanager
def stand_ins(meter: Meter) -> Iterator[None]:
    """What the meta device can't run, or only in another form than a GPU: attention kernels and the experts' choice."""

    def attention(query, key, value, attn_mask=None, **kwargs):
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # every kernel makes an additive mask of it
        return _Attention.apply(query, key, value, attn_mask, meter)

    kept = nn.functional.scaled_dot_product_attention, Gemma4TextExperts.forward
    nn.functional.scaled_dot_product_attention, Gemma4TextExperts.forward = attention, _experts
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention, Gemma4TextExperts.forward = kept


def local_bytes(parameters: list[nn.Parameter], shard: int, cfg: DictConfig) -> int:
    """Bytes of rank 0's shards, which are the largest, in ``precision.params``."""
    rows = ((-(-p.shape[0] // shard), p[0].numel()) for p in parameters)
    return sum(n * size for n, size in rows) * DTYPES[cfg.precision.params].itemsize


# The plan


def read(cfg: DictConfig) -> tuple[PreTrainedConfig, PreTrainedConfig, tuple[str, str]]:
    """The pair's configurations, and where they come from: the released sizes, or else a folder or the hub.

    Raises:
        ConfigError: if there are neither, or the pair doesn't fit together.
    """
    m, configs, sources = cfg.model, [], []
    for path, revision, overrides in (
        (m.base, m.revision, OmegaConf.to_container(m.text_config)),
        (m.drafter, m.drafter_revision, None),
    ):
        found = released.released_config(path, overrides)
        if found is None:
            found, source = (
                read_config(path, revision=revision, cache_dir=m.cache_dir, text_config=overrides),
                f"{path}/config.json",
            )
        else:
            source = f"{path}, from joint_train/released.py"
        configs.append(found)
        sources.append(source)
    check_pair(*configs)
    return *configs, tuple(sources)


def count_parameters(model: Gemma4WithDrafter) -> dict[str, tuple[int, int]]:
    """(all, trained) of each part; a tied weight counts once."""
    parts = {part: [0, 0] for part, *_ in PARTS}
    for name, parameter in model.named_parameters():
        part = next(p for p, prefix, marks in PARTS if name.startswith(prefix) and any(mark in name for mark in marks))
        parts[part][0] += parameter.numel()
        parts[part][1] += parameter.numel() * parameter.requires_grad
    return {part: (every, trained) for part, (every, trained) in parts.items() if every}


def mesh_sizes(cfg: DictConfig, gpus: int) -> tuple[int, int]:
    """(ranks, ranks that a weight is sharded over)."""
    replicate, shard = cfg.parallel.dp_replicate, cfg.parallel.dp_shard
    shard = shard if shard > 0 else max(1, gpus // replicate)
    return replicate * shard, shard


def make_plan(cfg: DictConfig, machine: Machine, device_type: str = "cuda") -> Plan:
    """Estimate a run.

    Args:
        device_type: decides what ``precision.compute=auto`` and the loss's default budget are.

    Raises:
        ConfigError: as :func:`read`.
    """
    base_config, drafter_config, sources = read(cfg)
    as_planned = {
        "parallel": {"compile": False},
        "model": {"use_liger_kernel": False},
        "loss": {"memory_budget_mb": memory_budget_mb(cfg.loss, device_type)},
    }
    cfg = OmegaConf.merge(cfg, as_planned)
    model = meta_pair(cfg, base_config, drafter_config, compute_dtype(cfg.precision, device_type))
    ranks, shard = mesh_sizes(cfg, machine.gpus)
    step = simulate(model, cfg, shard)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    states = 2 * local_bytes(trained, shard, cfg)
    memory = {
        "weights (this rank's shard)": local_bytes(parameters, shard, cfg),
        "optimizer states": states,
        **{name: step.at_peak[name] for name in ("gradients", "gathered weights", "gradient reduction", "activations")},
    }
    tokens = cfg.data.max_length * cfg.data.micro_batch_size * cfg.optim.grad_accum * ranks
    itemsize = DTYPES[cfg.precision.params].itemsize
    return Plan(
        parameters=count_parameters(model),
        memory=memory,
        flops=step.flops * cfg.optim.grad_accum,
        recomputed=step.recomputed * cfg.optim.grad_accum,
        tokens=tokens,
        ranks=ranks,
        checkpoint=itemsize * (sum(p.numel() for p in parameters) + 2 * sum(p.numel() for p in trained)),
        sources=sources,
    )


def longest(cfg: DictConfig, machine: Machine, plan: Plan, unit: int = 256, most: int = 2**20) -> int:
    """The largest ``data.max_length`` that fits, in multiples of `unit` and up to `most`; 0 if none does."""

    def peak(units: int) -> int:
        return make_plan(with_overrides(cfg, {"data.max_length": units * unit}), machine).peak

    if plan.peak <= machine.usable:
        low, high = (cfg.data.max_length // unit, plan.peak), None
    else:
        low, high = (1, peak(1)), (-(-cfg.data.max_length // unit), plan.peak)
        if low[1] > machine.usable or high[0] == 1:
            return 0
    while low[0] * unit < most and (high is None or high[0] - low[0] > 1):
        if high is None:
            guess = max(1, 2 * low[0])
        else:  # the peak is nearly linear in the length
            share = (machine.usable - low[1]) / (high[1] - low[1])
            guess = min(max(low[0] + int(share * (high[0] - low[0])), low[0] + 1), high[0] - 1)
        point = guess, peak(guess)
        low, high = (point, high) if point[1] <= machine.usable else (low, point)
    return low[0] * unit or cfg.data.max_length


def with_overrides(cfg: DictConfig, changes: dict) -> DictConfig:
    changed = copy.deepcopy(cfg)
    for key, value in changes.items():
        OmegaConf.update(changed, key, value)
    return changed


def savings(cfg: DictConfig, machine: Machine) -> dict[str, int]:
    """Settings that take less memory, those that cost the least time first, and the peak with each alone."""
    smaller_loss = min(256, memory_budget_mb(cfg.loss, "cuda"))
    changes = [
        {"parallel.reshard_after_forward": True},
        {"loss.memory_budget_mb": smaller_loss},
        {"activation_checkpointing.drafter": "full"},
        {"activation_checkpointing.base": "full"},
        {"data.micro_batch_size": 1, "optim.grad_accum": cfg.optim.grad_accum * cfg.data.micro_batch_size},
        {"parallel.dp_shard": 2 * mesh_sizes(cfg, machine.gpus)[1]},
        {"data.max_length": max(256, cfg.data.max_length // 2)},
        {"precision.params": "bfloat16"},
        {"freeze.base": True},
    ]
    peaks = {}
    for change in changes:
        if any(OmegaConf.select(cfg, key) != value for key, value in change.items()):
            name = " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
            peaks[name] = make_plan(with_overrides(cfg, change), machine).peak
    return peaks


# Command line


def report(cfg: DictConfig, machine: Machine, plan: Plan, console: Console) -> None:
    """Print a plan."""
    parts = Table(title="Parameters", title_justify="left")
    for column in ("part", "all", "trained", "frozen"):
        parts.add_column(column, justify="left" if column == "part" else "right")
    for part, (every, trained) in plan.parameters.items():
        parts.add_row(part, f"{every:,}", f"{trained:,}", f"{every - trained:,}")
    total, trained = (sum(column) for column in zip(*plan.parameters.values(), strict=True))
    parts.add_row("total", f"{total:,}", f"{trained:,}", f"{total - trained:,}", style="bold")

    memory = Table(title="Memory of a rank at its peak, GiB", title_justify="left")
    memory.add_column("what")
    memory.add_column("GiB", justify="right")
    for what, size in plan.memory.items():
        memory.add_row(what, f"{size / GIB:.2f}")
    memory.add_row("peak", f"{plan.peak / GIB:.2f}", style="bold")
    memory.add_row(
        f"usable of {machine.gpu_memory_gb:g} ({machine.reserve:.0%} reserved)", f"{machine.usable / GIB:.2f}"
    )
    other = "none" if cfg.activation_checkpointing.base != "none" else "full"
    changed = make_plan(with_overrides(cfg, {"activation_checkpointing.base": other}), machine)
    memory.add_row(f"peak with activation_checkpointing.base={other}", f"{changed.peak / GIB:.2f}", style="dim")

    seconds = plan.seconds(machine)
    step = Table(title="Step", title_justify="left", show_header=False)
    for what, value in {
        "ranks": f"{plan.ranks}, weights sharded over {mesh_sizes(cfg, machine.gpus)[1]}",
        "tokens of a step": f"{plan.tokens:,} (S = {cfg.data.max_length}, K = {cfg.drafter.num_steps})",
        "FLOPs of a token": f"{plan.flops_per_token:.3e} (recomputation included)",
        "FLOPs of a step": f"{plan.flops * plan.ranks:.3e}",
        "time of a step": f"{seconds:.2f} s at {machine.utilisation:.0%} of {machine.tflops:g} TFLOP/s a GPU",
        "tokens a second": f"{plan.tokens / seconds:,.0f}",
        "checkpoint": f"{plan.checkpoint / GIB:.1f} GiB, {plan.checkpoint / machine.disk_gb_per_second / 1e9:.0f} s at "
        f"{machine.disk_gb_per_second:g} GB/s",
    }.items():
        step.add_row(what, value)
    for table in (parts, memory, step):
        console.print(table)
    for source in plan.sources:
        console.print(f"sizes: {source}", style="dim", highlight=False)

    length = longest(cfg, machine, plan)
    if plan.peak <= machine.usable:
        console.print(f"It fits. The longest rows that fit: data.max_length={length}", style="bold")
        return
    console.print(f"It does not fit: {(plan.peak - machine.usable) / GIB:.2f} GiB too much.", style="bold red")
    peaks = savings(cfg, machine)
    if length:
        peaks[f"data.max_length={length}"] = int(machine.usable)
    for change, peak in peaks.items():
        console.print(f"  {change}: {peak / GIB:.2f} GiB{', fits' if peak <= machine.usable else ''}", highlight=False)
    first = next((change for change, peak in peaks.items() if peak <= machine.usable), None)
    console.print(
        f"Change first: {first or min(peaks, key=peaks.get) + ' (not enough alone)'}", style="bold", highlight=False
    )


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if the run fits, 3 if it doesn't and 1 for an error."""
    machine = Machine()
    parser = argparse.ArgumentParser(prog="python -m joint_train.plan", description="Say what a run would need.")
    parser.add_argument("overrides", nargs="*", help="as for python -m joint_train, e.g. model=gemma4_31b")
    parser.add_argument("--gpus", type=int, default=machine.gpus, help="where parallel.dp_shard is -1")
    parser.add_argument("--gpu-memory-gb", type=float, default=machine.gpu_memory_gb)
    parser.add_argument("--reserve", type=float, default=machine.reserve, help="share of it that a run can't use")
    parser.add_argument("--tflops", type=float, default=machine.tflops, help="of a GPU")
    parser.add_argument("--utilisation", type=float, default=machine.utilisation, help="share of them that is reached")
    parser.add_argument("--disk-gb-per-second", type=float, default=machine.disk_gb_per_second, help="of all ranks")
    args = vars(parser.parse_intermixed_args(argv))
    try:
        cfg = config.load(["data.train=[{path: unused}]", *args.pop("overrides")])
        machine = Machine(**args)
        plan = make_plan(cfg, machine)
        report(cfg, machine, plan, Console())
    except (ConfigError, HydraException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if plan.peak <= machine.usable else 3


if __name__ == "__main__":
    sys.exit(main())
