"""The measurement: plain greedy decoding against speculative decoding with K = 1, 2, … drafts, and sampling."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from joint_train.evaluate.decoding import Decoded, acceptance_steps, decode
from joint_train.evaluate.prompts import Prompt

RESAMPLES = 2000
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
    engine: bool = False,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Decode every prompt plainly and with every K in ``num_steps``, greedily.

    Intervals are 95 % bootstrap intervals over prompts: they say how far another set of such prompts might be off.

    Args:
        engine: as for :func:`joint_train.evaluate.decoding.decode`.
        progress: called with what is being done, how many prompts of it are done, and of how many.

    Returns:
        JSON-able: ``plain``, ``speculative`` (one entry for each K), ``examples``.
    """

    def run(what: str, drafter: PreTrainedModel | None, k: int) -> list[Decoded]:
        # Once for nothing: the first generation pays for kernels, caches and memory.
        decode(base, drafter, prompts[0].ids, k, min(8, max_new_tokens))
        decoded = []
        for i, prompt in enumerate(prompts):
            progress(what, i, len(prompts))
            decoded.append(decode(base, drafter, prompt.ids, k, max_new_tokens, ignore_eos=ignore_eos, engine=engine))
        progress(what, len(prompts), len(prompts))
        return decoded

    plain = run("plain", None, 0)
    tokens, seconds = [len(d.ids) for d in plain], [d.seconds for d in plain]
    speculative, decoded = [], plain
    for k in num_steps:
        decoded = run(f"K = {k}", drafter, k)
        speculative.append(summary(base, tokenizer, prompts, plain, decoded, k, seed))
    return {
        "plain": {
            "tokens": sum(tokens),
            "seconds": sum(seconds),
            "tokens_per_second": interval([tokens, seconds], lambda t, s: t / s, seed),
        },
        "speculative": speculative,
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
    steps = [acceptance_steps(d) for d in decoded]
    acceptance = []
    for k in range(num_steps):
        drafted = [sum(drafts > k for drafts, _ in s) for s in steps]
        reached = [sum(drafts > k and accepted >= k for drafts, accepted in s) for s in steps]
        accepted = [sum(accepted > k for _, accepted in s) for s in steps]
        acceptance.append(
            {
                "drafted": sum(drafted),
                "accepted": sum(accepted),
                "share": interval([accepted, drafted], lambda a, d: a / d, seed),
                "share_if_reached": interval([accepted, reached], lambda a, r: a / r, seed),
            }
        )
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
    return {
        "num_steps": num_steps,
        "tokens": sum(tokens),
        "seconds": sum(seconds),
        "verifications": sum(verifications),
        "tokens_per_forward": interval([settled, verifications], lambda s, v: s / v, seed),
        "tokens_per_second": interval([tokens, seconds], lambda t, s: t / s, seed),
        "speedup": interval(
            [tokens, seconds, plain_tokens, plain_seconds], lambda t, s, pt, ps: (t / s) / (pt / ps), seed
        ),
        "acceptance": acceptance,
        "tokens_per_forward_by_category": by_category,
        "differences": [d for d in found if d is not None],
    }


def interval(columns: Sequence[Sequence[float]], statistic: Callable[..., Tensor], seed: int) -> dict[str, Any]:
    """A ratio of sums over prompts and its 95 % bootstrap interval.

    Args:
        columns: one list for each quantity, with one number for each prompt.
        statistic: of the columns' sums; elementwise on tensors.

    Returns:
        ``value``, ``low``, ``high``; ``None`` where it can't be said.
    """
    data = torch.tensor(columns, dtype=torch.float64)  # [quantities, prompts]
    count = data.shape[1]
    picks = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    resampled = statistic(*data[:, picks].sum(-1))
    resampled = resampled[resampled.isfinite()]
    value = statistic(*data.sum(-1)).item()
    if not math.isfinite(value):
        return {"value": None, "low": None, "high": None}
    if count < 2 or len(resampled) < RESAMPLES // 2:
        return {"value": value, "low": None, "high": None}
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value, "low": low, "high": high}


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
    if at is None:  # one ends where the other goes on
        at = min(len(plain.ids), len(other.ids))
        return {"prompt": index, "position": at, "plain": None, "speculative": None, "margin": None}
    ids = torch.tensor([prompt.ids + plain.ids[:at]], device=base.get_input_embeddings().weight.device)
    logits = base(input_ids=ids, logits_to_keep=1, use_cache=False).logits[0, -1].float()
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
) -> list[dict[str, Any]]:
    """Whether sampled texts have the base's distribution: plain, with transformers' acceptance, with an exact one.

    Each token of a text sampled from p has the expected log-probability -H(p) and hits the most likely token with
    probability max p. Summed over all tokens, both are compared with what the texts did, in standard errors; a
    deviation of more than 4 is no chance. (The differences are a martingale, so tokens needn't be independent.)

    transformers drafts the drafter's most likely token, and then accepts it as if it had been drawn from the drafter's
    distribution, which favours it. The exact rule takes the draft for what it is, a point mass.
    """
    ways = {
        "plain": (None, contextlib.nullcontext()),
        "transformers": (drafter, contextlib.nullcontext()),
        "exact": (drafter, point_mass(drafter)),
    }
    results = []
    for way, (used, context) in ways.items():
        torch.manual_seed(seed)
        totals = torch.zeros(4, dtype=torch.float64)
        count = settled = verifications = 0
        with context:
            for prompt in prompts:
                decoded = decode(base, used, prompt.ids, num_steps, max_new_tokens, temperature=temperature)
                totals += surprise(base, prompt.ids, decoded.ids, temperature)
                count += len(decoded.ids)
                settled, verifications = settled + sum(decoded.settled), verifications + len(decoded.settled)
        log_probability, log_variance, hits, hit_variance = totals.tolist()
        deviations = {
            "log_probability": log_probability / math.sqrt(max(log_variance, 1e-12)),
            "most_likely": hits / math.sqrt(max(hit_variance, 1e-12)),
        }
        results.append(
            {
                "way": way,
                "tokens": count,
                "tokens_per_forward": settled / verifications if used is not None and verifications else None,
                "deviation": deviations,
                "bases_distribution": max(map(abs, deviations.values())) < SUSPICIOUS,
            }
        )
    return results


def surprise(base: PreTrainedModel, prompt: Sequence[int], new: Sequence[int], temperature: float) -> Tensor:
    """Sums over the new tokens: log p + H(p) and its variance, hits of the most likely token minus max p and its."""
    ids = torch.tensor([[*prompt, *new]], device=base.get_input_embeddings().weight.device)
    logits = base(input_ids=ids, logits_to_keep=len(new) + 1, use_cache=False).logits[0, :-1].double().cpu()
    log_p = (logits / temperature).log_softmax(-1)
    p, tokens = log_p.exp(), torch.tensor(new)
    entropy = -(p * log_p).sum(-1)
    chosen = log_p.gather(-1, tokens[:, None])[:, 0]
    most, best = p.max(-1)
    return torch.stack(
        [
            (chosen + entropy).sum(),
            ((p * log_p.square()).sum(-1) - entropy.square()).sum(),
            ((tokens == best).double() - most).sum(),
            (most * (1 - most)).sum(),
        ]
    )


@contextlib.contextmanager
def point_mass(drafter: PreTrainedModel) -> Iterator[None]:
    """Give the drafter's most likely token all of its probability, so that accepting it by p/q is exact."""

    def hook(module, args, output):
        best = output.logits.argmax(-1, keepdim=True)
        output.logits = torch.full_like(output.logits, -math.inf).scatter_(-1, best, 0.0)
        return output

    handle = drafter.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
