"""``model.adapters``: PEFT's LoRA folders put on the frozen base side by side, for one drafter under all of them."""

import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from joint_train.config import Config
from joint_train.config.values import parse_served
from joint_train.distributed.parallelize import text_model
from joint_train.errors import WeightsError
from joint_train.pair.adapters import Adapters
from joint_train.pair.model import JointModel
from joint_train.weights.peft_folder import PeftFolder, read_folders

log = logging.getLogger(__name__)

KEY = "model.adapters"


def read_served(cfg: Config) -> list[PeftFolder]:
    """The adapters of ``model.adapters``, in turn. All ranks together.

    Raises:
        ConfigError, WeightsError: for one that can't be had, or is of another kind.
    """
    return read_folders(parse_served(cfg.model.adapters), cfg.model.cache_dir, KEY)


def put_served(
    model: JointModel, cfg: Config, folders: list[PeftFolder], dtype: torch.dtype, device: torch.device | str
) -> Adapters:
    """Put the adapters on the pair's base, whole, on every rank.

    Args:
        folders: of :func:`read_served`.
        dtype, device: of compute.

    Raises:
        WeightsError: for one that doesn't fit the base, or has more than linear layers of its language model.
    """
    names = [spec.name for spec in parse_served(cfg.model.adapters)]
    adapters = put_on_base(model.base, names, folders, dtype, device)
    adapters.put_on_pair(model)
    log.info("the base as it is, under each of %s in turn", ", ".join(adapters.names))
    return adapters


def put_on_base(
    base: PreTrainedModel,
    names: list[str],
    folders: list[PeftFolder],
    dtype: torch.dtype,
    device: torch.device | str,
    key: str = KEY,
) -> Adapters:
    """Put adapters of these names on a base alone; none is in use until :meth:`Adapters.alone` says so.

    Args:
        key: what the user named them by, for errors.

    Raises:
        WeightsError: as :func:`put_served`.
    """
    adapters = Adapters(names)
    named = {module: name for name, module in base.named_modules()}
    linear = {named[module]: module for module in text_model(base).modules() if isinstance(module, nn.Linear)}
    layers: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for number, folder in enumerate(folders):
        deltas, wholes = folder.changes(base)
        if wholes:
            raise WeightsError(
                f"{key}: {folder.folder} holds a whole {min(wholes)}, and an adapter that shares its base with others "
                "can only add to linear layers. Give it with model.adapter, which merges it into the base."
            )
        for name, delta in deltas.items():
            layer = name.removesuffix(".weight")
            if layer not in linear:
                raise WeightsError(
                    f"{key}: {folder.folder} has an adapter on {layer}, which isn't a linear layer of the language "
                    "model: only those can have another adapter for each document. Give it with model.adapter, which "
                    "merges it into the base."
                )
            a, b = delta.a[:].float(), delta.scale * delta.b[:].float()
            layers.setdefault(layer, {})[number] = (a.to(device, dtype), b.to(device, dtype))
    for layer, found in layers.items():
        adapters.put(linear[layer], found)
    return adapters
