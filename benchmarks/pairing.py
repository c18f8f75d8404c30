"""What the pairing is worth: `serving` against `same_token`, everything else equal, on starter pairs.

    python -m benchmarks.pairing WORK_DIR                     # seeds 0 1 2, each pairing: six runs of the main job
    python -m benchmarks.pairing WORK_DIR --set loss.drafter=ce

A seed is another pair of random weights and another data order. Every run is the main job on two ranks in WORK_DIR; one
that has ended is not run again. Each exported pair then decodes held-out docstrings, as transformers generates and as
engines serve. Intervals are 95 % bootstrap intervals over all prompts and seeds of a pairing.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers

from benchmarks import results
from benchmarks.runs import starter_pair, train
from joint_train.evaluate.compare import load_run
from joint_train.evaluate.decoding import decode
from joint_train.evaluate.measure import interval
from joint_train.evaluate.prompts import load_prompts

PAIRINGS = ("serving", "same_token")
VIEWS = {"transformers": False, "engine": True}
COLUMNS = {
    "pairing": ("pairing", ""),
    "transformers": ("tokens per base forward, transformers", ".2f"),
    "engine": ("as engines serve", ".2f"),
    "val/base_loss": ("base loss", ".3f"),
    "val/drafter_loss": ("drafter loss", ".3f"),
}


@torch.no_grad()
def decoded(export: Path, prompts_file: Path, options: argparse.Namespace) -> dict[str, list[list[int]]]:
    """For each view, (tokens settled, verifications) of each prompt."""
    base = transformers.AutoModelForCausalLM.from_pretrained(export / "base", dtype=torch.float32).eval()
    drafter = transformers.Gemma4AssistantForCausalLM.from_pretrained(export / "drafter", dtype=torch.float32).eval()
    prompts = load_prompts(str(prompts_file), transformers.AutoTokenizer.from_pretrained(export / "base"))
    counts: dict[str, list[list[int]]] = {view: [] for view in VIEWS}
    for prompt in prompts[: options.prompts]:
        for view, engine in VIEWS.items():
            d = decode(base, drafter, prompt.ids, options.num_steps, options.max_new_tokens, engine=engine)
            counts[view].append([sum(d.settled), len(d.settled)])
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--num-steps", type=int, default=4, help="K, in training and decoding")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every run")
    results.add_option(parser)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()

    found: dict[str, list[dict]] = {pairing: [] for pairing in PAIRINGS}
    for seed in options.seeds:
        pair = starter_pair(options.work_dir / f"pair_{seed}", seed, options.timeout)
        for pairing in PAIRINGS:
            run = options.work_dir / f"{pairing}_{seed}"
            overrides = [f"drafter.pairing={pairing}", f"seed={seed}", f"drafter.num_steps={options.num_steps}"]
            train(run, pair, *overrides, *options.set, ranks=options.ranks, timeout=options.timeout)
            metrics = load_run(run, run.name)
            last = {m: metrics.series(m)[-1][1] for m in ("val/base_loss", "val/drafter_loss", "val/drafter_ce")}
            counts = decoded(run / "export", pair / "val.jsonl", options)
            found[pairing].append({"seed": seed, **last, **counts})
            lengths = {v: sum(s for s, _ in counts[v]) / sum(n for _, n in counts[v]) for v in VIEWS}
            print(f"{run.name}: {lengths} {last}", file=sys.stderr, flush=True)

    rows: list[dict[str, results.Value]] = []
    for pairing, runs in found.items():
        row: dict[str, results.Value] = {"pairing": pairing}
        for view in VIEWS:
            counts = [count for run in runs for count in run[view]]
            row[view] = interval(list(zip(*counts, strict=True)), lambda s, v: s / v, seed=0)
        for metric in ("val/base_loss", "val/drafter_loss"):
            row[metric] = results.spread([run[metric] for run in runs])
        rows.append(row)
    results.finish(results.record("pairing", COLUMNS, rows, runs=found), options.results)


if __name__ == "__main__":
    main()
