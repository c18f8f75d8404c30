"""What a run would need, before it runs: ``python -m joint_train.plan [overrides] [--gpus 8 --gpu-memory-gb 80 …]``.

No weight is read and no GPU is used. The real joint forward, loss and backward run once on the meta device, where
tensors have a size and no contents, and every tensor is counted while it lives. Around it the plan plays FSDP2's part:
which unit's weights are gathered when, and what a gradient's reduction holds. FLOPs are counted on the way.

The weights of a released pair needn't be there: its sizes are in :mod:`joint_train.weights.released`.
"""

import math
from dataclasses import dataclass, field, replace

from torch import nn
from transformers import PreTrainedConfig

from joint_train.checkpoint.state import pair_tensors
from joint_train.config import Config, with_overrides
from joint_train.config.values import as_saved, grown_rows, mesh_shape
from joint_train.distributed.moments import moved_by_muon, state_bytes
from joint_train.distributed.parallelize import DTYPES, compute_dtype, rounded_parameters, whole_parameters
from joint_train.distributed.placement import local_numel, padding
from joint_train.distributed.quantised import stores
from joint_train.pair.attention import kernels
from joint_train.pair.compatibility import check_pair
from joint_train.pair.loss import memory_budget_mb
from joint_train.plan.ladder import likely, lowest, rungs
from joint_train.plan.machine import Machine
from joint_train.plan.meter import COPIES, Work
from joint_train.plan.step import SAVED, local_bytes, simulate
from joint_train.weights import released
from joint_train.weights.composite import Gemma4WithDrafter, meta_pair
from joint_train.weights.folders import read_config, vocabulary_settings
from joint_train.weights.served import read_served

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
class Time:
    """Seconds of a part of a step: what its arithmetic takes, and what its memory traffic does."""

    compute: float
    memory: float
    launches: int

    @property
    def seconds(self) -> float:
        """The kernels of a part overlap one with the other, so the larger of the two counts."""
        return max(self.compute, self.memory)


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
    work: dict[str, Work]  # of a step on a rank, by part
    communication: dict[str, dict[str, int]]  # collective -> unit -> bytes of a step, of whole buffers
    mesh: tuple[int, int]  # replicas, shards
    micro_batches: int  # of a step, on a rank
    padding: float  # what equal shards add to the sharded weights, as a share of them
    host: dict[str, int]  # bytes of a rank in its host's memory, by what they are for
    transfers_at_end: int  # bytes of `transfers` that are moved in the update, not beside forward and backward
    transfers: dict[str, int]  # bytes of a step between a rank's GPU and its host: "to device", "to host"
    attention: str  # what computes it
    chosen: dict[str, object] = field(default_factory=dict)  # the settings that ``auto`` is, as overrides

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def flops_per_token(self) -> float:
        return self.flops * self.ranks / self.tokens

    @property
    def traffic(self) -> int:
        """Bytes of a step that a rank's kernels read and write in its memory."""
        return sum(work.bytes for work in self.work.values())

    @property
    def launches(self) -> int:
        """Kernels of a step on a rank."""
        return sum(work.launches for work in self.work.values())

    def times(self, machine: Machine) -> dict[str, Time]:
        """Time of each part of a step but communication."""
        return {
            part: Time(
                sum(flops / machine.kernel_tflops(kernel) / 1e12 for kernel, flops in work.flops.items()),
                work.bytes / machine.hbm_gb_per_second / 1e9,
                work.launches,
            )
            for part, work in self.work.items()
        }

    def compute_seconds(self, machine: Machine) -> float:
        """Time of a step's arithmetic, each kernel at its own speed."""
        return sum(time.compute for time in self.times(machine).values())

    def memory_seconds(self, machine: Machine) -> float:
        """Time of a step's reads and writes."""
        return sum(time.memory for time in self.times(machine).values())

    def device_seconds(self, machine: Machine) -> float:
        """Time of a step's kernels, without communication."""
        return sum(time.seconds for time in self.times(machine).values())

    def host_seconds(self, machine: Machine) -> float:
        """Time that the host needs to launch a step's kernels."""
        return self.launches * machine.launch_us / 1e6

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
        """What communication adds to a step's time: what is gathered before the first layer and reduced after the last,
        what is left of the rest when the computation is done, and what it takes from the kernels that hide it."""
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
        slowed = machine.overlap_cost * (sum(total.values()) - ends)
        transfers = self.transfer_seconds(machine)
        ends += self.transfers_at_end / machine.pcie_gb_per_second / 1e9
        whole = sum(total.values()) + transfers
        return ends + max(slowed, whole - ends - self.device_seconds(machine))

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
        """Time of a validation's forwards, of a micro-batch each: a third of what a step takes for one, without what it
        recomputes."""
        return batches * self.seconds(machine) * (1 - self.recomputed / self.flops) / 3 / self.micro_batches

    def seconds(self, machine: Machine) -> float:
        """Time of a step: of its kernels and the communication that none of them hides, or of the host's launches."""
        return max(self.device_seconds(machine) + self.exposed_seconds(machine), self.host_seconds(machine))

    def mfu(self, machine: Machine) -> float:
        """Model FLOPs, so without those that are repeated, as a share of what the GPU could do in a step's time."""
        return (self.flops - self.recomputed) / self.seconds(machine) / machine.tflops / 1e12

    def bound(self, machine: Machine) -> str:
        """The bottleneck: a part of the step, communication, or the host."""
        seconds = {part: time.seconds for part, time in self.times(machine).items()}
        seconds["communication"] = self.exposed_seconds(machine)
        if self.host_seconds(machine) >= sum(seconds.values()):
            return "the host, which launches the kernels"
        return max(seconds, key=lambda what: seconds[what])


def read(cfg: Config) -> tuple[PreTrainedConfig, PreTrainedConfig, tuple[str, str]]:
    """The pair's configurations, and where they come from: the released sizes, or else a folder or the hub.

    Raises:
        ConfigError: if there are neither, or the pair doesn't fit together.
    """
    m, configs, sources = cfg.model, list[PreTrainedConfig](), list[str]()
    rows = grown_rows(cfg)
    for path, revision, overrides, kind in (
        (m.base, m.revision, m.text_config, "gemma4"),
        (m.drafter, m.drafter_revision, None, "gemma4_assistant"),
    ):
        grown = vocabulary_settings(kind, rows) if rows else {}
        found = released.released_config(path, {**(overrides or {}), **grown})
        if found is None:
            found, source = (
                read_config(
                    path,
                    revision=revision,
                    cache_dir=m.cache_dir,
                    text_config=overrides,
                    rows=rows,
                    quantized=as_saved(cfg),
                ),
                f"{path}/config.json",
            )
        else:
            source = f"{path}, from joint_train/weights/released.py"
        configs.append(found)
        sources.append(source)
    base, drafter = configs
    check_pair(base, drafter)
    return base, drafter, (sources[0], sources[1])


def count_parameters(model: Gemma4WithDrafter) -> dict[str, tuple[int, int]]:
    """(all, trained) of each part; a tied weight counts once, one that is kept in codes as if it weren't."""
    parts = {part: [0, 0] for part, *_ in PARTS}
    kept = stores(model).values()
    numbers = {id(store.codes): math.prod(store.shape) for store in kept} | {id(store.scales): 0 for store in kept}
    for name, parameter in model.named_parameters():
        part = next(p for p, prefix, marks in PARTS if name.startswith(prefix) and any(mark in name for mark in marks))
        parts[part][0] += numbers.get(id(parameter), parameter.numel())
        parts[part][1] += parameter.numel() * parameter.requires_grad
    return {part: (every, trained) for part, (every, trained) in parts.items() if every}


def mesh_sizes(cfg: Config, machine: Machine) -> tuple[int, int]:
    """(ranks, ranks that a weight is sharded over)."""
    replicate, shard = cfg.parallel.dp_replicate, cfg.parallel.dp_shard
    ranks = replicate * shard if shard > 0 else max(replicate, machine.gpus - machine.gpus % replicate)
    return ranks, mesh_shape(cfg.parallel, ranks, machine.gpus_per_node)[2]


def make_plan(
    cfg: Config,
    machine: Machine,
    device_type: str = "cuda",
    base_alone: bool = False,
    drafter_alone: bool = False,
    targets: float = 1.0,
) -> Plan:
    """Estimate a run. Where ``activation_checkpointing`` says auto, it is the least that fits, as ``Plan.chosen`` says.

    Args:
        device_type: decides what ``precision.compute=auto`` and the loss's default budget are.
        base_alone: plan the plain fine-tuning of the base, without the drafter and with whole logits, to compare.
        drafter_alone: plan the steps after ``freeze.base_after``. The weights stay as they are kept for training.
        targets: share of the tokens that are supervised.

    Raises:
        ConfigError: as :func:`read`.
    """
    choices, plans = rungs(cfg.activation_checkpointing), {}

    def fits(rung: int) -> bool:
        plans[rung] = _plan(
            with_overrides(cfg, choices[rung]), machine, device_type, base_alone, drafter_alone, targets
        )
        return plans[rung].peak <= machine.usable

    def guess() -> int:
        first = plans[0]
        return likely(cfg.activation_checkpointing, (first.peak - machine.usable) / first.memory["activations"])

    rung = lowest(len(choices), fits, guess)
    if rung not in plans:
        fits(rung)
    return replace(plans[rung], chosen=choices[rung])


def _plan(
    cfg: Config, machine: Machine, device_type: str, base_alone: bool, drafter_alone: bool, targets: float
) -> Plan:
    base_config, drafter_config, sources = read(cfg)
    as_planned = {
        "parallel.compile": False,
        "model.use_liger_kernel": False,
        "loss.memory_budget_mb": memory_budget_mb(cfg.loss, device_type),
        "loss.compile": cfg.loss.compile and device_type == "cuda",
    }
    cfg = with_overrides(cfg, as_planned)
    compute = compute_dtype(cfg.precision, device_type)
    model = meta_pair(cfg, base_config, drafter_config, compute, device_type)
    ranks, shard = mesh_sizes(cfg, machine)
    whole = whole_parameters(model.base)
    wholes = {id(p) for p in whole}
    rounded = {id(p) for p in rounded_parameters(model.base)}  # sharded, unless they are whole
    step = simulate(model, cfg, shard, device_type, machine.flex_head_dim, base_alone, drafter_alone, targets)
    parameters = list((model.base if base_alone else model).parameters())
    trained = [p for p in parameters if p.requires_grad]
    dtype = DTYPES[cfg.precision.params]

    parts = [module for _, module in model.parts()] if cfg.optim.name == "muon" else []
    by_muon = {id(p) for module in parts for p in moved_by_muon(module)}

    def bytes_of_states(p: nn.Parameter, numel: int) -> int:
        name = "momentum" if id(p) in by_muon else cfg.optim.name
        return state_bytes(name, p.shape, numel, dtype)

    states = sum(bytes_of_states(p, local_numel(p.shape, shard)) for p in trained)
    average = 0
    if cfg.optim.drafter_ema and not base_alone:  # in float32
        average = 4 * sum(local_numel(p.shape, shard) for p in model.drafter.parameters() if p.requires_grad)
    reduce_bytes = DTYPES[cfg.precision.reduce].itemsize
    masters = [p for p in parameters if id(p) not in rounded]
    kept = [p for p in parameters if id(p) in rounded - wholes]
    offloaded = cfg.parallel.cpu_offload == "all"
    shards = local_bytes(masters, shard, cfg) + sum(local_numel(p.shape, shard) * p.dtype.itemsize for p in kept)
    gradients = local_bytes(trained, shard, cfg)
    memory = {
        "weights (this rank's shard)": 0 if offloaded else shards,
        "frozen towers": sum(p.nbytes for p in whole),
        "optimizer states": states if cfg.parallel.cpu_offload == "none" else 0,
        **({"average of the drafter": average if not offloaded else 0} if average else {}),
        **({"adapters": compute.itemsize * sum(a.numbers for a in served)} if (served := read_served(cfg)) else {}),
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
        step.work.pop(COPIES)
    late = 0
    if cfg.parallel.cpu_offload == "optimizer":  # to the update and back
        transfers, late = {way: size + states for way, size in transfers.items()}, 2 * states
    work = {part: Work() for part in step.work}
    for part, once in step.work.items():
        work[part].add(once, cfg.optim.grad_accum)
    if not offloaded:  # there the host updates
        # Gradients are read for their norm, scaled, and read with weights and moments, which are written.
        one_by_one = cfg.optim.name != "adamw" or cfg.parallel.cpu_offload == "optimizer"
        work["update"] = Work(
            bytes=4 * gradients + 2 * local_bytes(trained, shard, cfg) + 2 * states,
            launches=len(trained) * (8 if one_by_one else 1) // (1 if one_by_one else 8),
        )
    itemsize = DTYPES[cfg.precision.params].itemsize
    saved = [p for tensors in pair_tensors(model).values() for p in tensors.values() if isinstance(p, nn.Parameter)]
    sizes = [(p, p.dtype.itemsize if id(p) in rounded else itemsize) for p in saved]
    staged = states + average + sum(local_numel(p.shape, shard) * size for p, size in sizes)
    there = {"none": 0, "optimizer": states, "all": shards + states + gradients + average}[cfg.parallel.cpu_offload]
    host = {
        "parallel.cpu_offload": there,
        "inputs of what is recomputed": step.moved["to host", SAVED],
        "staging of background saves": staged if cfg.checkpoint.background else 0,
    }
    tokens = cfg.data.max_length * cfg.data.micro_batch_size * cfg.optim.grad_accum * ranks
    return Plan(
        parameters=count_parameters(model),
        memory=memory,
        flops=step.flops * cfg.optim.grad_accum,
        recomputed=step.recomputed * cfg.optim.grad_accum,
        tokens=tokens,
        ranks=ranks,
        checkpoint=sum(size * p.numel() for p, size in sizes)
        + sum(bytes_of_states(p, p.numel()) for p in trained)
        + (sum(4 * p.numel() for p in model.drafter.parameters()) if average else 0),
        sources=sources,
        work=work,
        communication=communication,
        mesh=(ranks // shard, shard),
        micro_batches=cfg.optim.grad_accum,
        padding=padding([p.shape for p in parameters if id(p) not in wholes], shard),
        host={what: size for what, size in host.items() if size},
        transfers=transfers,
        transfers_at_end=late,
        attention=kernels(model.base.config.get_text_config(), compute, "meta"),
    )
