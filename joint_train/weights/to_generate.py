"""A model to generate with, as its engines would compute it."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from joint_train.errors import ConfigError
from joint_train.weights import quantised
from joint_train.weights.activations import round_activations
from joint_train.weights.folders import resolve
from joint_train.weights.loading import check_weights, load_model

log = logging.getLogger(__name__)


def load_to_generate(path: str | os.PathLike, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """A whole model to generate with: that of :func:`load_model`, or of transformers if its weights are quantised in a
    way that transformers reads here. Both round activations as the folder says.

    transformers would take a folder with a forgotten ``adapter_config.json`` for an adapter.
    """
    folder = resolve(path)
    config = quantised.quantization_config(folder)
    if config is None:
        return load_model(folder, dtype, device)
    if not quantised.read_by_transformers(config, dtype):
        return _dequantised(folder, dtype, device)
    check_weights(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, read = loaded
    if missing := sorted(read["missing_keys"]):
        log.warning(
            "transformers doesn't find %d of the weights in %s, such as %s: the base is dequantised here instead",
            len(missing), folder, missing[0],
        )  # fmt: skip
        return _dequantised(folder, dtype, device)
    return model.to(device).eval()


def _dequantised(folder: Path, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """A quantised model in plain weights."""
    model = load_model(folder, dtype, device)
    try:
        round_activations(model, folder)
    except ConfigError as error:
        log.warning("activations are not rounded as an engine does it: %s", error)
    return model
