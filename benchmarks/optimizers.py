"""Whether `optim.name` changes what is learnt: the starter pair, the same seeds and data with each optimizer.

    python -m benchmarks.optimizers WORK_DIR
    python -m benchmarks.optimizers WORK_DIR --names adamw adamw_8bit --steps 200 --seeds 0 1 2

Printed for each: the mean loss of the last tenth of the steps over the seeds, and its paired difference from AdamW's,
with their standard deviations over the seeds. Every run is the main job; one that has ended isn't run again.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from benchmarks import results
from benchmarks.runs import starter_pair, train

LOSSES = ("base_loss", "drafter_loss")


def last_losses(run: Path, steps: int) -> dict[str, float]:
    """Means of the last tenth of the steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = max(1, steps // 10)
    return {name: mean(values[-last:]) for name in LOSSES if (values := [x[name] for x in lines if name in x])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--names", nargs="+", default=["adamw", "adamw_bf16", "adamw_8bit"], help="AdamW's first")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least two")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every run")
    results.add_option(parser)
    options = parser.parse_args()
    pair = starter_pair(options.work_dir / "pair", timeout=options.timeout)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.names}
    for seed in options.seeds:
        for name in options.names:
            overrides = (f"optim.name={name}", f"seed={seed}", f"max_steps={options.steps}", *options.set)
            run = train(options.work_dir / f"{name}_{seed}", pair, *overrides, timeout=options.timeout)
            found[name].append(last_losses(run, options.steps))
    rows: list[dict[str, results.Value]] = []
    for name, runs in found.items():
        row: dict[str, results.Value] = {"optimizer": name}
        for loss in LOSSES:
            gaps = [run[loss] - first[loss] for run, first in zip(runs, found[options.names[0]], strict=True)]
            row[loss], row[f"{loss}_gap"] = results.spread([run[loss] for run in runs]), results.spread(gaps)
        rows.append(row)
    columns = {"optimizer": ("`optim.name`", "")}
    for loss in LOSSES:
        columns |= {loss: (loss, ".4f"), f"{loss}_gap": (f"from {options.names[0]}", "+.4f")}
    results.finish(results.record("optimizers", columns, rows), options.results)


if __name__ == "__main__":
    main()
