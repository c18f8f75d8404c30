"""``python -m joint_train.plan [overrides]``: print a plan."""

import gc
import json
import sys

from joint_train import config
from joint_train.command import TOO_LARGE, Parser, above_zero, from_zero, not_negative, positive, share, start
from joint_train.plan.machine import Machine
from joint_train.progress import counted


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code, see :data:`joint_train.command.EXIT_CODES`."""
    machine = Machine()
    parser = Parser(prog="python -m joint_train.plan", description="Say what a run would need.")
    parser.add_argument("overrides", nargs="*", help="as for python -m joint_train, e.g. model=gemma4_31b")
    parser.add_argument("--gpus", type=positive, default=machine.gpus, help="where parallel.dp_shard is -1")
    parser.add_argument("--gpu-memory-gb", type=above_zero, default=machine.gpu_memory_gb)
    parser.add_argument("--reserve", type=share, default=machine.reserve, help="share of it that a run can't use")
    parser.add_argument("--tflops", type=above_zero, default=machine.tflops, help="of a GPU")
    parser.add_argument(
        "--utilisation", type=above_zero, default=machine.utilisation, help="share of them that matrix products reach"
    )
    parser.add_argument(
        "--flex-head-dim", type=from_zero, default=machine.flex_head_dim, help="largest that FlexAttention runs"
    )
    parser.add_argument("--launch-us", type=not_negative, default=machine.launch_us, help="of the host for each kernel")
    parser.add_argument(
        "--hbm-gb-per-second", type=above_zero, default=machine.hbm_gb_per_second, help="of a GPU's memory"
    )
    parser.add_argument("--gpus-per-node", type=positive, default=machine.gpus_per_node)
    parser.add_argument(
        "--nvlink-gb-per-second", type=above_zero, default=machine.nvlink_gb_per_second, help="of a GPU"
    )
    parser.add_argument(
        "--network-gb-per-second", type=above_zero, default=machine.network_gb_per_second, help="of a GPU"
    )
    parser.add_argument("--pcie-gb-per-second", type=above_zero, default=machine.pcie_gb_per_second, help="of a GPU")
    parser.add_argument(
        "--disk-gb-per-second", type=above_zero, default=machine.disk_gb_per_second, help="of all ranks"
    )
    parser.add_argument("--suggest", action="store_true", help="print the cheapest settings that fit, best first")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--base-alone", action="store_true", help="plan plain fine-tuning of the base, with whole logits, to compare"
    )
    parsed, more = parser.parse_known_intermixed_args(config.join_options(sys.argv[1:] if argv is None else argv))
    parsed.overrides += more
    args = vars(parsed)
    overrides, suggesting, alone, as_json = (args.pop(name) for name in ("overrides", "suggest", "base_alone", "json"))

    def run() -> int:
        # torch and transformers take seconds to import
        from rich.console import Console
        from transformers import AutoTokenizer

        from joint_train.plan.fits import pinned
        from joint_train.plan.planner import GIB, make_plan
        from joint_train.plan.report import in_numbers, report
        from joint_train.plan.suggest import suggest
        from joint_train.weights.folders import resolve
        from joint_train.weights.settle import with_adapter, with_vocabulary

        gc.freeze()  # a plan makes many objects, and collections needn't look at all that was imported
        cfg = with_adapter(config.load(["data.train=[{path: unused}]", *overrides]))
        if cfg.model.resize_vocabulary is True:
            folder = cfg.data.tokenizer or resolve(cfg.model.base, cfg.model.revision, cfg.model.cache_dir)
            cfg = with_vocabulary(cfg, AutoTokenizer.from_pretrained(folder))
        machine, number = Machine(**args), 0
        if not suggesting:
            plan = make_plan(cfg, machine, base_alone=alone)
            if as_json:
                print(json.dumps(in_numbers(plan, machine), indent=1))
                return 0 if plan.peak <= machine.usable else TOO_LARGE
            after = make_plan(cfg, machine, drafter_alone=True) if cfg.freeze.base_after and not alone else None
            report(cfg, machine, plan, Console(), after)
            return 0 if plan.peak <= machine.usable else TOO_LARGE
        least = make_plan(pinned(cfg), machine)
        if as_json:
            found = [{"overrides": one.changes, **in_numbers(one.plan, machine)} for one in suggest(cfg, machine)]
            print(json.dumps(found, indent=1))
            return 0 if found else TOO_LARGE
        print(f"As it is: {least.peak / GIB:.2f} GiB of {machine.usable / GIB:.2f} at least.", flush=True)
        for number, one in enumerate(suggest(cfg, machine, progress=counted("plans made")), 1):
            size, tokens = one.plan.peak / GIB, one.plan.tokens / one.plan.seconds(machine)
            print(f"{number}. {size:.2f} GiB, {tokens:,.0f} tokens a second: {one}", flush=True)
        if not number:
            print("Nothing that is known here fits: use more GPUs or a smaller pair.")
        return 0 if number else TOO_LARGE

    return start("joint_train.plan", run)


if __name__ == "__main__":
    sys.exit(main())
