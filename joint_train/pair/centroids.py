"""Ordered embeddings: the centroids by which a drafter's generation chooses the tokens that it scores."""

from dataclasses import dataclass

import torch
from torch import Tensor

from joint_train.pair.distribution import Distribution


@dataclass
class Centroids:
    """The routing of a drafter with ordered embeddings (`masked_embedding` of transformers' Gemma 4 assistant)."""

    weight: Tensor  # [C, H_d], `masked_embedding.centroids.weight`
    token_centroid: Tensor  # int64 [V], from :func:`token_centroids`
    top_k: int  # `centroid_intermediate_top_k`: centroids whose tokens generation scores


def token_centroids(token_ordering: Tensor, num_centroids: int) -> Tensor:
    """The centroid of each token, int64 `[V]`: ``token_ordering.view(C, V/C)`` lists the tokens of each centroid.

    Raises ValueError if `token_ordering` isn't a permutation of the vocabulary (in a drafter built from a
    configuration, not loaded, it is all zeros).
    """
    ordering = token_ordering.long().flatten()
    size = ordering.numel()
    if size % num_centroids or not torch.equal(ordering.sort().values, torch.arange(size, device=ordering.device)):
        raise ValueError(
            f"the drafter's token_ordering must hold each of its {size} tokens once, in {num_centroids} centroids of "
            "equal size: load a drafter with ordered embeddings, or set use_ordered_embeddings to false"
        )
    centroids = torch.empty_like(ordering)
    centroids[ordering] = torch.arange(size, device=ordering.device) // (size // num_centroids)
    return centroids


def routed(q: Distribution, scores: Tensor, centroids: Centroids, out: Tensor | None) -> Distribution:
    """What engines draft from: q over the tokens of the `top_k` best centroids alone, as transformers' and vLLM's
    masked embedders have it.

    Args:
        q: over the whole vocabulary, n rows of it.
        scores: `[n, C]`, the logits of the centroids.
        out: `[n, V]`, overwritten: it holds the probabilities; None: a new tensor does. q's tensors stay as they are.

    Returns:
        A distribution whose `logits` are those of q, for candidates and others alike, and whose `logsumexp` is that of
        the candidates.
    """
    best = scores.topk(centroids.top_k).indices
    penalty = torch.full_like(scores, -torch.inf).scatter_(1, best, 0.0)
    out = torch.index_select(penalty, 1, centroids.token_centroid, out=out).add_(q.logits)
    largest, argmax = out.max(-1)
    total = out.sub_(largest[:, None]).exp_().sum(-1)
    return Distribution(q.logits, out.div_(total[:, None]), argmax, largest + total.log())
