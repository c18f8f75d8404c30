"""How many kernels inductor makes for an H100 of what is computed of a chunk's logits."""

import pytest
import torch

pytest.importorskip("triton")

from cards import H100, lowered  # noqa: E402

from joint_train.pair.centroids import Centroids  # noqa: E402
from joint_train.pair.terms import Mix, _base, _round  # noqa: E402

ROWS, VOCABULARY, CENTROIDS = 1024, 262_144, 2048
MIX = Mix({"lk_hybrid": 1.0}, 0.0, 0.0, 1.0, 0.0)


def product_and_rows() -> tuple[torch.Tensor, ...]:
    numbers = torch.empty(ROWS)
    return torch.empty(ROWS, VOCABULARY), torch.zeros(ROWS, dtype=torch.long), numbers, numbers.clone()


def test_the_base_and_a_round_are_few_kernels():
    """Eagerly a chunk with K = 4 rounds and ordered embeddings is 495 operations, 300 of them these."""

    def base(product, labels, mask, scale):
        return _base(product, labels, mask, scale, 30.0, torch.bfloat16)

    def round_of(p, argmax, logsumexp, product, labels, mask, scale, scores=None, token_centroid=None, weight=None):
        centroids = None if scores is None else Centroids(weight, token_centroid, 32)
        terms = p, argmax, logsumexp, product, labels, mask, scale, scores, centroids, None
        return _round(MIX, *terms, (30.0, None), torch.bfloat16)

    def inputs():
        p, argmax, logsumexp, _ = product_and_rows()
        return p, argmax, logsumexp, *product_and_rows()

    def routed_inputs():
        routing = torch.empty(ROWS, CENTROIDS), torch.zeros(VOCABULARY, dtype=torch.long), torch.empty(CENTROIDS, 256)
        return *inputs(), *routing

    assert len(lowered(H100, base, product_and_rows)) <= 3
    assert len(lowered(H100, round_of, inputs)) <= 2
    assert len(lowered(H100, round_of, routed_inputs)) <= 4
