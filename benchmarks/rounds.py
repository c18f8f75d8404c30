"""Are fresh answers worth their price? A base that is being trained, and a drafter that learns from what it says:

    python -m benchmarks.rounds WORK_DIR [--seeds 0 1 2] [--rounds 4] [--steps 60]

Both arms start from the same trained starter pair and train the same number of steps jointly, half on the data's own
answers, which move the base, and half on the base's: `once`, all of them given by the base as it was at the start;
`rounds`, by :mod:`joint_train.loop`, each share by the base as it is by then. Answers are sampled: greedily a base this
small repeats itself and never ends. In the end each pair decodes the held-out prompts, greedily and sampling, and its
tokens per base forward are compared, seed by seed.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import results
from benchmarks.runs import run_module, starter_pair, train

COLUMNS = {
    "arm": ("answers", ""),
    "sampled": ("tokens per base forward, sampled", ".3f"),
    "sampled_change": ("against once", "+.1%"),
    "greedy": ("tokens per base forward, greedy", ".3f"),
    "greedy_change": ("against once", "+.1%"),
    "base_loss": ("the base's loss on held-out answers", ".3f"),
}
ARMS = ("once", "rounds")


def sources(answers: Path, data: Path) -> str:
    return f"data.train=[{{path: {answers}}}, {{path: {data}, weight: 1.0}}]"


def measure(run: Path, pair: Path, out: Path, options: argparse.Namespace) -> dict[str, float]:
    """What a run's pair does on the held-out prompts, and its base's last validation loss."""
    if not (out / "evaluation.json").exists():
        run_module(
            "joint_train.evaluate", str(run / "export/base"), str(run / "export/drafter"), "--prompts",
            str(pair / "val.jsonl"), "--limit", str(options.held_out), "--num-steps", "4", "--serving", "engine",
            "--max-new-tokens", "64", "--thresholds", "0", "--dtype", "float32", "--out", str(out),
            "--temperature", str(options.temperature), timeout=options.timeout,
        )  # fmt: skip
    found = json.loads((out / "evaluation.json").read_text())
    sampled = next(one for one in found["sampling"] if one["way"] == "argmax")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val/base_loss"] for line in lines if "val/base_loss" in line]
    return {
        "sampled": sampled["tokens_per_forward"]["value"],
        "greedy": found["speculative"][0]["tokens_per_forward"]["value"],
        "base_loss": losses[-1],
    }


def arms(seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Both arms of a seed, made where they aren't there."""
    work, timeout = options.work_dir, options.timeout
    pair = starter_pair(work / f"pair_{seed}", seed, timeout)
    start = train(work / f"start_{seed}", pair, f"seed={seed}", f"max_steps={options.start_steps}", timeout=timeout)
    data = work / f"prompts_{seed}.jsonl"
    lines = (pair / "train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:: max(1, len(lines) // options.prompts)][: options.prompts]))
    model = [f"model.base={start}/export/base", f"model.drafter={start}/export/drafter", f"seed={seed}"]
    rates = ["optim.lr=2e-3", "optim.drafter_lr=4e-3"]
    quiet = ["tracking.wandb=disabled", "eval.every=0", "eval.prompts=0", "checkpoint.keep_last=1"]
    answering = ["--max-new-tokens", str(options.max_new_tokens), "--temperature", str(options.temperature)]

    once = work / f"once_{seed}"
    answers = work / f"once_{seed}.jsonl"
    experiment = ["+experiment=starter", f"pair={pair}"]
    if not answers.exists():
        run_module(
            "joint_train.data", "regenerate", str(answers), *answering, "--batch-size", "32", *experiment, *model,
            f"data.train=[{{path: {data}}}]", timeout=timeout,
        )  # fmt: skip
    steps = options.rounds * options.steps
    train(
        once, pair, *model, *rates, f"max_steps={steps}", sources(answers, data), "data.train_on=last_assistant",
        timeout=timeout,
    )  # fmt: skip
    looped = work / f"rounds_{seed}"
    run_module(
        "joint_train.loop", "--data", str(data), "--rounds", str(options.rounds), "--steps", str(options.steps),
        "--original", "1", "--out", str(looped), *answering, *experiment, *model, *rates, *quiet, timeout=timeout,
    )  # fmt: skip
    runs = {"once": once, "rounds": looped}
    return {arm: measure(runs[arm], pair, work / f"{arm}_{seed}_evaluation", options) for arm in ARMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps in a round")
    parser.add_argument("--start-steps", type=int, default=600, help="of the pair that both arms start from")
    parser.add_argument("--prompts", type=int, default=480, help="that are answered, in all rounds together")
    parser.add_argument("--held-out", type=int, default=64, help="prompts that are decoded in the end")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--temperature", type=float, default=1.0, help="of all answers")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one command")
    results.add_option(parser)
    options = parser.parse_args()
    options.work_dir = options.work_dir.absolute()

    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        for arm, row in arms(seed, options).items():
            found[arm].append(row)
            print(f"seed {seed}, {arm}: {row}", file=sys.stderr, flush=True)
    rows: list[dict[str, results.Value]] = []
    for arm, of_seeds in found.items():
        row: dict[str, results.Value] = {"arm": arm}
        for name in ("sampled", "greedy", "base_loss"):
            row[name] = results.spread([one[name] for one in of_seeds])
        for name in ("sampled", "greedy"):
            changes = [one[name] / other[name] - 1 for one, other in zip(of_seeds, found["once"], strict=True)]
            row[f"{name}_change"] = None if arm == "once" else results.spread(changes)
        rows.append(row)
    results.finish(results.record("rounds", COLUMNS, rows, seeds=options.seeds, runs=found), options.results)


if __name__ == "__main__":
    main()
