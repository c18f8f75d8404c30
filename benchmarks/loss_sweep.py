"""Which drafter loss accepts most: the starter pair, trained once for each kind, measured by speculative decoding.

    python -m benchmarks.loss_sweep WORK_DIR                       # a trained and frozen base, a fresh drafter for each
    python -m benchmarks.loss_sweep WORK_DIR --joint               # base and drafter train together from random weights
    python -m benchmarks.loss_sweep WORK_DIR --kinds kl nla '{ce: 0.1, nla: 0.9}' --seeds 0 1 2

Every run is the main job in a process of its own, on one rank, in WORK_DIR; one that has ended is not run again. The
first builds the starter pair and, without --joint, trains its base by `--base-steps` joint steps.
"""

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path

from benchmarks import results
from benchmarks.runs import starter_pair, train
from joint_train.config.values import KINDS
from joint_train.evaluate.compare import load_run

METRICS = {
    "val/tokens_per_forward": "tokens per base forward",
    "val/accepted_length_expected": "expected, teacher forced",
    "val/acceptance_sampled_0": "alpha of round 0",
    "val/drafter_ce": "drafter CE",
}


def last_validation(output: Path, pair: Path, options, *overrides: str, metrics=METRICS) -> dict[str, float]:
    """The last validation of the run in `output`, made if it isn't there."""
    train(output, pair, f"eval.prompts={options.prompts}", *overrides, timeout=options.timeout)
    run = load_run(output, output.name)
    return {name: run.series(name)[-1][1] for name in metrics}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--kinds", nargs="+", default=[*KINDS, "{ce: 0.1, nla: 0.9}"], help="values of loss.drafter")
    parser.add_argument("--joint", action="store_true", help="train the base too, with each kind")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each kind")
    parser.add_argument("--base-steps", type=int, default=600, help="joint steps that make the frozen base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts of a measurement")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for one run")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every run")
    results.add_option(parser)
    options = parser.parse_args()

    pair = starter_pair(options.work_dir / "pair", timeout=options.timeout)
    common = [f"max_steps={options.steps}", *options.set]
    if not options.joint:
        base = options.work_dir / f"base_{options.base_steps}"
        train(base, pair, f"max_steps={options.base_steps}", *options.set, timeout=options.timeout)
        common += ["freeze.base=true", f"model.base={base}/export/base"]

    rows = []
    for kind in options.kinds:
        runs = []
        for seed in options.seeds:
            overrides = [f"loss.drafter={kind}", f"seed={seed}", *common]
            name = hashlib.sha256(" ".join(overrides).encode()).hexdigest()[:12]
            runs.append(last_validation(options.work_dir / f"run_{name}", pair, options, *overrides))
        rows.append({"kind": kind, **over_seeds(runs, METRICS)})
    columns = {"kind": ("`loss.drafter`", "")} | {name: (heading, ".3f") for name, heading in METRICS.items()}
    results.finish(results.record("loss_sweep", columns, rows), options.results)


def over_seeds(runs: list[dict[str, float]], metrics: Iterable[str]) -> dict[str, results.Value]:
    """Each metric over the runs of several seeds."""
    return {name: results.spread([run[name] for run in runs]) for name in metrics}


if __name__ == "__main__":
    main()
