"""What ``--recommend`` does: with a pair, or with a running server."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from joint_train.errors import ConfigError
from joint_train.evaluate import recommend as policies
from joint_train.evaluate.cost import Roofline, measured_factors
from joint_train.evaluate.decoding import decode, pictures_of
from joint_train.evaluate.measure import Progress
from joint_train.evaluate.page import html
from joint_train.evaluate.prompts import Prompt
from joint_train.evaluate.recommend import Trace, recommend, recommend_served, set_num_assistant_tokens
from joint_train.files import replace
from joint_train.plan.machine import CARDS
from joint_train.weights.folders import resolve
from joint_train.weights.loading import build_meta


def card_of(args: argparse.Namespace) -> str:
    """``--gpu``, or this machine's where it is known."""
    found = torch.cuda.get_device_name().lower().replace(" ", "") if torch.cuda.is_available() else ""
    return args.gpu or next((name for name in sorted(CARDS, key=len, reverse=True) if name in found), "h100")


def of_pair(
    args: argparse.Namespace,
    base: PreTrainedModel,
    drafter: PreTrainedModel,
    prompts: Sequence[Prompt],
    thresholds: Sequence[float],
    progress: Progress,
) -> dict[str, Any]:
    """What :func:`joint_train.evaluate.recommend.recommend` finds, with a pass over the prompts of its own.

    The drafter sees what llama.cpp shows it with ``--serving llamacpp``, and what vLLM and SGLang do otherwise: what
    transformers shows it depends on the drafts that were rejected before.
    """
    traces, k, card = [], max(args.num_steps), card_of(args)
    for i, prompt in enumerate(prompts):
        progress("drafts at each token", i, len(prompts))
        how: dict[str, Any] = {"engine": "llamacpp" if args.serving == "llamacpp" else True, **pictures_of(prompt)}
        scout = decode(base, drafter, prompt.ids, k, args.max_new_tokens, ignore_eos=args.ignore_eos, scout=True, **how)
        traces.append(Trace.of(scout))
    progress("drafts at each token", len(prompts), len(prompts))
    if not any(trace.matches for trace in traces):
        raise ConfigError("--recommend: no answer has more than one token, so there is nothing to draft.")
    answers = sum(len(trace.matches) / 2 for trace in traces)
    context = round((sum(len(prompt.ids) for prompt in prompts) + answers) / len(prompts))
    cost = Roofline(base, drafter, CARDS[card], context)
    found = recommend(traces, cost, range(1, k + 1), thresholds, args.batch_sizes, args.seed)
    return {"cost": f"the roofline of one {card} in bfloat16 with a context of {context:,} tokens", **found}


def of_server(args: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """The same from what was measured of a running server, whose times the roofline is fitted to."""
    models = []
    for path in (args.base, args.drafter):
        models.append(build_meta(AutoConfig.from_pretrained(resolve(path)), torch.bfloat16))
    served, card = results["speculative"][0], card_of(args)
    measured = {
        row["concurrency"]: (row["tokens_per_second"], row["tokens_per_forward"])
        for row in results["concurrency"]
        if row["tokens_per_forward"]
    }
    if not measured:
        raise ConfigError("--recommend: no answer has more than one token, so nothing was drafted.")
    cost = Roofline(models[0], models[1], CARDS[card], args.max_new_tokens)
    cost.factors = measured_factors(cost, served["num_steps"], measured)
    said = ", ".join(f"{factor:.2g} at {batch}" for batch, factor in cost.factors.items())
    return {
        "cost": f"the times of {args.url}, split into base and drafter by the roofline of one {card}",
        "note": f"Measured times are these multiples of the roofline's, by requests at a time: {said}.",
        **recommend_served(served, cost, measured),
    }


def set_drafts(args: argparse.Namespace, found: dict[str, Any]) -> list[Path]:
    """Write the best number of drafts for ``--set-drafts`` sequences into the drafter's folder; the file, if any."""
    best = found["best_without_threshold"].get(str(args.set_drafts))
    if best is None:
        raise ConfigError(f"--set-drafts={args.set_drafts}: this batch size wasn't measured; choose one of "
                          f"{', '.join(map(str, found['batches']))}, or add it to --batch-sizes.")  # fmt: skip
    if not best["num_steps"]:
        print(
            f"--set-drafts: with {args.set_drafts} sequences plain decoding is the fastest, so nothing is set",
            file=sys.stderr,
        )
        return []
    return [set_num_assistant_tokens(args.drafter, best["num_steps"])]


def written_for_server(args: argparse.Namespace) -> str:
    """Add the recommendation to what was written of a server, as a page of its own; the table for a terminal."""
    file = args.out / "evaluation.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    found = results["recommend"] = of_server(args, results)
    replace(file, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    page = args.out / "recommendation.html"
    replace(page, html("How many tokens to draft", found["cost"], [policies.section(found)]))
    written = [page, *(set_drafts(args, found) if args.set_drafts is not None else [])]
    return "\n".join([*policies.text(found), f"written: {', '.join(map(str, written))}"])
