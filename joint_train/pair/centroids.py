"""Ordered embeddings: the centroids by which a drafter's generation chooses the tokens that it scores."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
