"""The base's adapters as a folder of their own, for peft's ``PeftModel.from_pretrained(base, folder)``.

peft's own ``save_pretrained`` and loading know nothing of shards.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from joint_train.checkpoint import load_model
from joint_train.config import Config
from joint_train.config.values import base_of_adapter
from joint_train.distributed.lora import (
    adapted_modules,
    adapter_parameters,
    copy_from_full,
    folder_tensors,
    gather_full,
    initialise_adapters,
    inject_adapters,
    peft_config_of,
)
from joint_train.distributed.parallelize import DTYPES, text_model
from joint_train.distributed.ranks import run_on_all_ranks
from joint_train.errors import WeightsError
from joint_train.files import naming
from joint_train.weights.changes import UNCHANGED, Changes
from joint_train.weights.export import sync_files
from joint_train.weights.identity import frozen_base
from joint_train.weights.loading import materialize
from joint_train.weights.peft_folder import FILE, Names
from joint_train.weights.placing import discard, place, staged
from joint_train.weights.run_files import CARD

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import peft


def key_of(name: str) -> str:
    """The key of an adapter's weight in peft's file."""
    return f"base_model.model.{name.replace('.default.', '.')}"


def export_adapter(base: nn.Module, out: str | os.PathLike, in_place: bool = True, card: str | None = None) -> None:
    """Write the adapters of a base, in the dtype that they are trained in. Collective.

    The folder is written beside `out` and renamed when it is complete. Rank 0 holds all adapters for that.

    Args:
        in_place: False leaves the complete folder staged, for :func:`joint_train.weights.placing.place`.
        card: the text of README.md.

    Raises:
        OSError: if the disk is full, …; on every rank alike.
    """
    out, first = Path(out), not dist.is_initialized() or dist.get_rank() == 0
    partial = staged(out)
    tensors = {}
    for name, parameter in adapter_parameters(base).items():
        whole = gather_full(parameter)
        if first:
            tensors[key_of(name)] = whole.cpu().contiguous()

    def write() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / FILE, metadata={"format": "pt"})
        config = cast("dict[str, peft.LoraConfig]", base.peft_config)["default"]
        config.inference_mode = True  # as peft writes it: who loads it doesn't train it
        try:
            config.save_pretrained(str(partial))
        finally:
            config.inference_mode = False
        if card is not None:
            (partial / CARD).write_text(card, encoding="utf-8")
        sync_files(partial)

    def on_first() -> None:
        with naming(out):
            if first:
                write()

    try:
        run_on_all_ranks(on_first)
        if in_place:
            place([out])
    except BaseException:
        discard([out])
        raise


@torch.no_grad()
def load_adapter(base: nn.Module, folder: str | os.PathLike) -> None:
    """Read into a base's adapters what :func:`export_adapter` or peft wrote. Every rank reads the file.

    Raises:
        WeightsError: if the folder has other adapters than the base.
    """
    wanted, names = adapter_parameters(base), Names(cast(PreTrainedModel, base), folder_tensors(base))
    found = {names.adapter_key(key): tensor for key, tensor in load_file(Path(folder) / FILE).items()}
    shapes = {key_of(name): parameter.shape for name, parameter in wanted.items()}
    if {key: tensor.shape for key, tensor in found.items()} != shapes:
        wrong = sorted(found.keys() ^ shapes.keys()) or sorted(k for k in found if found[k].shape != shapes[k])
        raise WeightsError(f"{folder} has other adapters than this base: {len(wrong)} differ, such as {wrong[0]}.")
    for name, parameter in wanted.items():
        copy_from_full(parameter, found[key_of(name)])


def fill_from_checkpoint(
    base: PreTrainedModel, cfg: Config, checkpoint: Path, source: Path, changes: Changes = UNCHANGED
) -> None:
    """Give a base on the meta device the adapters of a run's checkpoint, filled, on the CPU.

    Args:
        cfg: the run's configuration.
        source: the folder that the base's other weights are to come from.
        changes: of that folder's weights.

    Raises:
        CheckpointError: if they are others than those that the adapters were trained on.
    """
    inject_adapters(base, peft_config_of(cfg.lora), text_model(base))
    base.peft_config["default"].base_model_name_or_path = base_of_adapter(cfg)
    for module in adapted_modules(base).values():
        for part in (module.lora_A, module.lora_B):
            part.to(dtype=DTYPES[cfg.precision.params]).to_empty(device="cpu")
    initialise_adapters(base, cfg.seed)  # a checkpoint of a frozen base has none: these leave the base as it is
    load_model(checkpoint, base, "base", frozen=frozen_base(source, changes, cfg.model.quantization))


def fill_base(
    base: PreTrainedModel,
    folder: str | os.PathLike,
    device: torch.device | str,
    shard_device: torch.device | str | None,
    changes: Changes,
    *,
    seed: int,
    adapter: str | os.PathLike | None,
) -> None:
    """Give a base its folder's weights, see :func:`joint_train.weights.loading.materialize`, and its adapters, if it
    has some, their first values or those of a folder. All ranks together. A base that is on its device already keeps
    its tensors and its generation settings: this reads it again."""
    kept = None if any(parameter.is_meta for parameter in base.parameters()) else base.generation_config
    materialize(base, folder, device, shard_device, changes)
    if kept is not None:
        base.generation_config = kept
    if adapted_modules(base):
        initialise_adapters(base, seed)
        if adapter is not None:
            load_adapter(base, adapter)


def warn_of_merged(folders: list[Path], base: str) -> None:
    """Log what the adapters of a run's export are on."""
    log.warning(
        "the export's adapter/ will belong to the base with %s merged into it, not to %s alone: serve it as the merged "
        "base/, or on that merged base",
        " and ".join(map(str, folders)), base,
    )  # fmt: skip
