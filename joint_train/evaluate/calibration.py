"""Does the drafter know when it is right: acceptance against its confidence, and what stopping at low confidence does.

A draft's confidence is the drafter's largest probability. Engines can stop drafting where it is low (llama.cpp's
``--draft-p-min``): a rejected draft costs a round of the drafter and a token in the base's forward.
"""

from collections.abc import Sequence
from typing import Any

from joint_train.evaluate.decoding import Decoded, acceptance_steps
from joint_train.evaluate.intervals import interval

BINS = 10


def reliability(decoded: Sequence[Decoded], seed: int) -> dict[str, Any]:
    """Acceptance by confidence, of the drafts that were looked at: those with all before them accepted.

    Returns:
        ``bins``: for each tenth of confidence, its ends, the mean confidence of its drafts, how many there are and the
        share of them that was accepted, with its interval over prompts; ``error``: the mean distance of confidence and
        share, weighted by the number of drafts (the expected calibration error), or None without drafts.
    """
    none = [0] * len(decoded)
    bins: list[dict[str, Any]] = [{"sum": 0.0, "drafts": [*none], "accepted": [*none]} for _ in range(BINS)]
    for i, text in enumerate(decoded):
        for (drafts, accepted), confidences in zip(acceptance_steps(text), text.confidences, strict=False):
            for k, confidence in enumerate(confidences[: min(drafts, accepted + 1)]):
                into = bins[min(int(confidence * BINS), BINS - 1)]
                into["sum"] += confidence
                into["drafts"][i] += 1
                into["accepted"][i] += k < accepted
    found = []
    for b, one in enumerate(bins):
        count = sum(one["drafts"])
        found.append(
            {
                "from": b / BINS,
                "to": (b + 1) / BINS,
                "drafts": count,
                "confidence": one["sum"] / count if count else None,
                "accepted": interval([one["accepted"], one["drafts"]], lambda a, d: a / d, seed),
            }
        )
    total = sum(one["drafts"] for one in found)
    distances = [one["drafts"] * abs(one["confidence"] - one["accepted"]["value"]) for one in found if one["drafts"]]
    return {"bins": found, "error": sum(distances) / total if total else None}


def stopped(decoded: Sequence[Decoded], threshold: float, seed: int) -> dict[str, Any]:
    """Decoding that stops drafting at a confidence below ``threshold``."""
    settled, verifications = [sum(d.settled) for d in decoded], [len(d.settled) for d in decoded]
    drafts, tokens = [sum(d.drafted) for d in decoded], [len(d.ids) for d in decoded]
    accepted = [s - v for s, v in zip(settled, verifications, strict=True)]
    return {
        "threshold": threshold,
        "tokens_per_forward": interval([settled, verifications], lambda s, v: s / v, seed),
        "drafts_per_forward": interval([drafts, verifications], lambda d, v: d / v, seed),
        "accepted": interval([accepted, drafts], lambda a, d: a / d, seed),
        "tokens_per_second": interval([tokens, [d.seconds for d in decoded]], lambda t, s: t / s, seed),
    }
