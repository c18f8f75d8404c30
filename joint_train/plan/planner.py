"""What a run would need, before it runs: ``python -m joint_train.plan [overrides] [--gpus 8 --gpu-memory-gb 80 …]``.

No weight is read and no GPU is used. The real joint forward, loss and backward run once on the meta device, where
tensors have a size and no contents, and every tensor is counted while it lives. Around it the plan plays FSDP2's part:
which unit's weights are gathered when, and what a gradient's reduction holds. FLOPs are counted on the way.

The weights of a released pair needn't be there: its sizes are in :mod:`joint_train.weights.released`.
"""

from dataclasses import dataclass
from importlib.util import find_spec

from torch import nn
from transformers import PreTrainedConfig

from joint_train.checkpoint.state import pair_tensors
from joint_train.config import Config, select, with_overrides
from joint_train.config.values import mesh_shape
from joint_train.distributed.moments import moved_by_muon, state_bytes
from joint_train.distributed.parallelize import DTYPES, compute_dtype, rounded_parameters, whole_parameters
from joint_train.distributed.placement import local_numel, padding
from joint_train.pair.attention import kernels
from joint_train.pair.compatibility import check_pair
from joint_train.pair.loss import memory_budget_mb
from joint_train.plan.step import local_bytes, simulate
from joint_train.weights import released
from joint_train.weights.composite import Gemma4WithDrafter, meta_pair
from joint_train.weights.folders import read_config

GIB = 2**30
PARTS = (
    ("base: adapters", "base.", (".lora_A.", ".lora_B.")),
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
    # Share of it for CUDA's context and NCCL's buffers (2 to 3 GiB), and for what the allocator keeps: it has a pool
    # for each stream (compute, gather, reduce), and what one has freed no other can use.
    reserve: float = 0.06
    tflops: float = 989.0  # of a GPU, dense bfloat16
    utilisation: float = 0.4  # share of them that a step reaches, recomputation counted as work
    hbm_gb_per_second: float = 3350.0  # memory bandwidth of a GPU
    gpus_per_node: int = 8
    nvlink_gb_per_second: float = 350.0  # of a GPU to those of its node, as collectives reach it
    network_gb_per_second: float = 45.0  # of a GPU to other nodes: 400 Gbit/s
    pcie_gb_per_second: float = 50.0  # of a GPU to its host's memory, each way: PCIe 5.0 x16
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
    traffic: int  # bytes of a step that a rank's operations read and write in its memory
    communication: dict[str, dict[str, int]]  # collective -> unit -> bytes of a step, of whole buffers
    mesh: tuple[int, int]  # replicas, shards
    micro_batches: int  # of a step, on a rank
    padding: float  # what equal shards add to the sharded weights, as a share of them
    host: int  # bytes of a rank in its host's memory: what parallel.cpu_offload moves there
    transfers_at_end: bool  # not beside forward and backward, but in the update
    transfers: dict[str, int]  # bytes of a step between a rank's GPU and its host: "to device", "to host"
    attention: str  # what computes it

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def flops_per_token(self) -> float:
        return self.flops * self.ranks / self.tokens

    def compute_seconds(self, machine: Machine) -> float:
        """Time of a step's FLOPs."""
        return self.flops / (machine.tflops * 1e12 * machine.utilisation)

    def memory_seconds(self, machine: Machine) -> float:
        """Time of a step's reads and writes, if no two operations are fused."""
        return self.traffic / machine.hbm_gb_per_second / 1e9

    def network_seconds(self, machine: Machine) -> dict[str, float]:
        """Time of each collective's bytes, as rings take it: (n-1)/n of the buffer through a GPU's link, an all-reduce
        twice. Inside a node they go over NVLink. An all-to-all is taken to be spread evenly over the ranks."""
        replicas, shards = self.mesh
        inside = shards <= machine.gpus_per_node
        shard_link = machine.nvlink_gb_per_second if inside else machine.network_gb_per_second
        inside = replicas * shards <= machine.gpus_per_node
        replica_link = machine.nvlink_gb_per_second if inside else machine.network_gb_per_second
        each = {kind: (shards, shard_link, 1) for kind in ("all-gather", "reduce-scatter", "all-to-all")}
        each["all-reduce"] = (replicas, replica_link, 2)
        return {
            kind: times * (n - 1) / n * sum(self.communication[kind].values()) / link / 1e9
            for kind, (n, link, times) in each.items()
        }

    def transfer_seconds(self, machine: Machine) -> float:
        """Time of the copies between GPU and host, one way after the other."""
        return sum(self.transfers.values()) / machine.pcie_gb_per_second / 1e9

    def exposed_seconds(self, machine: Machine) -> float:
        """Communication that no computation hides: what is gathered before the first layer and reduced after the last,
        and what is left of the rest when the computation is done."""
        total = self.network_seconds(machine)
        ends = 0.0
        for kind, units in (
            ("all-gather", ("base root", "drafter", "per-layer embeddings")),
            ("reduce-scatter", ("base root", "per-layer embeddings")),
            ("all-to-all", ("per-layer embeddings",)),
        ):
            of_kind = self.communication[kind]
            if every := sum(of_kind.values()):
                ends += total[kind] * sum(of_kind.get(unit, 0) for unit in units) / every
        transfers = self.transfer_seconds(machine)
        if self.transfers_at_end:
            ends += transfers
        whole = sum(total.values()) + transfers
        return ends + max(0.0, whole - ends - self.compute_seconds(machine))

    def generation_seconds(self, machine: Machine, forwards: int) -> float:
        """Time of that many forwards of the base in a generation: each gathers the layers and reads all weights."""
        gathers = self.communication["all-gather"]
        moved = sum(gathers.values()) and (gathers.get("layers", 0) / 2 + gathers.get("per-layer embeddings", 0))
        share = moved / max(1, sum(gathers.values())) / self.micro_batches
        weights = 2 * sum(every for every, _ in self.parameters.values())
        return forwards * (
            share * self.network_seconds(machine)["all-gather"] + weights / machine.hbm_gb_per_second / 1e9
        )

    def validation_seconds(self, machine: Machine, batches: int) -> float:
        """Time of a validation's forwards, of a micro-batch each: a third of what a step computes for one."""
        return (
            batches
            * (self.flops - self.recomputed)
            / 3
            / self.micro_batches
            / (machine.tflops * 1e12 * machine.utilisation)
        )

    def seconds(self, machine: Machine) -> float:
        """Time of a step."""
        return self.compute_seconds(machine) + self.exposed_seconds(machine)

    def bound(self, machine: Machine) -> str:
        """What takes longest: compute, memory or network."""
        seconds = {
            "compute": self.compute_seconds(machine),
            "memory": self.memory_seconds(machine),
            "network": sum(self.network_seconds(machine).values()),
            "PCIe": self.transfer_seconds(machine),
        }
        return max(seconds, key=seconds.get)


def read(cfg: Config) -> tuple[PreTrainedConfig, PreTrainedConfig, tuple[str, str]]:
    """The pair's configurations, and where they come from: the released sizes, or else a folder or the hub.

    Raises:
        ConfigError: if there are neither, or the pair doesn't fit together.
    """
    m, configs, sources = cfg.model, [], []
    for path, revision, overrides in (
        (m.base, m.revision, m.text_config),
        (m.drafter, m.drafter_revision, None),
    ):
        found = released.released_config(path, overrides)
        if found is None:
            found, source = (
                read_config(path, revision=revision, cache_dir=m.cache_dir, text_config=overrides),
                f"{path}/config.json",
            )
        else:
            source = f"{path}, from joint_train/weights/released.py"
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


def mesh_sizes(cfg: Config, machine: Machine) -> tuple[int, int]:
    """(ranks, ranks that a weight is sharded over)."""
    replicate, shard = cfg.parallel.dp_replicate, cfg.parallel.dp_shard
    ranks = replicate * shard if shard > 0 else max(replicate, machine.gpus - machine.gpus % replicate)
    return ranks, mesh_shape(cfg.parallel, ranks, machine.gpus_per_node)[2]


def make_plan(cfg: Config, machine: Machine, device_type: str = "cuda") -> Plan:
    """Estimate a run.

    Args:
        device_type: decides what ``precision.compute=auto`` and the loss's default budget are.

    Raises:
        ConfigError: as :func:`read`.
    """
    base_config, drafter_config, sources = read(cfg)
    as_planned = {
        "parallel.compile": False,
        "model.use_liger_kernel": False,
        "loss.memory_budget_mb": memory_budget_mb(cfg.loss, device_type),
        "loss.compile": False,
    }
    cfg = with_overrides(cfg, as_planned)
    compute = compute_dtype(cfg.precision, device_type)
    model = meta_pair(cfg, base_config, drafter_config, compute, device_type)
    ranks, shard = mesh_sizes(cfg, machine)
    step = simulate(model, cfg, shard, device_type)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    dtype = DTYPES[cfg.precision.params]

    parts = [module for _, module in model.parts()] if cfg.optim.name == "muon" else []
    by_muon = {id(p) for module in parts for p in moved_by_muon(module)}

    def bytes_of_states(p: nn.Parameter, numel: int) -> int:
        name = "momentum" if id(p) in by_muon else cfg.optim.name
        return state_bytes(name, p.shape, numel, dtype)

    states = sum(bytes_of_states(p, local_numel(p.shape, shard)) for p in trained)
    reduce_bytes = DTYPES[cfg.precision.reduce].itemsize
    whole = whole_parameters(model.base)
    rounded = {id(p) for p in rounded_parameters(model.base)}  # sharded, unless they are whole
    masters = [p for p in parameters if id(p) not in rounded]
    kept = [p for p in parameters if id(p) in rounded - {id(other) for other in whole}]
    offloaded = cfg.parallel.cpu_offload == "all"
    shards = local_bytes(masters, shard, cfg) + sum(local_numel(p.shape, shard) * p.dtype.itemsize for p in kept)
    gradients = local_bytes(trained, shard, cfg)
    memory = {
        "weights (this rank's shard)": 0 if offloaded else shards,
        "frozen towers": sum(p.nbytes for p in whole),
        "optimizer states": states if cfg.parallel.cpu_offload == "none" else 0,
        **{name: step.at_peak[name] for name in ("gradients", "gathered weights", "gradient reduction", "activations")},
    }
    kinds = ("all-gather", "reduce-scatter", "all-to-all", "all-reduce")
    communication: dict[str, dict[str, int]] = {kind: {} for kind in kinds}
    transfers = {"to device": 0, "to host": 0}
    for (kind, unit), size in step.moved.items():
        if kind in transfers:
            transfers[kind] += size * cfg.optim.grad_accum
        else:
            communication[kind][unit] = size * cfg.optim.grad_accum
    if ranks > shard:  # once a step, of the sharded gradients
        communication["all-reduce"]["gradients"] = sum(local_numel(p.shape, shard) for p in trained) * reduce_bytes
    if shard == 1:
        communication |= {"all-gather": {}, "reduce-scatter": {}, "all-to-all": {}}
    if cfg.parallel.cpu_offload == "optimizer":  # to the update and back
        transfers = {"to device": states, "to host": states}
    tokens = cfg.data.max_length * cfg.data.micro_batch_size * cfg.optim.grad_accum * ranks
    itemsize = DTYPES[cfg.precision.params].itemsize
    saved = [p for tensors in pair_tensors(model).values() for p in tensors.values() if isinstance(p, nn.Parameter)]
    return Plan(
        parameters=count_parameters(model),
        memory=memory,
        flops=step.flops * cfg.optim.grad_accum,
        recomputed=step.recomputed * cfg.optim.grad_accum,
        tokens=tokens,
        ranks=ranks,
        checkpoint=sum(p.nbytes if id(p) in rounded else itemsize * p.numel() for p in saved)
        + sum(bytes_of_states(p, p.numel()) for p in trained),
        sources=sources,
        # AdamW reads weight, gradient and moments and writes all but the gradient; on the host, if they are there.
        traffic=step.traffic * cfg.optim.grad_accum + (0 if offloaded else 3 * gradients + 2 * states),
        communication=communication,
        mesh=(ranks // shard, shard),
        micro_batches=cfg.optim.grad_accum,
        padding=padding([p.shape for p in parameters if id(p) not in {id(other) for other in whole}], shard),
        host={"none": 0, "optimizer": states, "all": shards + states + gradients}[cfg.parallel.cpu_offload],
        transfers=transfers,
        transfers_at_end=cfg.parallel.cpu_offload == "optimizer",
        attention=kernels(model.base.config.get_text_config(), compute, "meta"),
    )


def longest(cfg: Config, machine: Machine, plan: Plan, unit: int = 256, most: int = 2**20) -> int:
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


def can_adapt(cfg: Config) -> bool:
    """Whether adapters in the place of a trained base are a choice that is left."""
    return not cfg.lora.r and not cfg.freeze.base and cfg.freeze.towers and find_spec("peft") is not None


def savings(cfg: Config, machine: Machine) -> dict[str, int]:
    """Settings that take less memory, those that cost the least time first, and the peak with each alone."""
    smaller_loss = min(256, memory_budget_mb(cfg.loss, "cuda"))
    changes = [
        {"parallel.reshard_after_forward": True},
        {"loss.memory_budget_mb": smaller_loss},
        {"activation_checkpointing.drafter": "full"},
        {"activation_checkpointing.base": "full"},
        {"data.micro_batch_size": 1, "optim.grad_accum": cfg.optim.grad_accum * cfg.data.micro_batch_size},
        {"parallel.dp_shard": 2 * mesh_sizes(cfg, machine)[1]},
        {"data.max_length": max(256, cfg.data.max_length // 2)},
        {"optim.name": "adamw_bf16"},
        {"optim.name": "adamw_8bit"},
        {"precision.params": "bfloat16"},
        *([{"lora.r": 16}] if can_adapt(cfg) else []),
        *([{"freeze.base": True}] if not cfg.lora.r else []),
        {"parallel.cpu_offload": "optimizer"},
        *([] if cfg.eval.prompts else [{"parallel.cpu_offload": "all"}]),
    ]
    peaks = {}
    for change in changes:
        if any(select(cfg, key) != value for key, value in change.items()):
            name = " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
            peaks[name] = make_plan(with_overrides(cfg, change), machine).peak
    return peaks


# Command line
