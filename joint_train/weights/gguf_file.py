"""GGUF, llama.cpp's format: the text model of a base, each tensor in one of its types, by the ``gguf`` package.

A row of a tensor is a sequence of blocks, so that any rows, and columns from block to block, are read alone. The towers
are in a file of their own (mmproj), which isn't read: a base in GGUF is the text model.

Names are those of llama.cpp's ``conversion/gemma.py``, which changes no value of a Gemma 4.
"""

import re
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from joint_train.errors import ConfigError, WeightsError
from joint_train.weights.stored import Stored
from joint_train.weights.unpack import ended

WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
OF_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate.weight": "per_layer_input_gate.weight",
    "proj.weight": "per_layer_projection.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
}
COMPUTED = {"rope_freqs.weight"}


class Blocks:
    """Slices of a tensor of a GGUF file, in float32.

    Args:
        tensor: of ``gguf.GGUFReader``.
    """

    def __init__(self, tensor: Any):
        from gguf.constants import GGML_QUANT_SIZES

        self.tensor, self.shape = tensor, tuple(int(size) for size in reversed(tensor.shape))
        self.block, self.bytes = GGML_QUANT_SIZES[tensor.tensor_type]

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def __getitem__(self, part: Any) -> Tensor:
        from gguf.quants import dequantize

        *rows, columns = ended(part, self.shape)
        first, last = columns.start // self.block, -(-columns.stop // self.block)
        size = 1 if self.tensor.data.dtype != "uint8" else self.bytes  # numbers are there as such, blocks as bytes
        data = self.tensor.data[(*rows, slice(first * size, last * size))]
        found = torch.from_numpy(dequantize(data, self.tensor.tensor_type).copy()).float()
        skipped = columns.start - first * self.block
        return found[..., skipped : skipped + columns.stop - columns.start]


def stored_in_gguf(files: list[Path]) -> dict[str, Stored]:
    """The tensors of GGUF files by the names that ``Gemma4ForCausalLM`` has for them.

    Raises:
        ConfigError: without the gguf package.
        WeightsError: for a file that can't be read, is of another model, or has tensors that aren't known.
    """
    if PathFinder.find_spec("gguf") is None:
        raise ConfigError(f"{files[0]} is read by the gguf package: pip install 'joint-train[gguf]'")
    found: dict[str, Stored] = {}
    for file, reader in _parts(files):
        for tensor in reader.tensors:
            if tensor.name in COMPUTED:
                continue
            name = _name(tensor.name)
            if name is None or name in found:
                raise WeightsError(
                    f"{file} has the tensor {tensor.name}{' twice' if name else ', which Gemma 4 has not'}"
                )
            try:
                blocks = Blocks(tensor)
                blocks[tuple(slice(0, 1) for _ in blocks.shape)]
            except NotImplementedError:
                raise WeightsError(
                    f"{file} has {tensor.name} as {tensor.tensor_type.name}, which the gguf package can't dequantise"
                ) from None
            found[name] = Stored(file, blocks.shape, "F32", tensor.name, blocks)
    return found


def _parts(files: list[Path]) -> list[tuple[Path, Any]]:
    """The files of one model, each open. Of those that ``gguf-split`` makes, only the first says what the model is."""
    import gguf

    parts, places = [], []
    for file in files:
        try:
            reader = gguf.GGUFReader(file)
            of, number, architecture = (
                None if (field := reader.fields.get(key)) is None else field.contents()
                for key in ("split.count", "split.no", "general.architecture")
            )
        except Exception as error:  # of what isn't one, in any way
            raise WeightsError(f"{file} can't be read as GGUF: {type(error).__name__}: {error}") from None
        if architecture != "gemma4" and not number:
            raise WeightsError(f"{file} holds a model of the architecture {architecture}; a base must be gemma4")
        parts.append((file, reader))
        places.append((int(number or 0), int(of or 1)))
    if sorted(places) != [(number, len(files)) for number in range(len(files))]:
        said = ", ".join(
            f"{file.name} (part {number + 1} of {of})" for file, (number, of) in zip(files, places, strict=True)
        )
        raise WeightsError(f"{files[0].parent} should have one model in GGUF, and all of its parts; it has {said}")
    return parts


def _name(name: str) -> str | None:
    if (parts := re.fullmatch(r"blk\.(\d+)\.(.+)", name)) is None:
        return WHOLE.get(name)
    return f"model.layers.{parts[1]}.{OF_LAYER[parts[2]]}" if parts[2] in OF_LAYER else None
