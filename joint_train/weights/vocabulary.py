"""``model.resize_vocabulary``: more rows in everything that has one for each token, in base and drafter together.

A new row is the mean of the table's rows, as transformers begins one. A drafter with ordered embeddings lists the
tokens of each centroid, and engines read these lists as equally long: so the vocabulary grows by the same number of
tokens for each centroid, and each new token joins the centroid nearest to its embedding that has room.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from joint_train.errors import ConfigError, WeightsError
from joint_train.weights.loading import stored_tensors

log = logging.getLogger(__name__)

CHUNK = 4096  # new tokens whose centroids are looked for at once
MULTIPLE = 64  # of the rows of a grown table: products with other sizes are slow on a GPU


def highest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest id that a tokenizer can give."""
    return max(tokenizer.get_vocab().values())


def table_rows(config: PreTrainedConfig) -> list[int]:
    """Rows of a model's tables by token, as its configuration has them."""
    text = config.get_text_config()
    per_layer = getattr(text, "hidden_size_per_layer_input", 0)
    return [text.vocab_size, *([text.vocab_size_per_layer_input] if per_layer else [])]


def rows_needed(base: PreTrainedConfig, drafter: PreTrainedConfig, least: int) -> int:
    """Rows that all tables of a pair get: enough for the largest of them and for `least`.

    What grows is rounded up to a multiple of :data:`MULTIPLE`, and with ordered embeddings to one of the centroids.
    """
    have = [*table_rows(base), drafter.get_text_config().vocab_size]
    rows = max(*have, least)
    multiple = MULTIPLE if rows > max(have) else 1
    if drafter.use_ordered_embeddings:
        multiple = drafter.num_centroids
    return -(-rows // multiple) * multiple


def grown_ordering(ordering: Tensor, centroids: Tensor, new_rows: Tensor) -> Tensor:
    """The ``token_ordering`` of a drafter whose vocabulary grows: in the order of their ids, each new token joins the
    centroid nearest to its embedding, by direction, that has room.

    Args:
        ordering: ``[V]`` int64, ``ordering.view(C, V / C)`` being the tokens of each centroid.
        centroids: ``[C, H]``.
        new_rows: ``[N, H]``, the embeddings of the new tokens; C divides N.

    Returns:
        ``[V + N]`` int64, the old tokens at their centroids.
    """
    directions = torch.nn.functional.normalize(centroids.float(), dim=-1).T
    room = torch.full((len(centroids),), len(new_rows) // len(centroids))
    members: list[list[int]] = [[] for _ in centroids]
    for first, rows in enumerate(new_rows.split(CHUNK)):
        for token, likeness in enumerate(rows.float() @ directions, len(ordering) + first * CHUNK):
            centroid = int(likeness.masked_fill(room == 0, -torch.inf).argmax())
            members[centroid].append(token)
            room[centroid] -= 1
    return torch.cat([ordering.view(len(centroids), -1), torch.tensor(members, dtype=ordering.dtype)], 1).flatten()


def drafter_ordering(folder: Path, rows: int, mean: Tensor) -> dict[str, Tensor]:
    """The grown ``token_ordering`` of a drafter's folder by its key; nothing for a drafter without one.

    Args:
        rows: of the grown vocabulary.
        mean: ``[H]``, each new row of its head.

    Raises:
        WeightsError: if the folder's isn't a permutation, or its centroids don't divide the rows.
    """
    stored = stored_tensors(folder)
    key = next((key for key in stored if key.endswith("token_ordering")), None)
    if key is None:
        return {}

    ordering, centroids = (stored[name].whole() for name in (key, key.replace("token_ordering", "centroids.weight")))
    if not torch.equal(ordering.long().sort().values, torch.arange(len(ordering))) or rows % len(centroids):
        raise WeightsError(
            f"{folder}: token_ordering must hold each of its {len(ordering)} tokens once, and {len(centroids)} "
            f"centroids must divide the {rows} rows of the grown vocabulary."
        )
    return {key: grown_ordering(ordering, centroids, mean.expand(rows - len(ordering), -1))}


def say_growth(base: PreTrainedConfig, drafter: PreTrainedConfig, rows: int, used: int, trained: bool) -> None:
    """Log what grows, and that new rows of a frozen base stay as they begin."""
    of_base, of_drafter = min(table_rows(base)), drafter.get_text_config().vocab_size
    log.info(
        "model.resize_vocabulary: the base's tables have %d rows and get %d, the drafter's %d and get %d; the "
        "tokenizer uses %d. A new row is the mean of its table's.",
        of_base, rows, of_drafter, rows, used,
    )  # fmt: skip
    if of_base < min(rows, used) and not trained:
        log.warning(
            "model.resize_vocabulary: %d new tokens have rows in the base that aren't trained (freeze.base, "
            "freeze.embeddings or lora.r): they all stay the mean of the others, and the base can't tell them apart.",
            min(rows, used) - of_base,
        )


def wanted_rows(choice: Any, needed: int) -> int:
    """``model.resize_vocabulary`` as a number of rows.

    Raises:
        ConfigError: if it is fewer than are needed, or doesn't fit.
    """
    if choice is True:
        return needed
    if choice < needed or choice % 1:
        raise ConfigError(
            f"model.resize_vocabulary={choice}: the tokenizer, the tables of both models and the drafter's centroids "
            f"need {needed} rows. Set true, or a larger number."
        )
    return choice
