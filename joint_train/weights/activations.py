"""How a quantised folder's engines round what goes into a layer: W8A8, W4A4 and static ranges, played in training.

    y = W round(x)          the gradient of the rounding is taken to be 1 (straight through)

``model.quantization_activations=as_saved`` puts it on the base's linear layers. Scales are those of engines: of each
token from its largest number (dynamic), or from the folder (static). Under an adapter the base's product alone is
rounded, as servers do it. The experts' inputs aren't: an expert is no layer of its own here.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from joint_train.distributed.lora import adapted_modules, folder_tensors
from joint_train.errors import ConfigError
from joint_train.weights.formats import FORMATS, Layer, group_of_layer
from joint_train.weights.loading import renamer, stored_in_files
from joint_train.weights.quantised import layers_of, quantization_config
from joint_train.weights.stored import Stored
from joint_train.weights.unpack import E2M1

log = logging.getLogger(__name__)

LARGEST_FP8, LARGEST_FP4 = 448.0, 6.0
# Where FP4's values round up: halfway, and at a tie to the one whose mantissa is even.
MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
MIDPOINTS[1::2] = torch.nextafter(MIDPOINTS[1::2], torch.zeros(()))


@dataclass(frozen=True)
class Rounding:
    """How numbers ``[…, in]`` are rounded.

    Attributes:
        kind: ``int`` (of `bits`), ``fp8`` or ``fp4``.
        block: numbers of a row that share a dynamic scale; None: all of them.
        scale: a number for all of them, instead; of ``fp4`` the one by which the scales of blocks are divided.
    """

    kind: str
    bits: int = 8
    block: int | None = None
    scale: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.kind == "fp4":
            return self._fp4(wide).to(x.dtype)
        highest = LARGEST_FP8 if self.kind == "fp8" else 2.0 ** (self.bits - 1) - 1
        if self.scale is None:
            blocks = wide.unflatten(-1, (-1, self._block(wide)))
            scale: Any = (blocks.abs().amax(-1, keepdim=True) / highest).clamp(min=1e-12)
        else:
            blocks, scale = wide.unsqueeze(-2), self.scale
        if self.kind == "fp8":
            codes = (blocks / scale).clamp(-highest, highest).to(torch.float8_e4m3fn).float()
        else:
            codes = (blocks / scale).round().clamp(-highest - 1, highest)
        return (codes * scale).flatten(-2).to(x.dtype)

    def _block(self, x: Tensor) -> int:
        return self.block if self.block is not None and x.shape[-1] % self.block == 0 else x.shape[-1]

    def _fp4(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, self._block(x)))
        whole = self.scale or 1.0
        scale = blocks.abs().amax(-1, keepdim=True) / LARGEST_FP4 / whole
        scale = scale.clamp(max=LARGEST_FP8).to(torch.float8_e4m3fn).float() * whole
        over = blocks / torch.where(scale > 0, scale, 1.0)
        table = torch.tensor(E2M1[:8], device=x.device)
        magnitude = table[torch.bucketize(over.abs(), MIDPOINTS.to(x.device), right=False).clamp(max=7)]
        return (magnitude * over.sign() * scale).flatten(-2)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rounding: Rounding) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@dataclass(frozen=True)
class OfLayer:
    """How a layer's inputs and outputs are rounded, as forward hooks of it."""

    inputs: Rounding | None
    outputs: Rounding | None = None

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_StraightThrough.apply(args[0], self.inputs), *args[1:])

    def after(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return _StraightThrough.apply(out, self.outputs)


def roundings(config: dict[str, Any], stored: Mapping[str, Stored]) -> dict[str, OfLayer]:
    """How each layer's activations are rounded, by its name in the folder; those that aren't are left out.

    Args:
        config: of :func:`joint_train.weights.quantised.quantization_config`.
        stored: the tensors of the folder's files, with the scales of activations.

    Raises:
        ConfigError: for a scheme that isn't known.
    """
    make = MAKERS.get(config["quant_method"])
    found: dict[str, OfLayer] = {}
    if make is None:
        return found
    for layer in layers_of(FORMATS[config["quant_method"]], config, stored):
        try:
            of_layer = make(layer)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{layer.name} rounds activations in an unsupported way ({error})") from None
        if of_layer is not None:
            found[layer.name] = of_layer
    return found


def _number(layer: Layer, name: str) -> float:
    return float(layer.tensors[name].whole().float().max())


def _compressed_tensors(layer: Layer) -> OfLayer | None:
    group = group_of_layer(layer)
    if not (scheme := group.get("input_activations")):
        return None
    kind = "fp4" if (scheme["type"], scheme["num_bits"]) == ("float", 4) else "fp8"
    kind = "int" if scheme["type"] == "int" else kind
    if "uint8" in str(scheme.get("scale_dtype")) or "mxfp" in group["format"]:  # engines round up, or down
        raise ValueError(f"MXFP{scheme['num_bits']}, whose scales are powers of two")
    if not scheme.get("symmetric", True) or (scheme["type"] == "float" and scheme["num_bits"] not in (4, 8)):
        raise ValueError(f"{scheme['type']} of {scheme['num_bits']} bits, symmetric={scheme.get('symmetric')}")
    size, bits = scheme.get("group_size"), scheme["num_bits"]
    if kind == "fp4":
        return OfLayer(Rounding(kind, bits, size or 16, 1 / _number(layer, "input_global_scale")))
    if scheme.get("dynamic"):
        return OfLayer(Rounding(kind, bits, size if scheme.get("strategy") == "group" else None))
    return OfLayer(Rounding(kind, bits, scale=_number(layer, "input_scale")))


def _fp8(layer: Layer) -> OfLayer | None:
    if layer.config.get("activation_scheme", "dynamic") == "static":
        name = "activation_scale" if "activation_scale" in layer.tensors else "input_scale"
        return OfLayer(Rounding("fp8", scale=_number(layer, name)))
    block = layer.config.get("weight_block_size")
    return OfLayer(Rounding("fp8", block=block[1] if block else None))


def _gemma(layer: Layer) -> OfLayer | None:
    scales = [
        _number(layer, name) if name in layer.tensors else 0.0
        for name in ("input_activation_scale", "output_activation_scale")
    ]
    made = [Rounding("int", 8, scale=scale) if scale else None for scale in scales]  # 0: it isn't calibrated
    return OfLayer(made[0], made[1]) if any(made) else None


def _modelopt(layer: Layer) -> OfLayer | None:
    if "input_scale" not in layer.tensors:
        return None
    scale = _number(layer, "input_scale")
    if layer.tensors["weight"].dtype == "U8":
        return OfLayer(Rounding("fp4", 4, 16, scale))
    return OfLayer(Rounding("fp8", scale=scale))


MAKERS = {"compressed-tensors": _compressed_tensors, "fp8": _fp8, "gemma": _gemma, "modelopt": _modelopt}


def round_activations(base: PreTrainedModel, folder: Path) -> int:
    """Let a base's linear layers round as the folder that its weights are from says.

    Returns:
        How many layers round what goes into them, or comes out.

    Raises:
        ConfigError: if it names a scheme that isn't known.
    """
    rename = renamer(base, folder_tensors(base))
    of_folder = roundings(quantization_config(folder) or {"quant_method": None}, stored_in_files(folder))
    found = {rename(f"{name}.weight").removesuffix(".weight"): of_layer for name, of_layer in of_folder.items()}
    adapted, done = adapted_modules(base), 0
    for name, module in base.named_modules():
        layer = module.base_layer if name in adapted else module
        if (of_layer := found.get(name)) is None or not isinstance(layer, nn.Linear):
            continue
        if of_layer.inputs is not None:
            layer.register_forward_pre_hook(of_layer.before)
        if of_layer.outputs is not None:
            layer.register_forward_hook(of_layer.after)
        done += 1
    if done:
        log.info("the inputs of %d layers of the base are rounded as engines round them; those of experts aren't", done)
    return done


def round_as_saved(base: PreTrainedModel, folder: Path) -> None:
    """:func:`round_activations` for ``model.quantization_activations=as_saved``.

    Raises:
        ConfigError: if the folder says nothing of any layer, or names a scheme that isn't known.
    """
    key = "model.quantization_activations"
    try:
        rounded = round_activations(base, folder)
    except ConfigError as error:
        raise ConfigError(f"{key}=as_saved: {error}. Set {key}=none.") from None
    if not rounded:
        raise ConfigError(
            f"{key}=as_saved, but by {folder}/config.json engines round no activations of any linear layer: set "
            f"{key}=none."
        )
