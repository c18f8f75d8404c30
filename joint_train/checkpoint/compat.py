"""What may change between a checkpoint and the run that resumes from it, and what may not."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from joint_train.config import rename_keys, resolve_interpolations
from joint_train.config.values import shown_setting
from joint_train.errors import CheckpointError

# Keys of a model's Hugging Face configuration that its weights are bound to, even where shapes happen to agree.
FIXED = frozenset(
    """
    model_type vocab_size vocab_size_per_layer_input hidden_size hidden_size_per_layer_input intermediate_size
    moe_intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim layer_types
    num_kv_shared_layers use_double_wide_mlp attention_k_eq_v tie_word_embeddings num_experts enable_moe_block
    backbone_hidden_size use_ordered_embeddings num_centroids
    """.split()
)
FROZEN_BASE = "base/frozen.json"  # of a checkpoint whose base/model holds adapters alone, or nothing of a frozen base
# These describe where a run is, not what it is.
_IGNORED = frozenset({"resume", "output_dir", "checkpoint.mirror"})


def config_hash(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def differences(old: dict, new: dict) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with (old, new); a key that one side lacks counts as None there."""
    old, new = dict(_flat(old)), dict(_flat(new))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key) and key not in _IGNORED]
    return {key: (old.get(key), new.get(key)) for key in keys}


def changed_settings(old: dict, new: dict) -> dict[str, tuple[Any, Any]]:
    """:func:`differences` between two runs' configurations, the old one by today's names of keys.

    What interpolations stand for is compared, as far as it can be resolved here; what was written is shown.
    """
    old = rename_keys(old)
    written = dict(_flat(old)), dict(_flat(new))
    found = differences(resolve_interpolations(old), resolve_interpolations(new))
    return {
        inner: values
        for key, of_key in found.items()
        for inner, values in _shown(key, *(t.get(key, value) for t, value in zip(written, of_key, strict=True)))
    }


def _shown(key: str, old: Any, new: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Of two lists of sources what differs, or their paths alone where one is longer; anything else as it is."""
    if isinstance(old, list) and isinstance(new, list) and all(isinstance(one, dict) for one in old + new):
        if len(old) == len(new):
            for index, pair in enumerate(zip(old, new, strict=True)):
                yield from ((f"{key}[{index}].{name}", values) for name, values in differences(*pair).items())
            return
        old, new = shown_setting(old), shown_setting(new)
    yield key, (old, new)


def fixed_differences(part: str, old: dict, new: dict) -> list[str]:
    """Differences between two Hugging Face configurations that rule a resume out, in words."""
    return [
        f"{part} {key} was {before}, is {now}"
        for key, (before, now) in differences(old, new).items()
        if key.rpartition(".")[2] in FIXED
    ]


def adapter_differences(old: dict, new: dict) -> list[str]:
    """The factors by which two runs scale their adapters, in words where they differ: with another factor trained
    adapters are another model."""
    before, now = (_adapter_scale(resolve_interpolations(config).get("lora") or {}) for config in (old, new))
    if before is None or now is None or before == now:
        return []
    return [f"the adapters' product was multiplied by {before:g}, and would now be by {now:g}"]


def _adapter_scale(lora: dict) -> float | None:
    if not lora.get("r"):
        return None
    return lora["alpha"] / (lora["r"] ** 0.5 if lora.get("rank_stabilized") else lora["r"])


def tensor_differences(part: str, stored: dict[str, TensorStorageMetadata], tensors: dict[str, Tensor]) -> list[str]:
    """Tensors that a checkpoint and a model don't both have in one shape, in words."""
    problems = [f"{part} lacks {name} in the checkpoint" for name in tensors if name not in stored]
    problems += [f"{part} has no {name} any more" for name in stored if name not in tensors]
    problems += [
        f"{part} {name} was {list(stored[name].size)}, is {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in stored and stored[name].size != tensor.shape
    ]
    return problems


def check_frozen_base(checkpoint: Path, before: dict[str, str], now: dict[str, str]) -> None:
    """Adapters belong to the base that they were trained on, as a drafter to the frozen base.

    Raises:
        CheckpointError: if the weights in the two folders differ, or how they are quantised.
    """
    ways = [found.get("quantization", "none") for found in (before, now)]
    if ways[0] != ways[1]:
        raise CheckpointError(
            f"{checkpoint} was trained with model.quantization={ways[0]}; it is {ways[1]} now, so the base would be "
            f"another one. Set model.quantization={ways[0]}, or train in another output_dir"
        )
    if before["hash"] != now["hash"]:
        raise CheckpointError(
            f"{checkpoint} was trained on the base in {before['folder']}, which it doesn't contain, and the weights in "
            f"{now['folder']} differ from that base. Set model.base (for an export --base) to the folder or revision "
            "that it was trained on, or train in another output_dir"
        )


def _flat(value: Any, prefix: str = ""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
