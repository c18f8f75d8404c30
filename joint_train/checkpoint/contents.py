"""The small documents of a checkpoint, as bytes and JSON."""

import io
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from joint_train.config import Config, config_to_save
from joint_train.errors import CheckpointError


def json_config(config: Config | dict) -> dict:
    """A run's configuration as it will be read back from JSON, interpolations unresolved."""
    return json.loads(json.dumps(config_to_save(config)))


def model_config(module: PreTrainedModel) -> dict:
    return json.loads(module.config.to_json_string(use_diff=False))


def torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def shorten_list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_json(value: Any, where: str) -> None:
    """Raise an error that names the place of a value that JSON doesn't preserve."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}, a {type(key).__name__}: only text survives JSON")
            check_json(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise CheckpointError(f"{where} is a {type(value).__name__}: a checkpoint's state is plain JSON")
