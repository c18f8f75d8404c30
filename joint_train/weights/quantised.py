"""Folders whose weights are quantised: which of their tensors make up a weight, and how it is read.

The formats are in :mod:`joint_train.weights.formats`. The reader of slices in :mod:`joint_train.weights.loading` asks
for a part of a weight, and gets it dequantised from that part of the codes and scales alone: no rank reads more than
its share.

How engines round *activations* (W8A8, W4A4, static ranges) isn't part of a weight: those scales are left out.
"""

import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from joint_train.errors import ConfigError, WeightsError
from joint_train.weights.formats import FORMATS, Format, Layer, formats
from joint_train.weights.stored import FLOATS, Stored
from joint_train.weights.unpack import Stacked

# Of a layer, what no format counts among a weight's codes and scales.
ACTIVATIONS = re.compile(
    r"(input|output|activation|input_activation|output_activation|k_cache|v_cache|[qkv]|kv_cache)"
    r"_(scale|zero_point|global_scale)$|_activation_scale$"
)
OTHERS = ("bias",)
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """What a folder says of how its weights are quantised; None of one whose weights aren't.

    ModelOpt used to write it into a file of its own. A folder that has a GGUF file, and no other weights, has
    ``quant_method`` "gguf".
    """
    raw = _read(folder / "config.json")
    if config := raw.get("quantization_config") or (raw.get("text_config") or {}).get("quantization_config"):
        return config
    if of_modelopt := _read(folder / "hf_quant_config.json").get("quantization"):
        return of_modelopt | {"quant_method": "modelopt"}
    if gguf_files(folder):
        return {"quant_method": "gguf"}
    return None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files of a folder without other weights; not those of its towers, which llama.cpp calls mmproj."""
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return []
    return sorted(file for file in folder.glob("*.gguf") if "mmproj" not in file.name.lower())


def describe(config: Mapping[str, Any]) -> str:
    """A format in a few words."""
    detail = config.get("format") or config.get("quant_algo") or config.get("checkpoint_format") or config.get("bits")
    return f"{config.get('quant_method')}" + (f" ({detail})" if detail else "")


def sentence(folder: Path, activations: str) -> str:
    """What a run says of a base that it uses as it is saved.

    Args:
        activations: ``model.quantization_activations``.
    """
    rounded = {
        "none": "not rounded, as engines of W8A8 and W4A4 would (model.quantization_activations=as_saved)",
        "as_saved": "rounded as its engines round them",
    }[activations]
    return (
        f"the base's weights are those of {folder}, quantised as {describe(quantization_config(folder) or {})}: they "
        "are dequantised as they are read, stay as they are, and aren't exported. "
        f"Activations are {rounded}"
    )


def read_by_transformers(config: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether ``from_pretrained`` reads such a folder on any machine, without skipping weights, and computes in `dtype`
    with them: its products of some formats are of bfloat16."""
    method = config.get("quant_method")
    if method == "compressed-tensors" and find_spec("compressed_tensors") is None:
        return False
    in_bfloat16 = method == "fp8" or any("fp4" in name or "mxfp" in name for name in formats(config))
    if in_bfloat16 and dtype != torch.bfloat16:
        return False
    return method not in ("gptq", "awq", "modelopt", "gguf")


def check_format(config: dict[str, Any], folder: Any) -> None:
    """Refuse a format that isn't known.

    Raises:
        ConfigError: naming it.
    """
    method = config.get("quant_method")
    if method == "gguf":
        return
    if method not in FORMATS:
        raise ConfigError(
            f"{folder} is quantised as quant_method={method}, which isn't read; those that are, are "
            f"{', '.join(FORMATS)} and GGUF. Give the bfloat16 folder that it was made from."
        )
    try:
        FORMATS[method].check(config)
    except ValueError as error:
        raise ConfigError(
            f"{folder} is quantised as quant_method={method} in a way that isn't read: {error}. Give the bfloat16 "
            "folder that it was made from."
        ) from None


def combine(config: dict[str, Any], stored: Mapping[str, Stored], folder: Any) -> dict[str, Stored]:
    """The tensors of a quantised folder as those of the model before it was quantised.

    Args:
        config: of :func:`quantization_config`.
        stored: the tensors of the folder's files by name.

    Raises:
        ConfigError: for a format that isn't known.
        WeightsError: for a layer that doesn't have what its format says, naming it.
    """
    check_format(config, folder)
    form = FORMATS[config["quant_method"]]
    layers = _by_layer(stored)
    found: dict[str, Stored] = {}
    wrong = list[str]()
    for name, tensors in layers.items():
        tensors = {leaf: entry for leaf, entry in tensors.items() if not ACTIVATIONS.search(leaf)}
        codes = [leaf for leaf in form.codes if leaf in tensors and _is_codes(tensors[leaf])]
        rest = {leaf for leaf in tensors if leaf not in form.parts and leaf not in codes}
        if not codes:
            if scales := sorted(tensors.keys() & set(form.parts)):
                wrong.append(f"{name} has {', '.join(scales)} and no codes")
            found |= {_joined(name, leaf): entry for leaf, entry in tensors.items()}
            continue
        if unknown := sorted(rest - set(OTHERS)):
            wrong.append(f"{name} has {', '.join(unknown)}, which isn't known")
            continue
        found |= {_joined(name, leaf): tensors.pop(leaf) for leaf in rest}
        main = tensors[codes[0]]
        saved = main.key.removesuffix(f".{codes[0]}")
        try:
            if len(codes) > 1:
                raise ValueError(f"it has both {' and '.join(codes)}")
            weight = form.unpack(Layer(name, saved, tensors, config))
        except (ValueError, KeyError, TypeError) as error:
            wrong.append(f"{name}: {error}")
            continue
        whole = _joined(name, "weight")
        found[whole] = Stored(main.file, weight.shape, "F32", f"{saved}.weight", weight, tuple(tensors.values()))
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise WeightsError(f"{folder} can't be read as {describe(config)}: {'; '.join(wrong[:5])}{more}")
    return with_experts(found)


def layers_of(form: Format, config: dict[str, Any], stored: Mapping[str, Stored]) -> list[Layer]:
    """The layers that have codes, with all their tensors, those for activations among them."""
    found = []
    for name, tensors in _by_layer(stored).items():
        if codes := [leaf for leaf in form.codes if leaf in tensors and _is_codes(tensors[leaf])]:
            found.append(Layer(name, tensors[codes[0]].key.removesuffix(f".{codes[0]}"), tensors, config))
    return found


def _by_layer(stored: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    layers: dict[str, dict[str, Stored]] = {}
    for name, entry in stored.items():
        layer, leaf = _split(name)
        layers.setdefault(layer, {})[leaf] = entry
    return layers


def _split(name: str) -> tuple[str, str]:
    """A layer and the tensor of it: experts in one tensor are layers of their own, ``experts.down_proj``."""
    layer, _, leaf = name.rpartition(".")
    for ending in ("_scale_inv", "_activation_scale", ""):
        stem = leaf.removesuffix(ending)
        if layer.endswith("experts") and leaf.endswith(ending) and stem in FUSED:
            return f"{layer}.{stem}", f"weight{ending}"
    return layer, leaf


def _joined(layer: str, leaf: str) -> str:
    """:func:`_split` backwards."""
    above, _, last = layer.rpartition(".")
    if leaf == "weight" and above.endswith("experts") and last in FUSED:
        return layer
    return f"{layer}.{leaf}" if layer else leaf


def _is_codes(entry: Stored) -> bool:
    return entry.dtype not in FLOATS


def with_experts(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """Experts that have a layer each as the tensors in which Gemma 4 has all of them.

    Raises:
        WeightsError: if one is missing.
    """
    each: dict[str, dict[int, dict[str, Stored]]] = {}
    rest = {}
    for name, entry in found.items():
        if (parts := EXPERT.fullmatch(name)) is None:
            rest[name] = entry
        else:
            each.setdefault(parts[1], {}).setdefault(int(parts[2]), {})[parts[3]] = entry
    for name, experts in each.items():
        for fused, matrices in FUSED.items():
            ordered = [[experts.get(e, {}).get(m) for m in matrices] for e in range(max(experts) + 1)]
            if any(matrix is None for expert in ordered for matrix in expert):
                raise WeightsError(f"{name} has {len(experts)} experts, and not all of them have {', '.join(matrices)}")
            complete = [[matrix for matrix in expert if matrix is not None] for expert in ordered]
            if len({tuple(matrix.shape for matrix in expert) for expert in complete}) > 1:
                raise WeightsError(f"the experts of {name} have {', '.join(matrices)} of different shapes")
            weight, first = Stacked(complete), complete[0][0]
            parts_of = tuple(part for expert in complete for matrix in expert for part in matrix.parts or (matrix,))
            rest[f"{name}.{fused}"] = Stored(first.file, weight.shape, "F32", f"{name}.{fused}", weight, parts_of)
    return rest
