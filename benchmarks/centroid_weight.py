"""Which `loss.centroid_weight`: a starter pair with ordered embeddings, trained jointly with each, measured as served.

    python -m benchmarks.centroid_weight WORK_DIR
    python -m benchmarks.centroid_weight WORK_DIR --weights 0 0.3 --seeds 0 1 2 --recluster

The starter pair is trained by `--base-steps` joint steps, its drafter's tokens are put into balanced clusters, and the
clusters' routing is trained by `--fit-steps` with the base frozen: a pair as a release would be. Then `--steps` joint
steps with each weight, from the same start. Every run is the main job, on one rank; one that has ended isn't run again.
With --recluster also the clusters are made anew from the last head, without training.
"""

import argparse
import hashlib
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, Gemma4AssistantForCausalLM

from benchmarks import results
from benchmarks.loss_sweep import last_validation, over_seeds
from benchmarks.runs import starter_pair, train

CENTROIDS, TOP_K = 64, 4
METRICS = {
    "val/tokens_per_forward": "tokens per base forward",
    "val/accepted_length_walked": "walked",
    "val/agreement_0": "agreement of round 0",
    "val/acceptance_argmax_0": "p(argmax q)",
    "val/acceptance_sampled_0": "sum min(p, q)",
    "val/dense_agreement_0": "agreement, dense",
    "val/dense_accepted_length_walked": "walked, dense",
    "val/centroid_hit_0": "centroid hit",
    "val/drafter_loss": "drafter loss",
    "val/base_loss": "base loss",
}


def clusters(head: torch.Tensor, count: int, rounds: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced k-means of a head's rows `[V, H]` by direction: the tokens in the order of their clusters `[V]`, and the
    clusters' means `[C, H]`. Tokens that are surest of their cluster choose first."""
    generator = torch.Generator().manual_seed(seed)
    size = len(head) // count
    directions = torch.nn.functional.normalize(head, dim=-1)
    means = directions[torch.randperm(len(head), generator=generator)[:count]]
    for _ in range(rounds):
        likeness = directions @ torch.nn.functional.normalize(means, dim=-1).T
        members: list[list[int]] = [[] for _ in range(count)]
        for token in likeness.max(-1).values.argsort(descending=True).tolist():
            for cluster in likeness[token].argsort(descending=True).tolist():
                if len(members[cluster]) < size:
                    members[cluster].append(token)
                    break
        ordering = torch.tensor(members)
        means = directions[ordering].mean(1)
    return ordering.flatten(), head[ordering].mean(1)


def order(source: Path, target: Path) -> None:
    """Write the drafter in `source` with ordered embeddings, clustered by its head as it is."""
    if target.exists():
        return
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    config = AutoConfig.from_pretrained(source)
    config.update({"use_ordered_embeddings": True, "num_centroids": CENTROIDS, "centroid_intermediate_top_k": TOP_K})
    drafter = Gemma4AssistantForCausalLM.from_pretrained(source, config=config, dtype=torch.bfloat16)
    ordering, means = clusters(drafter.lm_head.weight.detach().float(), CENTROIDS)
    with torch.no_grad():
        drafter.masked_embedding.token_ordering.copy_(ordering)
        drafter.masked_embedding.centroids.weight.copy_(means)
    drafter.save_pretrained(partial)
    partial.rename(target)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.1, 0.3, 1.0])
    parser.add_argument("--steps", type=int, default=120, help="joint steps with each weight")
    parser.add_argument("--base-steps", type=int, default=400, help="joint steps before the clusters are made")
    parser.add_argument("--fit-steps", type=int, default=100, help="steps of the drafter alone after that")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts of a measurement")
    parser.add_argument("--lr", type=float, default=2e-3, help="of both models in those steps")
    parser.add_argument("--recluster", action="store_true", help="also measure with clusters made anew at the end")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every run")
    results.add_option(parser)
    options = parser.parse_args()
    work = options.work_dir
    pair = starter_pair(work / "pair", timeout=options.timeout)

    def run(name: str, drafter: Path, *overrides: str) -> dict[str, float]:
        every = (f"model.drafter={drafter}", *overrides, *options.set)
        return last_validation(work / name, pair, options, *every, metrics=METRICS)

    base = work / f"base_{options.base_steps}"
    train(base, pair, f"max_steps={options.base_steps}", *options.set, timeout=options.timeout)
    order(base / "export" / "drafter", work / "ordered")
    start = f"model.base={base}/export/base"
    fit = work / f"fit_{options.fit_steps}"
    alone = (f"max_steps={options.fit_steps}", "freeze.base=true", "loss.centroid_weight=1")
    run(fit.name, work / "ordered", start, *alone)

    rows = []

    def row(name: str, runs: list[dict[str, float]]) -> None:
        rows.append({"weight": name, **over_seeds(runs, METRICS)})

    measure = ("max_steps=1", "optim.lr=0", "optim.drafter_lr=0", "optim.weight_decay=0")
    row("before", [run("before", fit / "export" / "drafter", start, *measure)])
    for weight in options.weights:
        runs, again = [], []
        for seed in options.seeds:
            overrides = (f"max_steps={options.steps}", f"loss.centroid_weight={weight}", f"seed={seed}")
            overrides += (f"optim.lr={options.lr}", f"optim.drafter_lr={options.lr}")
            name = "run_" + hashlib.sha256(" ".join([*overrides, *options.set]).encode()).hexdigest()[:12]
            runs.append(run(name, fit / "export" / "drafter", start, *overrides))
            if options.recluster:
                order(work / name / "export" / "drafter", work / f"{name}_ordered")
                trained = f"model.base={work / name}/export/base"
                again.append(run(f"{name}_again", work / f"{name}_ordered", trained, *measure))
        row(str(weight), runs)
        if again:
            row(f"{weight}, clustered anew", again)
    columns = {"weight": ("`loss.centroid_weight`", "")} | {name: (heading, ".3f") for name, heading in METRICS.items()}
    results.finish(results.record("centroid_weight", columns, rows), options.results)


if __name__ == "__main__":
    main()
