"""The measurement: plain greedy decoding against speculative decoding with K = 1, 2, … drafts, and sampling."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from joint_train.evaluate.calibration import reliability, stopped
from joint_train.evaluate.decoding import Decoded, acceptance_steps, decode, pictures_of
from joint_train.evaluate.drafting import Engine
from joint_train.evaluate.intervals import interval
from joint_train.evaluate.prompts import Prompt
from joint_train.evaluate.report import best
from joint_train.evaluate.where import where
from joint_train.pair.halves import input_embedding

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many prompts of it are done, and of how many."""

SUSPICIOUS = 4.0  # standard errors: less than once in 10,000 by chance


@torch.no_grad()
def measure(
    base: PreTrainedModel,
    drafter: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    num_steps: Sequence[int],
    max_new_tokens: int,
    *,
    ignore_eos: bool = False,
    engine: Engine = False,
    thresholds: Sequence[float] = (),
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Decode every prompt plainly and with every K in ``num_steps``, greedily; with the last K also once for each of
    ``thresholds``, at which drafting stops.

    Intervals are 95 % bootstrap intervals over prompts: they say how far another set of such prompts might be off.

    Args:
        engine: as for :func:`joint_train.evaluate.decoding.decode`.

    Returns:
        JSON-able: ``plain``, ``speculative`` (one entry for each K), ``where`` (for the fastest K, see
        :func:`joint_train.evaluate.where.where`), ``calibration``, ``examples``.
    """

    def run(what: str, drafter: PreTrainedModel | None, k: int, **more: float) -> list[Decoded]:
        options: dict[str, Any] = {"ignore_eos": ignore_eos, "engine": engine, **more}
        # A warm-up: the first generation pays for kernels, caches and memory.
        decode(base, drafter, prompts[0].ids, k, min(8, max_new_tokens), **pictures_of(prompts[0]))
        decoded = []
        for i, prompt in enumerate(prompts):
            progress(what, i, len(prompts))
            decoded.append(decode(base, drafter, prompt.ids, k, max_new_tokens, **options, **pictures_of(prompt)))
        progress(what, len(prompts), len(prompts))
        return decoded

    plain = run("plain", None, 0)
    tokens, seconds = [len(d.ids) for d in plain], [d.seconds for d in plain]
    speculative, of_k, decoded = [], {}, plain
    for k in num_steps:
        decoded = of_k[k] = run(f"K = {k}", drafter, k)
        speculative.append(summary(base, tokenizer, prompts, plain, decoded, k, seed))
    top = best({"speculative": speculative})["num_steps"]
    at = [(t, run(f"K = {k}, threshold {t:g}", drafter, k, threshold=t)) for t in thresholds]
    calibration = {
        "num_steps": num_steps[-1],
        "reliability": reliability(decoded, seed),
        "thresholds": [stopped(texts, threshold, seed) for threshold, texts in [(0.0, decoded), *at]],
    }
    return {
        "plain": {
            "tokens": sum(tokens),
            "seconds": sum(seconds),
            "of_prompts": {"tokens": tokens, "seconds": seconds},
            "tokens_per_second": interval([tokens, seconds], lambda t, s: t / s, seed),
        },
        "speculative": speculative,
        "where": {"num_steps": top, **where(prompts, of_k[top], tokenizer, seed)},
        "calibration": calibration,
        "examples": [
            {"category": p.category, "prompt": p.text, "text": tokenizer.decode(d.ids, skip_special_tokens=True)}
            for p, d in zip(prompts, decoded, strict=True)
        ],
    }


def summary(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    plain: Sequence[Decoded],
    decoded: Sequence[Decoded],
    num_steps: int,
    seed: int,
) -> dict[str, Any]:
    """What speculative decoding with one K did, against plain decoding of the same prompts."""
    tokens, seconds = [len(d.ids) for d in decoded], [d.seconds for d in decoded]
    settled, verifications = [sum(d.settled) for d in decoded], [len(d.settled) for d in decoded]
    plain_tokens, plain_seconds = [len(d.ids) for d in plain], [d.seconds for d in plain]
    categories = sorted({p.category for p in prompts})
    by_category = {
        category: interval(
            [
                [s for s, p in zip(settled, prompts, strict=True) if p.category == category],
                [v for v, p in zip(verifications, prompts, strict=True) if p.category == category],
            ],
            lambda s, v: s / v,
            seed,
        )
        for category in categories
    }
    found = [
        difference(base, tokenizer, i, prompt, one, other)
        for i, (prompt, one, other) in enumerate(zip(prompts, plain, decoded, strict=True))
    ]
    steps = [[step for step in acceptance_steps(d) if step[0]] for d in decoded]
    return {
        "num_steps": num_steps,
        "tokens": sum(tokens),
        "seconds": sum(seconds),
        "verifications": sum(verifications),
        "of_prompts": {
            "tokens": tokens,
            "seconds": seconds,
            "settled": settled,
            "verifications": verifications,
            "drafted": [sum(drafts for drafts, _ in of_one) for of_one in steps],
            "accepted": [sum(accepted for _, accepted in of_one) for of_one in steps],
            "first_drafted": [len(of_one) for of_one in steps],
            "first_accepted": [sum(accepted > 0 for _, accepted in of_one) for of_one in steps],
        },
        "tokens_per_forward": interval([settled, verifications], lambda s, v: s / v, seed),
        "tokens_per_second": interval([tokens, seconds], lambda t, s: t / s, seed),
        "speedup": interval(
            [tokens, seconds, plain_tokens, plain_seconds], lambda t, s, pt, ps: (t / s) / (pt / ps), seed
        ),
        "acceptance": acceptance(decoded, num_steps, seed),
        "tokens_per_forward_by_category": by_category,
        "differences": [d for d in found if d is not None],
    }


def acceptance(decoded: Sequence[Decoded], num_steps: int, seed: int) -> list[dict[str, Any]]:
    """What became of the drafts at each position, of one text for each prompt."""
    steps = [acceptance_steps(d) for d in decoded]
    positions = []
    for k in range(num_steps):
        drafted = [sum(drafts > k for drafts, _ in s) for s in steps]
        reached = [sum(drafts > k and accepted >= k for drafts, accepted in s) for s in steps]
        accepted = [sum(accepted > k for _, accepted in s) for s in steps]
        positions.append(
            {
                "drafted": sum(drafted),
                "accepted": sum(accepted),
                "share": interval([accepted, drafted], lambda a, d: a / d, seed),
                "share_if_reached": interval([accepted, reached], lambda a, r: a / r, seed),
            }
        )
    return positions


def difference(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    prompt: Prompt,
    plain: Decoded,
    other: Decoded,
) -> dict[str, Any] | None:
    """Where two greedy texts of one prompt part, and by how much the base preferred the plain one's token there.

    A margin within the dtype's rounding error is two ways of adding up the same numbers; a larger one is a mistake.
    """
    if plain.ids == other.ids:
        return None
    at = next((i for i, (a, b) in enumerate(zip(plain.ids, other.ids, strict=False)) if a != b), None)
    if at is None:  # one ends where the other continues
        at = min(len(plain.ids), len(other.ids))
        return {"prompt": index, "position": at, "plain": None, "speculative": None, "margin": None}
    ids = torch.tensor([prompt.ids + plain.ids[:at]], device=input_embedding(base).weight.device)
    inputs = whole_inputs(base, prompt.inputs, ids)
    logits = base(input_ids=ids, logits_to_keep=1, use_cache=False, **inputs).logits[0, -1].float()
    one, two = plain.ids[at], other.ids[at]
    return {
        "prompt": index,
        "position": at,
        "plain": tokenizer.decode([one]),
        "speculative": tokenizer.decode([two]),
        "margin": (logits[one] - logits[two]).item(),
    }


@torch.no_grad()
def sampling(
    base: PreTrainedModel,
    drafter: PreTrainedModel,
    prompts: Sequence[Prompt],
    num_steps: int,
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
    engine: Engine = False,
    progress: Progress = lambda what, done, total: None,
) -> list[dict[str, Any]]:
    """Sampled texts: whether they have the base's distribution, and how many drafts are accepted.

    Plain; with each draft the drafter's most likely token, as vLLM and SGLang draft by default; with samples of the
    drafter, as vLLM's ``draft_sample_method="probabilistic"`` draws them; and, unless `engine`, with the acceptance of
    transformers, which takes a most likely token for a sample (see :mod:`joint_train.evaluate.drafting`).

    Each token of a text sampled from p has the expected log-probability -H(p) and hits the most likely token with
    probability max p. Summed over all tokens, both are compared with what the texts did, in standard errors; a
    deviation of more than 4 is no chance. (The differences are a martingale, so tokens needn't be independent.)

    Returns:
        For each way, JSON-able: ``way``; ``tokens``; ``tokens_per_forward`` and ``accepted``, the share of drafts
        accepted at each position with all before it, with their intervals (None for plain); ``reliability`` of argmax
        drafts (None for others); ``deviation`` and ``bases_distribution``.
    """
    ways = {"plain": None, "argmax": "argmax", "sampled": "sampled"} | ({} if engine else {"transformers": "biased"})
    results = []
    for name, way in ways.items():
        torch.manual_seed(seed)
        used = drafter if way else None
        totals = torch.zeros(4, dtype=torch.float64)
        decoded = []
        for i, prompt in enumerate(prompts):
            progress(f"sampling, {name}", i, len(prompts))
            options: dict[str, Any] = {"temperature": temperature, "engine": engine, "way": way}
            options |= pictures_of(prompt)
            decoded.append(decode(base, used, prompt.ids, num_steps, max_new_tokens, **options))
            totals += surprise(base, prompt.ids, decoded[-1].ids, temperature, prompt.inputs)
        progress(f"sampling, {name}", len(prompts), len(prompts))
        settled, verifications = [sum(d.settled) for d in decoded], [len(d.settled) for d in decoded]
        log_probability, log_variance, hits, hit_variance = totals.tolist()
        deviations = {
            "log_probability": log_probability / math.sqrt(max(log_variance, 1e-12)),
            "most_likely": hits / math.sqrt(max(hit_variance, 1e-12)),
        }
        results.append(
            {
                "way": name,
                "tokens": sum(len(d.ids) for d in decoded),
                "tokens_per_forward": interval([settled, verifications], lambda s, v: s / v, seed) if way else None,
                "accepted": [p["share"] for p in acceptance(decoded, num_steps, seed)] if way else None,
                "reliability": reliability(decoded, seed) if way == "argmax" else None,
                "deviation": deviations,
                "bases_distribution": max(map(abs, deviations.values())) < SUSPICIOUS,
            }
        )
    return results


def whole_inputs(base: PreTrainedModel, inputs: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The pictures of a prompt, for a forward over it and its answer ``[1, S]``."""
    found = {name: x.to(ids.device, base.dtype if x.is_floating_point() else None) for name, x in inputs.items()}
    if (types := found.get("mm_token_type_ids")) is not None:
        found["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
    return found


def surprise(
    base: PreTrainedModel,
    prompt: Sequence[int],
    new: Sequence[int],
    temperature: float,
    pictures: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:
    """Sums over the new tokens: log p + H(p) and its variance, hits of the most likely token minus max p and its."""
    ids = torch.tensor([[*prompt, *new]], device=input_embedding(base).weight.device)
    inputs = whole_inputs(base, pictures, ids)
    logits = base(input_ids=ids, logits_to_keep=len(new) + 1, use_cache=False, **inputs).logits[0, :-1].double().cpu()
    if (suppressed := base.generation_config.suppress_tokens) is not None:
        logits[:, suppressed] = -torch.inf
    log_p = (logits / temperature).log_softmax(-1)
    p, tokens = log_p.exp(), torch.tensor(new)
    entropy = torch.special.entr(p).sum(-1)
    chosen = log_p.gather(-1, tokens[:, None])[:, 0]
    log_p = log_p.clamp(min=-1e100)  # where p is 0
    most, best = p.max(-1)
    return torch.stack(
        [
            (chosen + entropy).sum(),
            ((p * log_p.square()).sum(-1) - entropy.square()).sum(),
            ((tokens == best).double() - most).sum(),
            (most * (1 - most)).sum(),
        ]
    )
