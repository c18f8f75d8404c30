"""Where drafts are accepted: early and late in an answer, after short and long contexts, in thoughts, calls and code.

A verification counts where the first of the tokens is that it settles: at its position in the answer, after the context
of all tokens before it, in the span that it belongs to.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from joint_train.evaluate.decoding import Decoded, acceptance_steps
from joint_train.evaluate.intervals import interval
from joint_train.evaluate.prompts import Prompt

WAYS = {
    "position": "position in the answer, tokens",
    "context": "length of the context, tokens",
    "span": "kind of text",
    "source": "source of the prompt",
    "language": "language of the prompt",
}
THINKING, CALLS, CODE, PLAIN = "thinking", "tool calls", "code blocks", "plain text"
FIRST_POSITION, FIRST_CONTEXT = 16, 128  # ends of the first buckets; each that follows is twice as long as all before

# What opens and closes a span, of Gemma 4's own text and of templates of other families. One without an end goes on to
# the end of the answer. In the order in which they are looked for: code in a thought is thinking.
SPANS = [
    (THINKING, re.compile(r"<\|channel>.*?(?:<channel\|>|\Z)|<think>.*?(?:</think>|\Z)", re.DOTALL)),
    (CALLS, re.compile(r"<\|tool_call>.*?(?:<tool_call\|>|\Z)|<tool_call>.*?(?:</tool_call>|\Z)", re.DOTALL)),
    (CODE, re.compile(r"^ *(`{3,}|~{3,}).*?(?:^ *\1[`~]* *$|\Z)", re.DOTALL | re.MULTILINE)),
]
OPENED = re.compile(r"(?:<\|channel>(?:thought)?|<think>)\s*\Z")  # a prompt that ends inside a thought
PROMPT_END = 32  # tokens of a prompt that are looked at for that


def where(
    prompts: Sequence[Prompt], decoded: Sequence[Decoded], tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Acceptance by each of :data:`WAYS` that the prompts allow.

    Returns:
        For each way its parts, in order: ``name``, ``verifications``, ``tokens_per_forward`` and ``first``, the share
        of verifications whose first draft was accepted; both with their intervals over prompts.
    """
    spans = [spans_of(prompt.ids, d.ids, tokenizer) for prompt, d in zip(prompts, decoded, strict=True)]
    buckets: dict[str, Callable[[int, int], tuple[int, str] | None]] = {
        "position": lambda i, at: bucket(at + 1, FIRST_POSITION),
        "context": lambda i, at: bucket(len(prompts[i].ids) + at, FIRST_CONTEXT),
        "span": lambda i, at: (0, spans[i][at]),
        "source": lambda i, at: None if (source := prompts[i].source) is None else (0, source),
        "language": lambda i, at: None if (language := prompts[i].language) is None else (0, language),
    }
    found = {}
    for way, bucket_of in buckets.items():
        parts: dict[tuple[int, str], dict[str, list[int]]] = {}
        for i, d in enumerate(decoded):
            steps, at = acceptance_steps(d), 1  # the prompt's own forward settled the first token
            for number, settled in enumerate(d.settled):
                if (key := bucket_of(i, at)) is not None:
                    empty = {name: [0] * len(decoded) for name in ("settled", "verifications", "drafted", "accepted")}
                    part = parts.setdefault(key, empty)
                    part["settled"][i] += settled
                    part["verifications"][i] += 1
                    if number < len(steps) and steps[number][0]:
                        part["drafted"][i] += 1
                        part["accepted"][i] += steps[number][1] > 0
                at += settled
        if parts:
            found[way] = [{"name": name, **_summed(parts[order, name], seed)} for order, name in sorted(parts)]
    return found


def _summed(part: Mapping[str, list[int]], seed: int) -> dict[str, Any]:
    return {
        "verifications": sum(part["verifications"]),
        "tokens_per_forward": interval([part["settled"], part["verifications"]], lambda s, v: s / v, seed),
        "first": interval([part["accepted"], part["drafted"]], lambda a, d: a / d, seed),
    }


def bucket(number: int, first: int) -> tuple[int, str]:
    """The bucket of a number from 1, as its end and its name: 1 to `first`, to twice that, and so on."""
    end = first
    while number > end:
        end *= 2
    return end, f"{1 if end == first else end // 2 + 1:,} to {end:,}"


def spans_of(prompt: Sequence[int], answer: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """For each token of an answer the span that it begins in: thinking, tool calls, code blocks or plain text."""

    def text_of(ids: Sequence[int]) -> list[str]:
        # One by one: the marks survive, whatever becomes of white space and of characters of several tokens.
        return [str(tokenizer.decode([token], skip_special_tokens=False)) for token in ids]

    opened = OPENED.search("".join(text_of(prompt[-PROMPT_END:])))
    before, pieces = opened.group() if opened else "", text_of(answer)
    text = before + "".join(pieces)
    names = [PLAIN] * (len(text) + 1)
    for name, pattern in reversed(SPANS):
        for match in pattern.finditer(text):
            names[match.start() : match.end()] = [name] * (match.end() - match.start())
    found, at = [], len(before)
    for piece in pieces:
        found.append(names[at])
        at += len(piece)
    return found
