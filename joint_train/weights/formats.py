"""The formats of quantised weights: which tensors make up a layer's weight, and how they are unpacked.

| ``quant_method`` | tensors of a layer | packing |
| --- | --- | --- |
| compressed-tensors | ``weight_packed`` or ``weight``, ``weight_scale``, … | the package's own, compressors/ |
| fp8 | ``weight`` in E4M3, ``weight_scale_inv`` a block | DeepSeek-V3's, as transformers reads it |
| gemma | ``weight``, ``weight_scale``; of tables ``embedding_quantized``, ``embedding_scale`` | Google's QAT folders |
| gptq | ``qweight``, ``qzeros``, ``scales``, ``g_idx`` | AutoGPTQ's, GPTQModel's |
| awq | ``qweight``, ``qzeros``, ``scales`` | AutoAWQ's version "gemm" |
| modelopt | ``weight``, ``weight_scale``, ``weight_scale_2`` | NVIDIA's NVFP4 and FP8 |
| gguf | one file for llama.cpp | :mod:`joint_train.weights.gguf_file` |

A new format is one entry of :data:`FORMATS`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from joint_train.weights.stored import Stored
from joint_train.weights.unpack import AWQ_ORDER, Bits, Fp4, Grid, Mapped, Raw, Source, Transposed, Weight


@dataclass(frozen=True)
class Layer:
    """A layer of a folder that has quantised tensors.

    Attributes:
        name: of the layer in the model, and in the folder.
        tensors: by the last part of their names.
        config: the folder's ``quantization_config``.
    """

    name: str
    saved: str
    tensors: dict[str, Stored]
    config: dict[str, Any]

    def source(self, *leaves: str) -> Source:
        """The tensor under the first of these names that there is.

        Raises:
            ValueError: if there is none.
        """
        for leaf in leaves:
            if leaf in self.tensors:
                return Raw(self.tensors[leaf])
        raise ValueError(f"it has no {' or '.join(leaves)}")


@dataclass(frozen=True)
class Format:
    """A way of quantising.

    Attributes:
        codes: names that a layer's codes may have. ``weight`` counts only if it holds no floating-point numbers of two
            bytes or more.
        parts: names of what belongs to them.
        unpack: makes the weight of a layer, or raises ValueError saying why it can't.
        check: refuses variants by the configuration, by raising ValueError.
    """

    codes: tuple[str, ...]
    parts: tuple[str, ...]
    unpack: Callable[[Layer], Weight]
    check: Callable[[dict[str, Any]], None] = lambda config: None


# compressed-tensors (llm-compressor, vLLM): https://github.com/vllm-project/compressed-tensors


def formats(config: Mapping[str, Any]) -> set[str]:
    """The formats of a folder's groups, which may differ, or of the folder."""
    groups = (config.get("config_groups") or {}).values()
    return {str(group.get("format") or config.get("format")) for group in groups} or {str(config.get("format"))}


def _check_compressed_tensors(config: dict[str, Any]) -> None:
    if unknown := sorted(formats(config) - COMPRESSED.keys()):
        raise ValueError(f"its format {', '.join(unknown)}; those that are read are {', '.join(COMPRESSED)}")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ValueError("sparse weights (sparsity_config)")
    if config.get("transform_config") and (config["transform_config"].get("config_groups") or {}):
        raise ValueError("rotations that are applied while it computes (transform_config)")
    if (status := config.get("quantization_status", "compressed")) != "compressed":
        raise ValueError(f"quantization_status={status}: only compressed weights are read")


def group_of_layer(layer: Layer) -> dict[str, Any]:
    """The group of ``config_groups`` that a layer belongs to: by its name, else by its class."""
    groups = list(layer.config["config_groups"].values())
    named = [g for g in groups if any(_names(target, layer) for target in g["targets"])]
    found = named or [g for g in groups if any(target in ("Linear", "Embedding") for target in g["targets"])]
    if len(found) > 1:
        table = "Embedding" if "embed_tokens" in layer.name else "Linear"
        found = [g for g in found if table in g["targets"]] or found
    if len(found) != 1:
        raise ValueError(f"{len(found)} of its config_groups are for it")
    return found[0] | {"format": found[0].get("format") or layer.config["format"]}


def _names(target: str, layer: Layer) -> bool:
    names = (layer.name, layer.saved)
    if target.startswith("re:"):
        return any(re.match(target.removeprefix("re:"), name) for name in names)
    return target in names


def _compressed_tensors(layer: Layer) -> Weight:
    group = group_of_layer(layer)
    return COMPRESSED[group["format"]](layer, group["weights"])


def _packed_integers(layer: Layer, scheme: dict[str, Any]) -> Weight:
    bits, half = scheme["num_bits"], 2 ** (scheme["num_bits"] - 1)
    packed = layer.source("weight_packed")
    shape = tuple(layer.tensors["weight_shape"].whole().tolist()) if "weight_shape" in layer.tensors else None
    columns = shape[-1] if shape else packed.shape[-1] * 32 // bits
    if -(-columns * bits // 32) != packed.shape[-1]:
        raise ValueError(f"its weight_packed {list(packed.shape)} isn't {columns} columns of {bits} bits")
    codes = Bits(packed, bits, columns)
    scales = layer.source("weight_scale")
    zeros: Source | None = None
    if not scheme.get("symmetric", True):
        # Packed along the rows. Codes and zero points are both stored with half of their range added.
        zeros = Transposed(Bits(Transposed(layer.source("weight_zero_point")), bits, codes.shape[-2]))
    groups: Tensor | None = None
    if "weight_g_idx" in layer.tensors:
        order = layer.tensors["weight_g_idx"].whole()
        groups = None if bool((order < 0).any()) else order  # -1: there is no order
    block = (None, scheme.get("group_size") or None)
    offset = Grid(zeros, codes.shape, block, groups) if zeros is not None else _Constant(half)
    return Weight(codes, Grid(scales, codes.shape, block, groups), offset)


class _Constant:
    """One number."""

    shape: tuple[int, ...] = ()

    def __init__(self, value: float):
        self.value = torch.tensor(float(value))

    def __getitem__(self, part: Any) -> Tensor:
        return self.value


def _bytes(layer: Layer, scheme: dict[str, Any]) -> Weight:
    codes = layer.source("weight")
    block = scheme.get("block_structure") or (None, scheme.get("group_size") or None)
    block = tuple(int(size) for size in block.split("x")) if isinstance(block, str) else tuple(block)
    zeros = None
    if not scheme.get("symmetric", True) and "weight_zero_point" in layer.tensors:
        zeros = Grid(layer.source("weight_zero_point"), codes.shape, block)
    return Weight(codes, _scales(layer.source("weight_scale"), codes, block), zeros)


def _scales(scales: Source, codes: Source, block: tuple[int | None, ...] = ()) -> Grid:
    """Scales of any dtype; bytes are exponents with 127 added (E8M0)."""
    if isinstance(scales, Raw) and scales.stored.dtype == "U8":
        scales = Mapped(scales, lambda exponents: torch.exp2(exponents.float() - 127))
    return Grid(scales, codes.shape, block)


def _fp4(layer: Layer, scheme: dict[str, Any]) -> Weight:
    codes = Fp4(layer.source("weight_packed"))
    scales = _scales(layer.source("weight_scale"), codes, (None, scheme.get("group_size")))
    if "weight_global_scale" not in layer.tensors:
        return Weight(codes, scales)
    whole = Grid(layer.source("weight_global_scale"), codes.shape)
    return Weight(codes, _Combined(scales, whole, torch.div))


class _Combined:
    """Two scales as one."""

    def __init__(self, a: Source, b: Source, function: Callable[[Tensor, Tensor], Tensor]):
        self.a, self.b, self.function, self.shape = a, b, function, a.shape

    def __getitem__(self, part: Any) -> Tensor:
        return self.function(self.a[part], self.b[part])


COMPRESSED: dict[str, Callable[[Layer, dict[str, Any]], Weight]] = {
    "pack-quantized": _packed_integers,
    "int-quantized": _bytes,
    "float-quantized": _bytes,
    "naive-quantized": _bytes,
    "mxfp8-quantized": _bytes,
    "nvfp4-pack-quantized": _fp4,
    "mxfp4-pack-quantized": _fp4,
}


# FP8 with a scale a block: https://huggingface.co/docs/transformers/quantization/finegrained_fp8


def _fp8(layer: Layer) -> Weight:
    codes = layer.source("weight")
    if layer.tensors["weight"].dtype not in ("F8_E4M3", "F8_E5M2"):
        raise ValueError(f"its codes are {layer.tensors['weight'].dtype}, which isn't FP8")
    scales = layer.source("weight_scale_inv", "weight_scale")
    return Weight(codes, _scales(scales, codes, tuple(layer.config.get("weight_block_size") or ())))


# Google's quantisation-aware training: transformers/integrations/gemma_quant.py


def _gemma(layer: Layer) -> Weight:
    table = "embedding_quantized" in layer.tensors
    stored = layer.tensors["embedding_quantized" if table else "weight"]
    codes: Source = Raw(stored)
    offset: Source | None = None
    if stored.dtype == "U8":
        bits = _gemma_bits(layer)
        if bits not in (2, 4):
            raise ValueError(f"its codes are bytes, and its num_bits {bits}")
        codes, offset = Bits(codes, bits), _Constant(2 ** (bits - 1))
    elif stored.dtype != "I8":
        raise ValueError(f"its codes are {stored.dtype}")
    return Weight(codes, Grid(layer.source("embedding_scale" if table else "weight_scale"), codes.shape), offset)


def _gemma_bits(layer: Layer) -> int:
    """The first pattern that is found in the name decides."""
    for pattern, options in (layer.config.get("module_quant_configs") or {}).items():
        if re.search(pattern, layer.name) or re.search(pattern, layer.saved):
            return options.get("num_bits", layer.config.get("num_bits", 4))
    return layer.config.get("num_bits", 4)


# GPTQ: https://github.com/ModelCloud/GPTQModel


def _check_gptq(config: dict[str, Any]) -> None:
    if (name := config.get("checkpoint_format") or "gptq") not in ("gptq", "gptq_v2"):
        raise ValueError(f"its checkpoint_format {name}; gptq and gptq_v2 are read")


def _gptq(layer: Layer) -> Weight:
    qweight, scales, zeros = (layer.source(leaf) for leaf in ("qweight", "scales", "qzeros"))
    groups = layer.tensors["g_idx"].whole() if "g_idx" in layer.tensors else None
    size, out = layer.config.get("group_size", -1), scales.shape[1]
    if groups is not None:
        bits, rest = divmod(qweight.shape[0] * 32, groups.numel())
        columns = groups.numel()
    else:
        bits, rest = layer.config["bits"], 0
        columns = qweight.shape[0] * 32 // bits
    if rest or bits not in (2, 3, 4, 8) or zeros.shape[1] != -(-out * bits // 32):
        raise ValueError(f"its qweight {list(qweight.shape)} and qzeros {list(zeros.shape)} don't fit together")
    codes = Bits(Transposed(qweight), bits, columns)
    # The first version stores zero points less one, and engines let them wrap.
    less = 0 if layer.config.get("checkpoint_format") == "gptq_v2" else 1
    stored = Mapped(Bits(zeros, bits, out), lambda z: (z.int() + less) & (2**bits - 1))
    block = (None, size if size > 0 else None)
    if groups is not None and bool((groups == torch.arange(columns) // (each := -(-columns // scales.shape[0]))).all()):
        block, groups = (None, each), None  # consecutive, of a size that may be this layer's own
    return Weight(
        codes,
        Grid(Transposed(scales), codes.shape, block, groups),
        Grid(Transposed(stored), codes.shape, block, groups),
    )


# AWQ: https://github.com/casper-hansen/AutoAWQ


def _check_awq(config: dict[str, Any]) -> None:
    if (version := str(config.get("version") or "gemm").lower()) != "gemm":
        raise ValueError(f"its version {version}; gemm is read")
    if (bits := config.get("bits", config.get("w_bit", 4))) != 4:
        raise ValueError(f"its {bits} bits; 4 are read")


def _awq(layer: Layer) -> Weight:
    codes = Transposed(Bits(layer.source("qweight"), 4, order=AWQ_ORDER))
    size = layer.config.get("group_size", layer.config.get("q_group_size", -1))
    block = (None, size if size > 0 else None)
    zeros: Source = _Constant(8)
    if "qzeros" in layer.tensors:
        zeros = Grid(Transposed(Bits(layer.source("qzeros"), 4, order=AWQ_ORDER)), codes.shape, block)
    return Weight(codes, Grid(Transposed(layer.source("scales")), codes.shape, block), zeros)


# NVIDIA's ModelOpt: https://github.com/NVIDIA/Model-Optimizer


def _check_modelopt(config: dict[str, Any]) -> None:
    known = ("NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION")
    if (name := config.get("quant_algo")) not in known:
        raise ValueError(f"its quant_algo {name}; those that are read are {', '.join(known)}")


def _modelopt(layer: Layer) -> Weight:
    stored = layer.tensors["weight"]
    if stored.dtype == "U8":
        codes: Source = Fp4(Raw(stored))
        whole = Grid(layer.source("weight_scale_2"), codes.shape)
        return Weight(codes, _Combined(_scales(layer.source("weight_scale"), codes), whole, torch.mul))
    if stored.dtype == "F8_E4M3" and "weight_scale_2" not in layer.tensors:
        codes = Raw(stored)
        return Weight(codes, _scales(layer.source("weight_scale"), codes))
    raise ValueError(f"its codes are {stored.dtype}")


FORMATS: dict[str, Format] = {
    "compressed-tensors": Format(
        ("weight_packed", "weight"),
        ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale"),
        _compressed_tensors,
        _check_compressed_tensors,
    ),
    "fp8": Format(("weight",), ("weight_scale_inv", "weight_scale"), _fp8),
    "gemma": Format(("weight", "embedding_quantized"), ("weight_scale", "embedding_scale"), _gemma),
    "gptq": Format(("qweight",), ("qzeros", "scales", "g_idx"), _gptq, _check_gptq),
    "awq": Format(("qweight",), ("qzeros", "scales"), _awq, _check_awq),
    "modelopt": Format(("weight",), ("weight_scale", "weight_scale_2"), _modelopt, _check_modelopt),
}
