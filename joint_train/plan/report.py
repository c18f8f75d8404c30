"""A plan as tables and sentences."""

from typing import Any

from rich.console import Console
from rich.table import Table

from joint_train import config
from joint_train.config.values import mesh_sentence, run_length
from joint_train.plan.fits import longest, savings
from joint_train.plan.planner import GIB, Machine, Plan
from joint_train.plan.stages import joint_share, steps_before_frozen


def in_numbers(plan: Plan, machine: Machine) -> dict[str, Any]:
    """A plan for other programs: bytes, seconds and FLOPs of a step on a rank, tokens of a step on all ranks."""
    return {
        "fits": plan.peak <= machine.usable,
        "peak_bytes": plan.peak,
        "usable_bytes": int(machine.usable),
        "memory_bytes": plan.memory,
        "host_bytes": plan.host,
        "parameters": {part: {"all": every, "trained": trained} for part, (every, trained) in plan.parameters.items()},
        "ranks": plan.ranks,
        "tokens": plan.tokens,
        "seconds": plan.seconds(machine),
        "seconds_of_parts": {part: time.seconds for part, time in plan.times(machine).items()},
        "exposed_communication_seconds": plan.exposed_seconds(machine),
        "flops": plan.flops,
        "mfu": plan.mfu(machine),
        "checkpoint_bytes": plan.checkpoint,
        "chosen": plan.chosen,
    }


def report(cfg: config.Config, machine: Machine, plan: Plan, console: Console, alone: Plan | None = None) -> None:
    """Print a plan.

    Args:
        alone: of the steps after ``freeze.base_after``.
    """
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
    for what, size in plan.host.items():
        memory.add_row(f"of the host: {what}", f"{size / GIB:.2f}")
    if plan.host:
        node = sum(plan.host.values()) * min(plan.ranks, machine.gpus_per_node)
        memory.add_row("of the host, all ranks of a node", f"{node / GIB:.2f}")

    times = Table(title="Time of a step, seconds", title_justify="left")
    for column in ("part", "arithmetic", "memory", "takes", "share", "kernels"):
        times.add_column(column, justify="left" if column == "part" else "right")
    seconds, exposed = plan.seconds(machine), plan.exposed_seconds(machine)
    for part, time in plan.times(machine).items():
        numbers = (f"{x:.3f}" for x in (time.compute, time.memory, time.seconds))
        times.add_row(part, *numbers, f"{time.seconds / seconds:.0%}", f"{time.launches:,}")
    network = plan.network_seconds(machine) | {"host and back": plan.transfer_seconds(machine)}
    times.add_row("communication that isn't hidden", "", "", f"{exposed:.3f}", f"{exposed / seconds:.0%}", "")
    for what, taken in network.items():
        if taken:
            times.add_row(f"  of {what}", "", "", f"({taken:.3f})", "", "", style="dim")
    host = plan.host_seconds(machine)
    times.add_row("launches, by the host meanwhile", "", "", f"({host:.3f})", "", f"{plan.launches:,}", style="dim")
    times.add_row("step", "", "", f"{seconds:.3f}", "", "", style="bold")

    share = joint_share(cfg, machine, joint=plan) if cfg.freeze.base_after == "auto" else cfg.freeze.base_after
    settings = plan.chosen or {
        f"activation_checkpointing.{part}": getattr(cfg.activation_checkpointing, part) for part in ("base", "drafter")
    }
    step = Table(title="Step", title_justify="left", show_header=False)
    for what, value in {
        "ranks": mesh_sentence(cfg.parallel, plan.ranks, machine.gpus_per_node),
        "tokens of a step": f"{plan.tokens:,} (S = {cfg.data.max_length}, K = {cfg.drafter.num_steps})",
        "attention": plan.attention,
        "recomputed": f"{format_overrides(settings)}{' (chosen by auto)' if plan.chosen else ''}: "
        f"{plan.recomputed / plan.flops:.0%} of all FLOPs",
        "FLOPs of a token": f"{plan.flops_per_token:.3e} (recomputation included)",
        "FLOPs of a step": f"{plan.flops * plan.ranks:.3e}",
        "moved by collectives": ", ".join(
            f"{kind} {sum(units.values()) / GIB:,.1f} GiB" for kind, units in plan.communication.items() if units
        )
        or "nothing",
        **(
            {
                "to and from the host": f"{sum(plan.transfers.values()) / GIB:,.1f} GiB at "
                f"{machine.pcie_gb_per_second:g} GB/s"
                + (
                    "; the update on the CPU, not counted here, comes on top"
                    if cfg.parallel.cpu_offload == "all"
                    else ""
                )
            }
            if sum(plan.transfers.values())
            else {}
        ),
        "time of a step": f"{seconds:.2f} s; the largest part: {plan.bound(machine)}",
        "tokens a second": f"{plan.tokens / seconds:,.0f} ({plan.tokens / seconds / plan.ranks:,.0f} a GPU), "
        f"MFU {plan.mfu(machine):.0%}",
        **({"once the base is frozen": alone_sentence(cfg, machine, plan, alone, share)} if alone else {}),
        "length of the run": length_sentence(cfg, machine, plan, alone, share),
        "checkpoint": f"{plan.checkpoint / GIB:.1f} GiB, {plan.checkpoint / machine.disk_gb_per_second / 1e9:.0f} s at "
        f"{machine.disk_gb_per_second:g} GB/s",
    }.items():
        step.add_row(what, value)
    for table in (parts, memory, times, step):
        console.print(table)
    if plan.padding > 0.01:
        console.print(f"Equal shards add {plan.padding:.0%} to the weights: fewer shards divide them better.")
    for source in plan.sources:
        console.print(f"sizes: {source}", style="dim", highlight=False)

    length = longest(cfg, machine, plan)
    if plan.peak <= machine.usable:
        about = " with everything recomputed" if plan.chosen else ""
        console.print(f"It fits. The longest rows that fit{about}: data.max_length={length}", style="bold")
        return
    console.print(f"It does not fit: {(plan.peak - machine.usable) / GIB:.2f} GiB too much.", style="bold red")
    peaks = savings(cfg, machine)
    if length:
        peaks[f"data.max_length={length}"] = int(machine.usable)
    for change, peak in peaks.items():
        console.print(f"  {change}: {peak / GIB:.2f} GiB{', fits' if peak <= machine.usable else ''}", highlight=False)
    first = next((change for change, peak in peaks.items() if peak <= machine.usable), None)
    console.print(
        f"Change first: {first or min(peaks, key=lambda change: peaks[change]) + ' (not enough alone)'}",
        style="bold",
        highlight=False,
    )


def alone_sentence(cfg: config.Config, machine: Machine, plan: Plan, alone: Plan, after: float) -> str:
    """When the base is frozen, and what a step takes from there on.

    Args:
        after: ``freeze.base_after`` as a number.
    """
    steps, _ = run_length(cfg)
    if steps is None and not isinstance(after, int):
        when = f"after {after:.0%} of the steps"
    else:
        when = f"after step {after if steps is None else steps_before_frozen(after, steps):,}"
    return (
        f"{when} (freeze.base_after={cfg.freeze.base_after}): {alone.seconds(machine):.2f} s a step, "
        f"{alone.flops / plan.flops:.0%} of the FLOPs, a peak of {alone.peak / GIB:.2f} GiB"
    )


def length_sentence(cfg: config.Config, machine: Machine, plan: Plan, alone: Plan | None, after: float | None) -> str:
    """What is known of a run's length before its data are tokenised."""
    steps, epochs = run_length(cfg)
    rows = plan.ranks * cfg.data.micro_batch_size * cfg.optim.grad_accum
    if steps is None:
        return f"epochs={epochs:g}, {rows:,} rows a step; the steps are counted when the data are tokenised"
    joint = steps_before_frozen(after, steps)
    seconds = joint * plan.seconds(machine) + (steps - joint) * (alone.seconds(machine) if alone else 0.0)
    hours = f"{seconds / 3600:,.1f} h without validation and saves"
    return f"max_steps={steps:,} x {rows:,} rows = {steps * rows:,} rows, {hours}; the log's first lines say the epochs"


def format_overrides(settings: dict[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())
