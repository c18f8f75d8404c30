"""A training step on one GPU at released widths: time, memory, and what of it is the loss and attention.

    python -m benchmarks.gpu [--out DIR] [overrides]      # E2B and E4B, two groups of layers each
    python -m benchmarks.gpu --against nemo               # NeMo AutoModel's step beside it, if it is installed
    python -m benchmarks.gpu --device cpu --small         # the same code on tiny widths, in seconds; no numbers to keep

Ours is the step of a run: FSDP2 on one rank, packed rows (or one document, `--documents 1`), forward and backward with
what is recomputed, clipping and update. The reference is that of benchmarks.joint_step, where every logit exists:
weights in the dtype of compute, no masters, no update, nothing recomputed unless --reference-recompute. NeMo's is
its composite model with its masked cross-entropy on the same row and pair: transformers' layers as they are, recomputed
(as the published recipe has it), weights in the dtype of compute and torch's fused AdamW on them. S = 8192 is measured
packed alone. The tables are written anew after every row.

Times are medians after a warm-up. The loss takes its gradients in the forward, so its time is that of one call;
attention's is between its inputs and its output, forward, recomputed and backward. Both are measured in steps of
their own. Bounds are joint_train.plan's: FLOPs at the card's peak, and bytes at its bandwidth if no two operations were
fused (of attention the operands of a fused kernel are not all counted). The peak is what CUDA's allocator gave. What is
planned takes loss.memory_budget_mb at 1024, which is up to 4096 on a GPU with much free memory: set it to compare both.
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface

from benchmarks import results
from benchmarks.joint_step import reference_step
from joint_train.config import Config, load, with_overrides
from joint_train.distributed.mesh import init_distributed, init_mesh
from joint_train.distributed.parallelize import DTYPES, compute_dtype, look_up, parallelize, share_streams
from joint_train.files import replace
from joint_train.pair import fused
from joint_train.pair import model as pair_model
from joint_train.pair.targets import joint_targets
from joint_train.plan import step as plan_step
from joint_train.plan.meter import Meter
from joint_train.plan.planner import GIB, Machine, Plan, make_plan, read
from joint_train.train.optim import build_optimizer, update
from joint_train.train.pace import TFLOPS, utilisation
from joint_train.weights.composite import Gemma4WithDrafter, meta_pair
from joint_train.weights.loading import _fill_computed_buffers, build_meta
from joint_train.weights.released import released_config

HBM = {"B200": 8000.0, "H200": 4800.0, "H100": 3350.0, "A100": 2039.0}  # GB/s, by the vendor's data sheets
TINY = dict(
    vocab_size=512, intermediate_size=96, num_attention_heads=4, head_dim=16, global_head_dim=32, sliding_window=16
)  # fmt: skip
TINY_BASE = TINY | dict(hidden_size=64, vocab_size_per_layer_input=512, hidden_size_per_layer_input=8)
TINY_DRAFTER = TINY | dict(hidden_size=32)


# The pair


def write_configs(name: str, folder: Path, groups: int = 2, small: bool = False) -> None:
    """The configurations of a released pair with fewer layers and no towers, as ``folder``/base and ``folder``/drafter.

    Args:
        name: E2B or E4B.
        groups: of sliding layers and a full one; of two or more, half share keys and values.
        small: tiny widths and vocabulary.
    """
    names = f"google/gemma-4-{name}-it", f"google/gemma-4-{name}-it-assistant"
    kinds = released_config(names[0]).get_text_config().layer_types
    group = kinds[: kinds.index("full_attention") + 1]
    layers = dict(layer_types=group * groups, num_hidden_layers=len(group) * groups)
    layers["num_kv_shared_layers"] = len(group) * (groups // 2)
    base = released_config(names[0], layers | (TINY_BASE if small else {}))
    base.vision_config = base.audio_config = None
    drafter = released_config(names[1], TINY_DRAFTER if small else None)
    if small:
        drafter.backbone_hidden_size = TINY_BASE["hidden_size"]
        drafter.num_centroids, drafter.centroid_intermediate_top_k = 16, 4
    for part, config in (("base", base), ("drafter", drafter)):
        config.save_pretrained(folder / part)


def configure(folder: Path, length: int, *overrides: str) -> Config:
    """A run of that pair on one rank, with a row of ``length`` in a micro-batch."""
    settings = [f"model.base={folder}/base", f"model.drafter={folder}/drafter", "data.train=[{path: unused}]"]
    settings += [
        f"data.max_length={length}",
        "data.micro_batch_size=1",
        "loss.drafter=kl",
    ]  # the reference knows kl and ce
    return load([*settings, *overrides], 1)


@torch.no_grad()
def fill(model: Gemma4WithDrafter, device: torch.device) -> Gemma4WithDrafter:
    """Random weights for a pair on the meta device."""
    torch.manual_seed(0)
    for _, part in model.parts():
        part.to_empty(device=device)
        part.tie_weights(recompute_mapping=False)
        for parameter in part.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.normal_(std=0.02) if parameter.ndim > 1 else local.fill_(1)
        saved = {id(tensor) for tensor in part.state_dict(keep_vars=True).values()}
        for name, buffer in part.named_buffers():
            if id(buffer) in saved:
                buffer.copy_(torch.arange(len(buffer))) if name.endswith("token_ordering") else buffer.fill_(1)
        _fill_computed_buffers(part)
    return model.train()


def build(cfg: Config, device: torch.device, mesh: DeviceMesh | None) -> Gemma4WithDrafter:
    """The pair of :func:`configure` with random weights: sharded as in a run, or whole without a mesh."""
    model = meta_pair(cfg, *read(cfg)[:2], DTYPES[cfg.precision.params], device.type)
    if mesh is not None:
        parallelize(model, mesh, cfg)
    fill(model, device)
    if mesh is not None:
        share_streams(model)
    return model


class OurStep:
    """The step of a run on one micro-batch: :meth:`forward_backward`, then :meth:`update`."""

    def __init__(self, cfg: Config, device: torch.device, mesh: DeviceMesh, documents: int = 1):
        self.cfg, self.model = cfg, build(cfg, device, mesh)
        self.optimizer = build_optimizer(self.model, cfg.optim)
        self.ids, self.documents, self.positions = rows(cfg, documents)
        found = self.documents if documents > 1 else None
        targets = joint_targets(self.ids, found, cfg.drafter.num_steps, cfg.drafter.pairing, cfg.drafter.prompt_rows)
        self.weights = self.model.loss_weights(targets.counts.to(device))
        self.inputs = {"input_ids": self.ids, "position_ids": self.positions}
        self.inputs |= {} if found is None else {"document_ids": found}
        self.inputs = {name: x.to(device) for name, x in self.inputs.items()}
        self.inputs |= look_up(self.model, self.ids, device)
        self.targets = targets.to(device)

    def forward_backward(self) -> Tensor:
        self.optimizer.zero_grad()
        out = self.model(**self.inputs, targets=self.targets, weights=self.weights)
        out.loss.backward()
        return out.loss.detach()

    def update(self) -> None:
        optim = self.cfg.optim
        update(self.optimizer, self.model, optim.max_grad_norm, 1.0, optim.drafter_max_grad_norm)


def rows(cfg: Config, documents: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random ids, documents of equal lengths and positions, ``[1, S]`` each; every token is supervised."""
    length, vocabulary = cfg.data.max_length, read(cfg)[0].get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    size = -(-length // documents)
    row = torch.arange(length)
    return ids, (1 + row // size)[None], (row % size)[None]


# What is measured


Clock = Callable[[], object]


class _Mark(torch.autograd.Function):
    """The same tensors; something is done when all their gradients are there."""

    @staticmethod
    def forward(ctx, action, *tensors):
        ctx.action = action
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        ctx.action()
        return None, *gradients


@contextlib.contextmanager
def parts(clock: Clock) -> Iterator[dict[str, list[tuple]]]:
    """Start and end of each call of the loss and of attention in the block, as the clock says; also backward."""
    spans: dict[str, list[tuple]] = {"loss": [], "attention": []}
    joint_loss, get_interface = pair_model.joint_loss, AttentionInterface.get_interface

    def loss(*args, **kwargs):
        start = clock()
        out = joint_loss(*args, **kwargs)
        spans["loss"].append((start, clock()))
        return out

    def attend(function, module, query, key, value, *args, **kwargs):
        begun: list = []
        query, key, value = _Mark.apply(
            lambda: spans["attention"].append((begun.pop(), clock())), query, key, value
        )  # its backward is the end of attention's
        start = clock()
        out, weights = function(module, query, key, value, *args, **kwargs)
        spans["attention"].append((start, clock()))
        (out,) = _Mark.apply(lambda: begun.append(clock()), out)
        return out, weights

    def marked(self, *args):
        return partial(attend, get_interface(self, *args))

    with (
        mock.patch.object(pair_model, "joint_loss", loss),
        mock.patch.object(AttentionInterface, "get_interface", marked),
    ):
        yield spans


def event() -> torch.cuda.Event:
    now = torch.cuda.Event(enable_timing=True)
    now.record()
    return now


def clock_of(device: torch.device) -> tuple[Clock, Callable[[object, object], float]]:
    """A clock, and what turns two of its times into milliseconds once the device is done."""
    if device.type == "cuda":
        return event, lambda start, end: start.elapsed_time(end)
    return time.perf_counter, lambda start, end: (end - start) * 1000


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(functions: list[Callable[[], object]], device: torch.device, options) -> list[float]:
    """Median time of each function, called one after the other, again and again."""
    clock, between = clock_of(device)
    times = []
    for turn in range(options.warmup + options.steps):
        if turn == options.warmup:
            wait(device)
        marks = [clock()]
        for function in functions:
            function()
            marks.append(clock())
        times.append(marks)
    wait(device)
    kept = [[between(a, b) for a, b in zip(marks, marks[1:], strict=False)] for marks in times[options.warmup :]]
    return [statistics.median(column) for column in zip(*kept, strict=True)]


def shares(step: OurStep, device: torch.device, options) -> dict[str, float]:
    """Milliseconds of a step's loss and attention: the median over steps."""
    clock, between = clock_of(device)
    found: dict[str, list[float]] = {"loss": [], "attention": []}
    for _ in range(options.steps):
        with parts(clock) as spans:
            step.forward_backward()
        wait(device)
        for part, pairs in spans.items():
            found[part].append(sum(between(*pair) for pair in pairs))
    return {part: statistics.median(times) for part, times in found.items()}


def planned(cfg: Config, device: torch.device) -> tuple[Plan, dict[str, tuple[int, int]]]:
    """The plan of the step on one rank, and (FLOPs, bytes) of its loss and of its attention."""
    meters: list[Meter] = []

    class Kept(Meter):
        def __init__(self) -> None:
            super().__init__()
            meters.append(self)

    def clock() -> tuple[int, int]:
        return meters[-1].flops, meters[-1].traffic

    with mock.patch.object(plan_step, "Meter", Kept), parts(clock) as spans:
        plan = make_plan(cfg, Machine(gpus=1), device.type)
    return plan, {
        part: (sum(b[0] - a[0] for a, b in pairs), sum(b[1] - a[1] for a, b in pairs)) for part, pairs in spans.items()
    }


def start_of_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> float | None:
    """Most bytes that were allocated since :func:`start_of_peak`; None on CPU."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_ours(cfg: Config, device: torch.device, mesh: DeviceMesh, documents: int, options) -> dict:
    start_of_peak(device)
    step = OurStep(cfg, device, mesh, documents)
    both, updated = milliseconds([step.forward_backward, step.update], device, options)
    found = {"ms": both, "update": updated, "peak": peak(device)}
    return found if cfg.parallel.compile else found | shares(step, device, options)  # no marks in compiled layers


def measure_reference(cfg: Config, device: torch.device, options) -> dict:
    """The reference on the same row; nothing but ``error`` where memory is too small for it."""
    compute = "bfloat16" if compute_dtype(cfg.precision, device.type) == torch.bfloat16 else "float32"
    plain = {f"activation_checkpointing.{part}": "none" for part in ("base", "drafter")}
    plain |= {"precision.params": compute, "model.attn_implementation": "sdpa"}
    ids = rows(cfg, 1)[0].to(device)
    chosen = Namespace(rounds=cfg.drafter.num_steps, freeze_base=False)
    chosen.loss = "ce" if cfg.loss.drafter == "ce" else "kl"
    chosen.reference_recompute = options.reference_recompute
    start_of_peak(device)
    try:
        pair = build(with_overrides(cfg, plain), device, None)
        step = reference_step(pair.base, pair.drafter, chosen)

        def forward_backward() -> None:
            pair.zero_grad()
            step(ids, ids)

        (found,) = milliseconds([forward_backward], device, options)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    return {"ms": found, "peak": peak(device)}


def measure_nemo(cfg: Config, device: torch.device, options) -> dict:
    """The published recipe's step on the same row; nothing but ``error`` where memory is too small for it."""
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
    from nemo_automodel.components.models.gemma4_drafter.composite import Gemma4WithDrafter as Composite

    ids, rounds = rows(cfg, 1)[0].to(device), cfg.drafter.num_steps
    compute = compute_dtype(cfg.precision, device.type)
    # Labels are shifted, as its collate functions do: position t has the token after it.
    labels = [torch.cat([ids[:, 1 + k :], ids.new_full((1, 1 + k), -100)], 1) for k in range(rounds)]
    start_of_peak(device)
    try:
        base, drafter = (build_meta(config, compute, "sdpa") for config in read(cfg)[:2])
        base.config.get_text_config().use_cache = True  # as its recipe says
        pair = fill(Gemma4WithDrafter(base, drafter, drafter_num_steps=rounds), device)
        model = Composite(pair.base, pair.drafter, drafter_num_steps=rounds, base_activation_checkpointing=True).train()
        loss = MaskedCrossEntropy()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

        def forward_backward() -> None:
            optimizer.zero_grad()
            out = model(input_ids=ids, position_ids=torch.arange(ids.shape[1], device=device)[None])
            total = loss(out.logits, labels[0], num_label_tokens=ids.shape[1] - 1)
            drafted = [
                loss(x, y, num_label_tokens=ids.shape[1] - 1) for x, y in zip(out.drafter_logits, labels, strict=True)
            ]
            (total + out.drafter_loss_weight * sum(drafted)).backward()

        with fused.written_out():
            both, updated = milliseconds([forward_backward, optimizer.step], device, options)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    return {"ms": both, "update": updated, "peak": peak(device)}


# Tables


def card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def machine_of(device: torch.device, options) -> Machine | None:
    """The card's peak and bandwidth, all of them reached; None for one that is not known."""
    known = {name: (TFLOPS[name], HBM[name]) for name in HBM if name in card(device)}
    tflops, hbm = next(iter(known.values()), (None, None))
    tflops, hbm = options.tflops or tflops, options.hbm_gb_per_second or hbm
    if tflops is None or hbm is None:
        return None
    return Machine(gpus=1, tflops=tflops, hbm_gb_per_second=hbm, utilisation=1.0)


def number(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


# Of gpu.json, which benchmarks.compare reads: a row for each step that ran to its end.
COLUMNS = {
    "pair": ("pair", ""),
    "layers": ("layers", ""),
    "length": ("S", ""),
    "documents": ("documents", ""),
    "step": ("", ""),
    "ms": ("forward, backward ms", ".1f"),
    "update": ("update ms", ".1f"),
    "loss": ("loss ms", ".2f"),
    "attention": ("attention ms", ".2f"),
    "peak": ("peak", ".2f GiB"),
    "planned": ("planned", ".2f GiB"),
    "mfu": ("MFU", ".1%"),
}
STEP = ["pair", "layers", "S", "documents", "", "forward, backward ms", "update ms", "tokens/s", "MFU", "peak GiB"]
STEP += ["planned GiB", "loss", "attention", "compute bound ms", "memory bound ms"]
PART = ["pair", "S", "documents", "part", "ms", "compute bound ms", "memory bound ms"]


def report(found: list[dict]) -> str:
    """Two tables in Markdown: of steps, and of their parts."""
    steps, of_parts = [line(STEP), "|" + " --- |" * len(STEP)], [line(PART), "|" + " --- |" * len(PART)]
    for one in found:
        name = [one["pair"], str(one["layers"]), str(one["length"]), str(one["documents"])]
        ours, bounds = one["ours"], one["bounds"]
        whole = ours["ms"] + ours["update"]
        part = [number(ours.get(which) and ours[which] / whole, ".0%") for which in ("loss", "attention")]
        bound = [number(bounds.get("step", {}).get(which)) for which in ("compute", "memory")]
        cells = [number(ours["ms"]), number(ours["update"]), number(1000 * one["length"] / whole, ",.0f")]
        cells += [number(one["mfu"], ".1%"), number(ours["peak"], ".2f"), number(one["planned"], ".2f")]
        steps.append(line([*name, "ours", *cells, *part, *bound]))
        for other, title in (("reference", "reference"), ("nemo", "NeMo AutoModel")):
            if not (theirs := one.get(other)):
                continue
            if "error" in theirs:
                cells = [theirs["error"]] + [""] * 9
            else:
                update_ms = theirs.get("update")
                speed = 1000 * one["length"] / (theirs["ms"] + (update_ms or 0))
                cells = [number(theirs["ms"]), number(update_ms), number(speed, ",.0f"), ""]
                cells += [number(theirs["peak"], ".2f")] + [""] * 5
            steps.append(line([*name, title, *cells]))
        for which in ("loss", "attention"):
            if which in ours:
                bound = [number(bounds.get(which, {}).get(kind), ".2f") for kind in ("compute", "memory")]
                of_parts.append(line([name[0], *name[2:], which, number(ours[which], ".2f"), *bound]))
    return "\n".join([*steps, "", *of_parts])


def heading(device: torch.device, cfg: Config, options) -> str:
    cuda = f", CUDA {torch.version.cuda}" if device.type == "cuda" else ""
    about = f"{card(device)}; torch {torch.__version__}{cuda}, transformers {transformers.__version__}"
    dtype = str(compute_dtype(cfg.precision, device.type)).removeprefix("torch.")
    about += f"; {dtype}, K = {cfg.drafter.num_steps}, loss.drafter={cfg.loss.drafter}"
    about += f"; medians of {options.steps} steps after {options.warmup}"
    return about + ("; tiny widths: no numbers to keep" if options.small else "")


def bounds_of(plan: Plan, of_parts: dict[str, tuple[int, int]], machine: Machine | None) -> dict:
    """Milliseconds that arithmetic and memory take at the card's peak."""
    if machine is None:
        return {}
    step = {"compute": plan.compute_seconds(machine) * 1000, "memory": plan.memory_seconds(machine) * 1000}
    peaks = {"compute": machine.tflops * 1e9, "memory": machine.hbm_gb_per_second * 1e6}
    parts = {
        part: {kind: work / peak for work, (kind, peak) in zip(both, peaks.items(), strict=True)}
        for part, both in of_parts.items()
    }
    return {"step": step, **parts}


def measure(name: str, folder: Path, length: int, documents: int, mesh: DeviceMesh, device, options) -> dict:
    cfg = configure(folder, length, f"data.packing={str(documents > 1).lower()}", *options.overrides)
    plan, of_parts = planned(cfg, device)
    ours = measure_ours(cfg, device, mesh, documents, options)
    free()
    seconds, machine = (ours["ms"] + ours["update"]) / 1000, machine_of(device, options)
    speed = utilisation(plan.flops / seconds, plan.recomputed / seconds, device).get("mfu")
    if speed is None and machine is not None:
        speed = (plan.flops - plan.recomputed) / seconds / 1e12 / machine.tflops
    layers = read(cfg)[0].get_text_config().num_hidden_layers
    found = {"pair": name, "layers": layers, "length": length, "documents": documents, "ours": ours, "mfu": speed}
    found |= {"planned": plan.peak / GIB, "bounds": bounds_of(plan, of_parts, machine)}
    if documents == 1 and not options.skip_reference:
        found["reference"] = measure_reference(cfg, device, options)
        free()
    if documents == 1 and options.against == "nemo":
        found["nemo"] = measure_nemo(cfg, device, options)
        free()
    return found


def of_steps(found: list[dict]) -> list[dict[str, results.Value]]:
    """A row for each step that ran to its end."""
    steps: list[dict[str, results.Value]] = []
    for one in found:
        name = {name: str(one[name]) for name in ("pair", "layers", "length", "documents")}
        for step in ("ours", "reference", "nemo"):
            if "ms" in (numbers := one.get(step) or {}):
                own = {"planned": one["planned"], "mfu": one["mfu"]} if step == "ours" else {}
                measured = {name: numbers.get(name) for name in ("ms", "update", "loss", "attention", "peak")}
                steps.append({**name, "step": step, **measured, **own})
    return steps


def write(options, text: str, found: list[dict]) -> None:
    """The tables and what they are made of, in place of those before."""
    if options.out:
        replace(options.out / "gpu.md", text + "\n")
        result = results.record("gpu", COLUMNS, of_steps(found), measured=found)
        replace(options.out / "gpu.json", json.dumps(result, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for python -m joint_train, e.g. loss.drafter=kl")
    parser.add_argument("--pairs", nargs="+", default=["E2B", "E4B"], choices=["E2B", "E4B"])
    parser.add_argument("--groups", type=int, default=2, help="groups of sliding layers and a full one: 5 and 6 layers")
    parser.add_argument("--lengths", type=int, nargs="+", help="S; by default 8192 (packed alone), 2048 and 512, or 48")
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 4], help="in a row, packed if more than 1")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny widths, to see that it runs")
    parser.add_argument("--steps", type=int, help="measured; by default 10, or 2 with --small")
    parser.add_argument("--warmup", type=int, help="steps before; by default 3, or 1 with --small")
    parser.add_argument("--against", choices=["nemo"], help="measure nemo-automodel's step as well")
    parser.add_argument("--skip-reference", action="store_true")
    parser.add_argument("--reference-recompute", action="store_true", help="activation checkpointing there too")
    parser.add_argument("--tflops", type=float, help="the card's peak in bfloat16, where it is not known")
    parser.add_argument("--hbm-gb-per-second", type=float, help="of its memory, where it is not known")
    parser.add_argument("--out", type=Path, help="folder for gpu.md and gpu.json")
    options = parser.parse_intermixed_args(argv)
    options.steps = options.steps or (2 if options.small else 10)
    options.warmup = (1 if options.small else 3) if options.warmup is None else options.warmup
    lengths = options.lengths or ([48] if options.small else [8192, 2048, 512])
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no GPU. --device cpu --small shows that it runs.", file=sys.stderr)
        return 2
    if options.device == "cpu" and torch.cuda.is_available():
        print("benchmarks.gpu: --device cpu on a machine with a GPU needs CUDA_VISIBLE_DEVICES=''.", file=sys.stderr)
        return 2

    if options.against == "nemo" and find_spec("nemo_automodel") is None:
        print("benchmarks.gpu: --against nemo needs its package: pip install nemo-automodel", file=sys.stderr)
        return 2
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)

    device, found = init_distributed(600), []
    try:
        with tempfile.TemporaryDirectory() as temporary:
            for name in options.pairs:
                folder = Path(temporary) / name
                write_configs(name, folder, options.groups, options.small)
                cfg = configure(folder, lengths[0], *options.overrides)
                mesh = init_mesh(cfg.parallel)
                for length in lengths:
                    for documents in options.documents:
                        if length == 8192 and documents == 1 and not options.lengths:
                            continue  # its reference doesn't fit, and a run packs
                        found.append(measure(name, folder, length, documents, mesh, device, options))
                        text = f"{heading(device, cfg, options)}\n\n{report(found)}"
                        write(options, text, found)
                        print(f"measured: {name}, S = {length}, documents {documents}", file=sys.stderr, flush=True)
                        print(report(found[-1:]), file=sys.stderr, flush=True)
    finally:
        dist.destroy_process_group()
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
