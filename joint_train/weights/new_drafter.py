"""A drafter for a base that none was released for: its sizes follow from the base, its first weights from the base's.

What a drafter shares with its base is given: the vocabulary, and for each attention type that it reads the head size,
the number of key/value heads, the rotary settings and the window. What is free is its width, its layers and its heads;
the defaults are those of the released drafters of bases of that width.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel

from joint_train.errors import ConfigError
from joint_train.pair.compatibility import check_pair
from joint_train.weights.folders import DRAFTERS
from joint_train.weights.loading import build_meta, match, stored_tensors

log = logging.getLogger(__name__)

SLIDING, FULL = "sliding_attention", "full_attention"
LAYERS = (SLIDING, SLIDING, SLIDING, FULL)  # of every released drafter
CENTROIDS, TOP_K = 2048, 32  # of the released drafters with ordered embeddings
# Settings of a base's text configuration that a drafter's has as well.
SHARED = (
    "attention_bias", "attention_k_eq_v", "bos_token_id", "eos_token_id", "hidden_activation", "initializer_range",
    "max_position_embeddings", "pad_token_id", "rms_norm_eps", "rope_parameters", "sliding_window", "vocab_size",
)  # fmt: skip
CHUNK = 16_384  # rows of the embedding that are read at once


def drafter_config(
    base: PreTrainedConfig,
    like: PreTrainedConfig | None = None,
    *,
    layers: Sequence[str] | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    ordered: bool | None = None,
    num_centroids: int | None = None,
    top_k: int | None = None,
) -> PreTrainedConfig:
    """The configuration of a drafter for a base.

    Args:
        base: the base's configuration.
        like: a drafter whose layers, width, heads and ordering are taken where no argument says otherwise.
        layers: attention types, first layer first; by default as in the released drafters, of those that the base
            stores keys and values for.
        hidden_size: by default 256 for bases up to a width of 2560 and 1024 above, at most half of the base's.
        intermediate_size: by default 8 times the width.
        num_attention_heads: by default the base's, or half of them at a width of 256 or less.
        ordered: score only the tokens of the top centroids (ordered embeddings), which saves time in serving.
        num_centroids, top_k: of ordered embeddings, by default 2048 and 32.

    Raises:
        ConfigError: for sizes that can't work, saying which.
    """
    text, pattern = base.get_text_config(), like and like.get_text_config()
    stored = _stored_layers(text)
    if layers is None:
        layers = [kind for kind in (pattern.layer_types if pattern else LAYERS) if kind in stored]
    if not layers or not set(layers) <= set(stored):
        raise ConfigError(
            f"layers={', '.join(layers)}: a drafter needs at least one layer, and each reads the keys and values of a "
            f"layer of its type; the base computes them for {', '.join(sorted(stored))}."
        )
    if hidden_size is None:
        hidden_size = (
            pattern.hidden_size if pattern else min(256 if text.hidden_size <= 2560 else 1024, text.hidden_size // 2)
        )
    if intermediate_size is None:
        intermediate_size = pattern.intermediate_size if pattern else 8 * hidden_size
    kv_heads = {kind: stored[kind].num_key_value_heads for kind in layers}
    if num_attention_heads is None:
        most = max(kv_heads.values())
        narrow = hidden_size <= 256 and text.num_attention_heads // 2 >= most
        num_attention_heads = (
            pattern.num_attention_heads if pattern else text.num_attention_heads // (2 if narrow else 1)
        )
    for kind, number in kv_heads.items():
        if num_attention_heads % number:
            raise ConfigError(
                f"num_attention_heads={num_attention_heads}: the base's {kind} layers have {number} key/value heads, "
                "and each needs the same number of query heads. Give a multiple of it."
            )
    if ordered is None:
        ordered = bool(like and like.use_ordered_embeddings)
    centroids = num_centroids or (like.num_centroids if like and like.use_ordered_embeddings else CENTROIDS)
    active = top_k or (like.centroid_intermediate_top_k if like and like.use_ordered_embeddings else TOP_K)
    if ordered and (text.vocab_size % centroids or not 0 < active <= centroids):
        raise ConfigError(
            f"ordered embeddings: {centroids} centroids of equal size have to divide the vocabulary of "
            f"{text.vocab_size} tokens, and {active} of them are looked at. Give --centroids a divisor of it, and "
            "--top-k at most as many."
        )
    heads: dict[str, Any] = {}
    if SLIDING in stored:
        heads |= dict(head_dim=stored[SLIDING].head_dim, num_key_value_heads=stored[SLIDING].num_key_value_heads)
    if FULL in stored:
        heads |= dict(
            global_head_dim=stored[FULL].head_dim, num_global_key_value_heads=stored[FULL].num_key_value_heads
        )
    family = "gemma4_unified" if base.model_type.startswith("gemma4_unified") else "gemma4"
    own = dict(
        hidden_size=hidden_size, intermediate_size=intermediate_size, num_attention_heads=num_attention_heads,
        num_hidden_layers=len(layers), num_kv_shared_layers=len(layers), layer_types=list(layers),
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, final_logit_softcapping=None,
    )  # fmt: skip
    shared = {name: getattr(text, name) for name in SHARED if getattr(text, name, None) is not None}
    config_class: Any = CONFIG_MAPPING[f"{family}_assistant"]
    config = config_class(
        text_config=CONFIG_MAPPING[f"{family}_text"](**shared | heads | own),
        backbone_hidden_size=text.hidden_size,
        use_ordered_embeddings=ordered,
        **(dict(num_centroids=centroids, centroid_intermediate_top_k=active) if ordered else {}),
    )
    check_pair(base, config)
    return config


def _stored_layers(text: PreTrainedConfig) -> dict[str, Any]:
    """The sizes of the last layer of each attention type that computes its own keys and values."""
    own = text.layer_types[: text.num_hidden_layers - text.num_kv_shared_layers]
    return {kind: text.per_layer_config[number] for number, kind in enumerate(own)}


@torch.no_grad()
def new_drafter(
    base: PreTrainedConfig, folder: Path, config: PreTrainedConfig, seed: int = 0, projected: bool = True
) -> PreTrainedModel:
    """A drafter of this configuration, its weights in float32.

    With ``projected`` its head is the base's embedding seen along the embedding's first ``H_d`` principal directions,
    so that like tokens begin alike; else it is random. (Projections into and out of the drafter along the same
    directions were tried as well, and learnt more slowly than random ones.) Query norms are those of the base's layers
    whose keys are read. The layers are random, and what they add begins small.

    Args:
        base: the base's configuration.
        folder: of the base's weights, of which the embedding and two norms are read.
        config: of :func:`drafter_config`.
        seed: of the random weights.

    Raises:
        WeightsError: the folder's weights don't fit its configuration.
    """
    torch.manual_seed(seed)
    drafter: Any = DRAFTERS[config.model_type](config).float().eval()
    drafter.generation_config = GenerationConfig(num_assistant_tokens=4)
    text = config.get_text_config()
    layers = drafter.model.layers
    for layer in layers:  # each adds less than what is there
        layer.post_attention_layernorm.weight.fill_(0.3)
        layer.post_feedforward_layernorm.weight.fill_(0.3)
    base_weights = BaseWeights(base, folder)
    for layer, kind in zip(layers, text.layer_types, strict=True):
        layer.self_attn.q_norm.weight.copy_(base_weights.query_norm(kind))
    head = drafter.get_input_embeddings().weight
    if projected:
        base_weights.project_embedding(base_weights.principal_directions(text.hidden_size), head)
    if drafter.masked_embedding is not None:
        ordering, centroids = balanced_clusters(head, config.num_centroids, seed)
        drafter.masked_embedding.token_ordering.copy_(ordering)
        drafter.masked_embedding.centroids.weight.copy_(centroids)
    return drafter


class BaseWeights:
    """The few weights of a base that a new drafter begins with, read from its folder."""

    def __init__(self, config: PreTrainedConfig, folder: Path) -> None:
        self.text = config.get_text_config()
        model: Any = build_meta(config, torch.float32)
        stored = stored_tensors(folder)
        names = {name: key for key, name in match(model, stored, folder).items()}
        tensors = model.state_dict(keep_vars=True)

        def key_of(tensor: Tensor) -> str:
            return next(names[name] for name, other in tensors.items() if other is tensor and name in names)

        self.embedding = key_of(model.get_input_embeddings().weight)
        layers = model.get_decoder().layers
        own = self.text.num_hidden_layers - self.text.num_kv_shared_layers
        self.norms = {
            kind: key_of(layers[number].self_attn.q_norm.weight)
            for number, kind in enumerate(self.text.layer_types[:own])
        }
        self.stored = stored

    def query_norm(self, kind: str) -> Tensor:
        """``[head_dim]``, of the last layer of this attention type that computes its own keys."""
        return self.stored[self.norms[kind]].whole().float()

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """The embedding in pieces: (first row, ``[rows, H_b]`` in float32)."""
        table = self.stored[self.embedding].slices()
        for first in range(0, table.get_shape()[0], CHUNK):
            yield first, table[first : first + CHUNK].float()

    def principal_directions(self, count: int) -> Tensor:
        """The orthonormal directions ``[H_b, count]`` along which the embedding's rows are largest."""
        width = self.text.hidden_size
        moments = torch.zeros(width, width, dtype=torch.float64)
        for _, rows in self.rows():
            moments += (rows.T @ rows).double()
        return torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :count].float()

    def project_embedding(self, directions: Tensor, head: Tensor) -> None:
        """Fill ``head [V, H_d]`` with the embedding along these directions, scaled so that logits begin of size 1."""
        squares = 0.0
        for first, rows in self.rows():
            head[first : first + len(rows)] = rows @ directions
            squares += head[first : first + len(rows)].square().sum().item()
        head *= (len(head) / squares) ** 0.5


@torch.no_grad()
def balanced_clusters(head: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clusters of equal size of a head's rows, by direction.

    k-means (scikit-learn's) finds the centres. Then every token goes to the nearest centre that has room, and where
    more tokens want a centre than it takes, the nearest ones get it.

    Args:
        head: ``[V, H]``.
        count: of clusters; divides V.

    Returns:
        The tokens in the order of their clusters, ``[V]`` int64, and the clusters' means ``[count, H]``.

    Raises:
        ConfigError: scikit-learn isn't installed.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError:
        raise ConfigError("--ordered needs the scikit-learn package: pip install 'joint-train[cluster]'") from None
    directions = torch.nn.functional.normalize(head.float(), dim=-1)
    batch = max(4096, 4 * count)
    fitted = MiniBatchKMeans(count, batch_size=batch, n_init=1, max_iter=20, random_state=seed).fit(directions.numpy())
    centres = torch.nn.functional.normalize(torch.from_numpy(fitted.cluster_centers_).float(), dim=-1)
    cluster = assign_clusters(directions, centres)
    ordering = cluster.argsort(stable=True)
    return ordering, head.float()[ordering].view(count, -1, head.shape[1]).mean(1)


def assign_clusters(directions: Tensor, centres: Tensor) -> Tensor:
    """The centre of each row, ``[V]`` int64, every centre taking V / C rows of ``directions [V, H]``.

    Gale and Shapley's deferred acceptance: a row asks the nearest centre that may still take it, a centre keeps the
    nearest of those that asked. In the end no row and centre would both rather have each other.
    """
    room = len(directions) // len(centres)
    floor = torch.full((len(centres),), -torch.inf)  # what a row has to be nearer than: a full centre's farthest row
    cluster, likeness = torch.full((len(directions),), -1), torch.zeros(len(directions))
    while (left := (cluster < 0).nonzero()[:, 0]).numel():
        for rows in left.split(CHUNK):
            near = directions[rows] @ centres.T
            likeness[rows], cluster[rows] = near.masked_fill_(near <= floor, -torch.inf).max(-1)
        nearest_first = likeness.argsort(descending=True, stable=True)
        order = nearest_first[cluster[nearest_first].argsort(stable=True)]  # by centre, there the nearest first
        rank = torch.arange(len(order)) - torch.searchsorted(cluster[order].contiguous(), cluster[order])
        last = order[rank == room - 1]
        floor[cluster[last]] = likeness[last]
        cluster[order[rank >= room]] = -1
    return cluster
