"""A model to generate with, as its engines would compute it."""

import logging
import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from joint_train.weights import quantised
from joint_train.weights.folders import resolve
from joint_train.weights.loading import check_weights, load_model

log = logging.getLogger(__name__)


def load_to_generate(path: str | os.PathLike, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """A whole model to generate with: that of :func:`load_model`, or of transformers if its weights are quantised in a
    way that transformers reads here: it also rounds activations as the folder says.

    transformers would take a folder with a forgotten ``adapter_config.json`` for an adapter.
    """
    folder = resolve(path)
    config = quantised.quantization_config(folder)
    if config is None or not quantised.read_by_transformers(config):
        return load_model(folder, dtype, device)
    if dtype != torch.bfloat16 and (config.get("quant_method") == "fp8" or "nvfp4" in str(config.get("format"))):
        return load_model(folder, dtype, device)  # transformers' products are of bfloat16 there
    check_weights(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, read = loaded
    if missing := sorted(read["missing_keys"]):
        log.warning(
            "transformers doesn't find %d of the weights in %s, such as %s: the base is dequantised here instead, and "
            "its activations aren't rounded as an engine rounds them",
            len(missing), folder, missing[0],
        )  # fmt: skip
        return load_model(folder, dtype, device)
    return model.to(device).eval()
