"""Greedy texts of many prompts at once, and what a drafter would have saved on them.

While an engine decodes greedily, a draft counts only as long as it is the base's own token. So what it accepts can be
read off the base's finished text: a row's drafts are teacher forced on it, and the walk goes from each verification to
the next. That is :func:`joint_train.evaluate.decoding.decode` with ``engine=True``, in one forward of many texts; a
test holds the two together.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from joint_train.evaluate.decoding import end_tokens
from joint_train.pair.model import JointModel


@torch.no_grad()
def greedy_texts(
    base: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch: int = 50
) -> list[list[int]]:
    """The base's greedy text of each prompt: the new tokens, with the end token if there is one."""
    pad, ends = base.config.get_text_config().pad_token_id, end_tokens(base)
    texts = []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        width = max(map(len, part))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in part])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        out = base.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
        for new in out[:, width:].tolist():
            end = next((i for i, token in enumerate(new) if token in ends), len(new))
            texts.append(new[: end + 1])
    return texts


@torch.no_grad()
def verifications(
    pair: JointModel, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], batch: int = 25
) -> list[list[int]]:
    """For each prompt, the tokens that each verification settles while greedy decoding makes its text."""
    settled = []
    for first in range(0, len(prompts), batch):
        part = [[*p, *t] for p, t in zip(prompts[first : first + batch], texts[first : first + batch], strict=True)]
        ids = pad_sequence([torch.tensor(p) for p in part], batch_first=True)
        drafts = torch.stack([x.argmax(-1) for x in pair(ids, return_logits=True).drafter_logits], -1)  # [B, S, K]
        for row, tokens, prompt in zip(drafts.tolist(), part, prompts[first : first + batch], strict=True):
            settled.append(list(walk(row, tokens, len(prompt))))
    return settled


def walk(drafts: Sequence[Sequence[int]], tokens: Sequence[int], newest: int) -> Iterator[int]:
    """Yield the tokens that each verification settles.

    Args:
        drafts: `[S, K]`; those of row t guess the tokens from t + 2 on.
        tokens: prompt and text.
        newest: position of the text's first token, which the prompt's own forward settles.
    """
    last = len(tokens) - 1
    while newest < last:
        # The base gives one token itself, so no more drafts are made than leave room for it.
        guesses = zip(drafts[newest - 1], tokens[newest + 1 : last], strict=False)
        accepted = next((i for i, (draft, token) in enumerate(guesses) if draft != token), None)
        if accepted is None:
            accepted = min(len(drafts[newest - 1]), last - newest - 1)
        yield accepted + 1
        newest += accepted + 1


def ngrams(text: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    """How often each run of n tokens occurs in a text."""
    return Counter(zip(*(text[i:] for i in range(n)), strict=False))


def variety(texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """How varied the texts are.

    Returns:
        ``distinct_n``: different n-grams over all n-grams, of all texts together (Li et al. 2016); ``repeated_4``:
        share of 4-grams that occurred earlier in the same text (Welleck et al. 2020, seq-rep-4).
    """
    found = {}
    for n in (2, 3):
        counts = sum((ngrams(text, n) for text in texts), Counter())
        found[f"distinct_{n}"] = len(counts) / max(1, counts.total())
    counts = [ngrams(text, 4) for text in texts]
    found["repeated_4"] = 1 - sum(map(len, counts)) / max(1, sum(c.total() for c in counts))
    return found


@torch.no_grad()
def compared(
    base: PreTrainedModel, reference: PreTrainedModel, rows: Sequence[tuple[list[int], list[bool]]], batch: int = 25
) -> dict[str, list[float]]:
    """Sums over each row's targets, in nats: ``loss`` (cross-entropy), ``kl`` (of the base from the reference, expected
    under the reference), the base's ``entropy``; and ``targets``, how many there are.

    Args:
        rows: (tokens, which of them are targets).
    """
    sums: dict[str, list[float]] = {name: [] for name in ("loss", "kl", "entropy", "targets")}
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        ids = pad_sequence([torch.tensor(tokens) for tokens, _ in part], batch_first=True)
        mask = pad_sequence([torch.tensor(targets) for _, targets in part], batch_first=True)[:, 1:]
        log_p, log_r = (log_probabilities(model, ids) for model in (base, reference))
        loss = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
        values = {
            "loss": loss,
            "kl": (log_r.exp() * (log_r - log_p)).sum(-1),
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "targets": torch.ones_like(loss),
        }
        for name, value in values.items():
            sums[name] += (value * mask).sum(-1).tolist()
    return sums


def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """fp32 ``[B, S-1, V]``: row t predicts token t + 1. Padding is on the right, where causality hides it."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)


@torch.no_grad()
def expected_lengths(
    pair: JointModel, rows: Sequence[tuple[list[int], list[bool]]], batch: int = 25
) -> dict[str, list[float]]:
    """How many tokens a verification settles when drafts are sampled, teacher forced on each text.

    A draft that is a sample of q is accepted with probability ``a = sum_v min(p, q)``, where p is the base's
    distribution for the same token; so a verification settles ``1 + a_0 + a_0 a_1 + …`` tokens. Every row counts where
    decoding can stop: the token that it starts from, and those that its K drafts guess, are targets.

    Args:
        rows: (tokens, which of them are targets).

    Returns:
        Sums over each text's rows: ``lengths``, and ``rows``, how many there are.
    """
    sums: dict[str, list[float]] = {"lengths": [], "rows": []}
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        ids = pad_sequence([torch.tensor(tokens) for tokens, _ in part], batch_first=True)
        targets = pad_sequence([torch.tensor(targets) for _, targets in part], batch_first=True)
        out = pair(ids, return_logits=True)
        assert out.logits is not None
        p, rounds = out.logits.float().softmax(-1), len(out.drafter_logits)
        size = ids.shape[1] - rounds - 1  # rows whose drafts all guess a token of the text
        counted = torch.stack([targets[:, 1 + k : 1 + k + size] for k in range(rounds + 1)]).all(0)
        length, accepted = torch.ones_like(counted, dtype=p.dtype), torch.ones_like(counted, dtype=p.dtype)
        for k, logits in enumerate(
            out.drafter_logits
        ):  # of row t for token t + 2 + k, which the base's row t + 1 + k has
            q = logits[:, :size].float().softmax(-1)
            accepted = accepted * torch.minimum(p[:, 1 + k : 1 + k + size], q).sum(-1)
            length = length + accepted
        sums["lengths"] += (length * counted).sum(-1).tolist()
        sums["rows"] += counted.sum(-1).double().tolist()
    return sums
