"""How a new drafter should begin: random weights against the base's embedding along its principal directions.

    python -m benchmarks.new_drafter WORK_DIR --seeds 0 1 2

The starter pair's base is trained by `--base-steps` joint steps and frozen. For each beginning and seed
`joint_train.drafter new` makes a drafter of it, which is trained by `--steps` steps and decodes held-out prompts. Every
run is the main job, on one rank; one that has ended isn't run again.
"""

import argparse
from pathlib import Path

from benchmarks import results
from benchmarks.loss_sweep import METRICS, last_validation, over_seeds
from benchmarks.runs import run_module, starter_pair, train

BEGINNINGS = {"random": ["--random"], "projected": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 200], help="optimizer steps of each drafter")
    parser.add_argument("--base-steps", type=int, default=600, help="joint steps that make the frozen base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts of a measurement")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for one run")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every run")
    results.add_option(parser)
    options = parser.parse_args()

    pair = starter_pair(options.work_dir / "pair", timeout=options.timeout)
    trained = options.work_dir / f"base_{options.base_steps}"
    train(trained, pair, f"max_steps={options.base_steps}", *options.set, timeout=options.timeout)
    base, rows = trained / "export" / "base", []
    for name, arguments in BEGINNINGS.items():
        for steps in options.steps:
            runs = []
            for seed in options.seeds:
                drafter = options.work_dir / f"{name}_{seed}"
                if not drafter.exists():
                    shape = ["--hidden-size", "64", "--layers", "sliding", "full", "--intermediate-size", "192"]
                    run_module(
                        "joint_train.drafter", "new", str(base), str(drafter), "--seed", str(seed), *shape, *arguments
                    )
                overrides = ["freeze.base=true", f"model.base={base}", f"model.drafter={drafter}", f"seed={seed}"]
                overrides += [f"max_steps={steps}", *options.set]
                run = options.work_dir / f"{name}_{seed}_{steps}"
                runs.append(last_validation(run, pair, options, *overrides))
            rows.append({"beginning": name, "steps": str(steps), **over_seeds(runs, METRICS)})
    columns = {"beginning": ("beginning", ""), "steps": ("steps", "")}
    columns |= {name: (heading, ".3f") for name, heading in METRICS.items()}
    results.finish(results.record("new_drafter", columns, rows), options.results)


if __name__ == "__main__":
    main()
