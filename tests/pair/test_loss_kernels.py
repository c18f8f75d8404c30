"""How many kernels inductor makes for an H100 of what is computed of a chunk's logits."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from cards import H100, lowered  # noqa: E402

from joint_train.config import LossConfig  # noqa: E402
from joint_train.pair import loss, terms  # noqa: E402
from joint_train.pair.centroids import Centroids  # noqa: E402
from joint_train.pair.targets import joint_targets  # noqa: E402
from joint_train.pair.terms import Mix, _base, _gather, _round  # noqa: E402

ROWS, VOCABULARY, CENTROIDS = 1024, 262_144, 2048
MIX = Mix({"lk_hybrid": 1.0}, 0.0, 0.0, 1.0, 0.0)


def product_and_rows() -> tuple[torch.Tensor, ...]:
    return torch.empty(ROWS, VOCABULARY), torch.zeros(ROWS, dtype=torch.long), torch.empty(ROWS)


def kernels_of(card=H100) -> dict[str, int]:
    """Of each of the loss's compiled functions, a round with ordered embeddings; its top k is torch's own."""

    def base(product, labels, scale):
        return _base(product, labels, scale, 30.0, torch.bfloat16)

    def round_of(p, argmax, logsumexp, product, labels, scale, scores=None, token_centroid=None, weight=None):
        centroids = None if scores is None else Centroids(weight, token_centroid, 32)
        terms = p, argmax, logsumexp, product, labels, scale, scores, centroids, None, None
        return _round(MIX, *terms, (30.0, None), torch.bfloat16)

    def inputs():
        p, argmax, logsumexp = product_and_rows()
        return p, argmax, logsumexp, *product_and_rows()

    def routed_inputs():
        routing = torch.empty(ROWS, CENTROIDS), torch.zeros(VOCABULARY, dtype=torch.long), torch.empty(CENTROIDS, 256)
        return *inputs(), *routing

    def gathered():
        states = torch.empty(4 * ROWS, 256, dtype=torch.bfloat16)
        return states, torch.zeros(ROWS, dtype=torch.long), torch.ones(ROWS, dtype=torch.bool)

    of = {"_gather": (_gather, gathered), "_base": (base, product_and_rows), "dense": (round_of, inputs)}
    of["_round"] = round_of, routed_inputs
    return {name: len(lowered(card, *one)) for name, one in of.items()}


class Operations(TorchDispatchMode):
    """How many operations that aren't views run."""

    def __init__(self):
        super().__init__()
        self.names, self.compiled = Counter(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        if not views and not self.compiled and "empty" not in str(func):
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_launches_of_a_chunk(monkeypatch):
    """Eagerly a chunk with K = 4 rounds and ordered embeddings is some 500 operations."""
    kernels = kernels_of()
    assert kernels["_gather"] == 1 and kernels["_base"] <= 2 and kernels["dense"] <= 2 and kernels["_round"] <= 4
    counted, chunk = Operations(), loss.Pass._chunk

    def compiled(function):
        def run(*args):
            counted.names[function.__name__] += kernels[function.__name__] + (function is _round)  # the top k
            counted.compiled = True
            try:
                return function(*args)
            finally:
                counted.compiled = False

        return run

    def counted_chunk(*args):
        with counted:
            chunk(*args)

    monkeypatch.setattr(terms, "compiled", compiled)
    monkeypatch.setattr(loss.Pass, "_chunk", counted_chunk)
    rows, vocabulary, width = 24, 64, 16
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    labels = torch.randint(vocabulary, (1, rows), generator=generator)
    targets = joint_targets(labels, None, 4, "serving")
    centroids = Centroids(leaf(8, width), torch.arange(vocabulary) // 8, 2)
    states = [leaf(1, rows, width) for _ in range(4)]
    settings = LossConfig(compile=True, drafter="lk_hybrid")
    heads = leaf(1, rows, width), leaf(vocabulary, width), states, leaf(vocabulary, width)
    groups = torch.zeros(len(targets.rows), dtype=torch.long)
    loss.joint_loss(*heads, targets, torch.ones(5), settings, 30.0, None, centroids, groups=groups, num_groups=1)
    print(counted.names)
    assert sum(counted.names.values()) <= 60
