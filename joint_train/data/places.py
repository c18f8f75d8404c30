"""Which tokens of a text are those of its answers, found without asking the tokenizer for the place of every token.

A tokenizer takes the special tokens out of a text first, and what is between two of them can't become one token with
what is outside. So the special tokens of a text show where the tokens between them begin, and of those only the few
between the last special token and an answer (``model`` and a line break) have to be counted. Making the tokens alone
takes two thirds of the time of making them with their places.
"""

from bisect import bisect_right
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from joint_train.data.render import Span, encoding, special_pattern, token_ids

LONGEST_GAP = 100
"""Characters between a special token and an answer."""
MOST_GAPS = 1000
"""Texts between them that are remembered; a template has a few."""


class _Special:
    """The special tokens of a tokenizer (those that are white space apart).

    Attributes:
        size: of the vocabulary for which they were found.
        ids: of each.
        among: ``[V]`` bool, whether a token is one of them.
        clear: none of them takes white space from beside it.
        gaps: tokens of the texts between one and an answer; None where the places of the tokens leave something out.
    """

    def __init__(self, tokenizer):
        added = {str(token): (id, token) for id, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
        self.size = len(tokenizer)
        self.ids = {text: id for text, (id, _) in added.items()}
        self.among = np.zeros(max(self.size, *self.ids.values(), 0) + 1, dtype=bool)
        self.among[[*self.ids.values()]] = True
        self.clear = not any(token.lstrip or token.rstrip for _, token in added.values())
        self.gaps: dict[str, list[int] | None] = {}

    def of_gap(self, tokenizer, gap: str) -> list[int] | None:
        """The tokens of a text that follows a special token."""
        if gap not in self.gaps:
            if len(self.gaps) >= MOST_GAPS:
                self.gaps.clear()
            encoded = encoding(tokenizer, gap)
            whole = encoded.offsets and encoded.offsets[0][0] == 0 and encoded.offsets[-1][1] == len(gap)
            self.gaps[gap] = encoded.ids if whole else None
        return self.gaps[gap]


_SPECIAL: WeakKeyDictionary[Any, _Special] = WeakKeyDictionary()


def tokens_of(tokenizer, text: str, spans: list[Span]) -> tuple[np.ndarray, list[Span]] | None:
    """The tokens of a text, ``[T]`` int32, and which of them, [first, last), are those of each span of characters.

    Returns:
        None where special tokens don't show it beyond doubt: a span begins far from one or ends elsewhere, a token
        holds characters of the span and others, or a span begins or ends with white space, which some tokenizers count
        to no token.
    """
    special = _SPECIAL.get(tokenizer)
    if special is None or special.size != len(tokenizer):
        special = _SPECIAL[tokenizer] = _Special(tokenizer)
    if not special.clear:
        return None
    if any(start >= end or text[start].isspace() or text[end - 1].isspace() for start, end in spans):
        return None
    ids = np.asarray(token_ids(tokenizer, text), dtype=np.int32)
    at = special.among[ids].nonzero()[0]
    matches = list(special_pattern(tokenizer).finditer(text))
    if ids[at].tolist() != [special.ids[match.group()] for match in matches]:
        return None
    # Where the text or a special token begins or ends, a token does.
    known, ends = {0: 0, len(text): len(ids)}, [0]
    for match, index in zip(matches, at.tolist(), strict=True):
        start, end = match.span()
        known[start], known[end] = index, index + 1
        ends.append(end)
    runs = []
    for start, end in spans:
        first, last = known.get(start), known.get(end)
        if first is None:
            before = ends[bisect_right(ends, start) - 1]
            gap = special.of_gap(tokenizer, text[before:start]) if start - before <= LONGEST_GAP else None
            if gap is None or ids[known[before] : known[before] + len(gap)].tolist() != gap:
                return None
            first = known[before] + len(gap)
        if last is None:
            return None
        runs.append((first, last))
    return ids, runs
