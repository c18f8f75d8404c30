"""The masks, position by position, against the rules written out."""

from types import SimpleNamespace

import pytest
import torch

from joint_train.pair.visibility import attention_masks

LENGTH, WINDOW = 24, 5


def sees(kind: str, t: int, j: int, documents: list[int], blocks: list[int]) -> bool:
    if documents[t] != documents[j]:
        return False
    if kind == "full_attention":
        return j <= t
    return t - j < WINDOW and (j <= t or blocks[t] == blocks[j] >= 0)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_masks_are_the_rules(packed, images):
    documents = [[1] * LENGTH] * 2
    if packed:
        documents = [[1] * 10 + [2] * 9 + [0] * 5, [1] * 3 + [2] * 21]
    blocks = [[-1] * LENGTH] * 2
    if images:  # longer than the window, and one that goes on where the next document begins
        blocks = [[-1] * 2 + [0] * 7 + [1] * 4 + [-1] * 11, [0] * 6 + [-1] * 6 + [1] * 3 + [-1] * 9]
    masks = attention_masks(
        SimpleNamespace(sliding_window=WINDOW, _attn_implementation="sdpa"),
        (2, LENGTH),
        torch.float32,
        torch.device("cpu"),
        torch.tensor(documents) if packed else None,
        torch.tensor(blocks) if images else None,
    )
    for kind in ("full_attention", "sliding_attention"):
        mask = masks[kind]
        if mask is None:  # plain causality
            assert kind == "full_attention" and not packed
            continue
        mask = mask.expand(2, 1, LENGTH, LENGTH)
        for b in range(2):
            for t in range(LENGTH):
                expected = [sees(kind, t, j, documents[b], blocks[b]) for j in range(LENGTH)]
                if documents[b][t] > 0:
                    assert mask[b, 0, t].tolist() == expected, (kind, b, t)
