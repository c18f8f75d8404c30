"""``python -m joint_train.plan [overrides]``: print a plan."""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from joint_train import config
from joint_train.command import TOO_LARGE, start
from joint_train.config.values import mesh_sentence
from joint_train.plan.planner import GIB, Machine, Plan, longest, make_plan, savings
from joint_train.plan.suggest import suggest


def report(cfg: config.Config, machine: Machine, plan: Plan, console: Console) -> None:
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
    otherwise = make_plan(config.with_overrides(cfg, {"activation_checkpointing.base": other}), machine)
    memory.add_row(f"peak with activation_checkpointing.base={other}", f"{otherwise.peak / GIB:.2f}", style="dim")

    seconds = plan.seconds(machine)
    step = Table(title="Step", title_justify="left", show_header=False)
    for what, value in {
        "ranks": mesh_sentence(cfg.parallel, plan.ranks, machine.gpus_per_node),
        "tokens of a step": f"{plan.tokens:,} (S = {cfg.data.max_length}, K = {cfg.drafter.num_steps})",
        "attention": plan.attention,
        "FLOPs of a token": f"{plan.flops_per_token:.3e} (recomputation included)",
        "FLOPs of a step": f"{plan.flops * plan.ranks:.3e}",
        "compute": f"{plan.compute_seconds(machine):.2f} s at {machine.utilisation:.0%} of {machine.tflops:g} TFLOP/s",
        "memory": f"{plan.memory_seconds(machine):.2f} s for {plan.traffic / GIB:,.0f} GiB at "
        f"{machine.hbm_gb_per_second:g} GB/s, if no two operations are fused",
        **{
            kind: f"{taken:.2f} s for {sum(plan.communication[kind].values()) / GIB:,.1f} GiB"
            for kind, taken in plan.network_seconds(machine).items()
            if plan.communication[kind]
        },
        **(
            {
                "to and from the host": f"{plan.transfer_seconds(machine):.2f} s for "
                f"{sum(plan.transfers.values()) / GIB:,.1f} GiB at {machine.pcie_gb_per_second:g} GB/s"
                + ("" if plan.transfers_at_end else "; the update on the CPU, not counted here, comes on top"),
                "host memory": f"{plan.host / GIB:,.1f} GiB of a rank, "
                f"{plan.host * min(plan.ranks, machine.gpus_per_node) / GIB:,.1f} of a node",
            }
            if plan.host
            else {}
        ),
        "exposed": f"{plan.exposed_seconds(machine):.2f} s of the communication that no computation hides",
        "time of a step": f"{seconds:.2f} s, bound by {plan.bound(machine)}",
        "tokens a second": f"{plan.tokens / seconds:,.0f}",
        "checkpoint": f"{plan.checkpoint / GIB:.1f} GiB, {plan.checkpoint / machine.disk_gb_per_second / 1e9:.0f} s at "
        f"{machine.disk_gb_per_second:g} GB/s",
    }.items():
        step.add_row(what, value)
    for table in (parts, memory, step):
        console.print(table)
    if plan.padding > 0.01:
        console.print(f"Equal shards add {plan.padding:.0%} to the weights: fewer shards divide them better.")
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
    """Returns an exit code, see :data:`joint_train.command.EXIT_CODES`."""
    machine = Machine()
    parser = argparse.ArgumentParser(prog="python -m joint_train.plan", description="Say what a run would need.")
    parser.add_argument("overrides", nargs="*", help="as for python -m joint_train, e.g. model=gemma4_31b")
    parser.add_argument("--gpus", type=int, default=machine.gpus, help="where parallel.dp_shard is -1")
    parser.add_argument("--gpu-memory-gb", type=float, default=machine.gpu_memory_gb)
    parser.add_argument("--reserve", type=float, default=machine.reserve, help="share of it that a run can't use")
    parser.add_argument("--tflops", type=float, default=machine.tflops, help="of a GPU")
    parser.add_argument("--utilisation", type=float, default=machine.utilisation, help="share of them that is reached")
    parser.add_argument("--hbm-gb-per-second", type=float, default=machine.hbm_gb_per_second, help="of a GPU's memory")
    parser.add_argument("--gpus-per-node", type=int, default=machine.gpus_per_node)
    parser.add_argument("--nvlink-gb-per-second", type=float, default=machine.nvlink_gb_per_second, help="of a GPU")
    parser.add_argument("--network-gb-per-second", type=float, default=machine.network_gb_per_second, help="of a GPU")
    parser.add_argument("--pcie-gb-per-second", type=float, default=machine.pcie_gb_per_second, help="of a GPU")
    parser.add_argument("--disk-gb-per-second", type=float, default=machine.disk_gb_per_second, help="of all ranks")
    parser.add_argument("--suggest", action="store_true", help="print the cheapest settings that fit, best first")
    args = vars(parser.parse_intermixed_args(argv))
    overrides, suggesting = args.pop("overrides"), args.pop("suggest")

    def run() -> int:
        cfg = config.load(["data.train=[{path: unused}]", *overrides])
        machine = Machine(**args)
        if suggesting:
            found = suggest(cfg, machine)
            for number, one in enumerate(found, 1):
                size, time = one.plan.peak / GIB, one.plan.seconds(machine)
                tokens = one.plan.tokens / time
                print(f"{number}. {size:.2f} GiB, {tokens:,.0f} tokens a second: {one}")
            if not found:
                print("Nothing that is known here fits: use more GPUs or a smaller pair.")
            return 0 if found else TOO_LARGE
        plan = make_plan(cfg, machine)
        report(cfg, machine, plan, Console())
        return 0 if plan.peak <= machine.usable else TOO_LARGE

    return start("joint_train.plan", run)


if __name__ == "__main__":
    sys.exit(main())
