"""Folders of a base whose decoder's linear layers are quantised, in the formats that are read; what each weight is.

    reference = quantise(base_dir, "int4")       # in place; {name of a weight: float32}

The codes are made here, by plain code or by a format's own package; the references never come from joint_train.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEAR = re.compile(r".*layers\.\d+\..*\b(q|k|v|o|gate|up|down)_proj\.weight")
EXPERTS = re.compile(r".*\.experts\.(gate_up_proj|down_proj)")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
GROUP = 32


def compressed_config(form: str, weights: dict) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
            "quantization_status": "compressed", "ignore": ["lm_head", "re:.*per_layer.*"]}  # fmt: skip


def integers(bits: int, **more) -> dict:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP} | more


def exponents(bits: int) -> dict:
    """Microscaling (MX): floats in groups of 32, whose scales are powers of two, stored as bytes."""
    return {"num_bits": bits, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32,
            "scale_dtype": "torch.uint8"}  # fmt: skip


def with_activations(config: dict, **scheme) -> dict:
    group = config["config_groups"]["group_0"] | {"input_activations": {"symmetric": True} | scheme}
    return config | {"config_groups": {"group_0": group}}


CONFIGS = {
    "int4": compressed_config("pack-quantized", integers(4)),
    "int4_asymmetric": compressed_config("pack-quantized", integers(4, symmetric=False)),
    "int3": compressed_config("pack-quantized", integers(3)),
    "int8": compressed_config("int-quantized", integers(8, strategy="channel", group_size=None)),
    "fp8": compressed_config(
        "float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    ),
    "fp8_blocks": compressed_config(
        "float-quantized",
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [16, 8]},
    ),
    "nvfp4": compressed_config(
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4": compressed_config("mxfp4-pack-quantized", exponents(4)),
    "mxfp8": compressed_config("mxfp8-quantized", exponents(8)),
    "fp8_block": {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic",
                  "modules_to_not_convert": ["lm_head", "per_layer"]},
    "gemma": {"quant_method": "gemma", "num_bits": 4, "quantize_embeddings": True,
              "module_quant_configs": {"mlp": {"num_bits": 2}, "v_proj|embed_tokens": {"num_bits": 8}},
              "modules_to_not_convert": ["lm_head", "per_layer_input_gate", "per_layer_projection",
                                         "per_layer_model_projection", "model.language_model.embed_tokens"]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False},
    "gptq_order": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
    "gptq_3_bits": {"quant_method": "gptq", "bits": 3, "group_size": GROUP, "desc_act": True},
    "gptq_v2": {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "modelopt_fp8": {"quant_method": "modelopt", "quant_algo": "FP8"},
}  # fmt: skip


FP8_FP8 = with_activations(CONFIGS["fp8"], num_bits=8, type="float", strategy="token", dynamic=True)
INT8_INT8 = with_activations(CONFIGS["int8"], num_bits=8, type="int", strategy="token", dynamic=True)


def quantise(folder: Path, how: str, experts: str = "each") -> dict[str, Tensor]:
    """Quantise a folder's linear layers in place, and its experts: ``each`` as a layer of its own, all of them in
    ``one`` tensor, or ``none``.

    Returns:
        What its weights are, by the names that they had, in float32.
    """
    tensors = load_file(folder / "model.safetensors")
    reference, written = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if EXPERTS.fullmatch(name) and experts == "one":
            made = [quantise_weight(name, of_one, how, generator) for of_one in tensor.float()]
            for leaf in made[0][0]:
                written[name + leaf.removeprefix("weight")] = torch.stack([found[leaf] for found, _ in made])
            reference[name] = torch.stack([value for _, value in made])
        elif EXPERTS.fullmatch(name) and experts == "each":
            rows = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[name.rpartition(".")[2]]
            whole = []
            for number, of_one in enumerate(tensor.float()):
                parts = []
                for matrix, weight in zip(rows, of_one.chunk(len(rows)), strict=True):
                    layer = f"{name.rpartition('.')[0]}.{number}.{matrix}"
                    found, value = quantise_weight(layer, weight, how, generator)
                    written |= {f"{layer}.{leaf}": t for leaf, t in found.items()}
                    parts.append(value)
                whole.append(torch.cat(parts))
            reference[name] = torch.stack(whole)
        elif LINEAR.fullmatch(name) or (how == "gemma" and name.endswith("embed_tokens_per_layer.weight")):
            layer = name.removesuffix(".weight")
            found, reference[name] = quantise_weight(layer, tensor.float(), how, generator)
            written |= {f"{layer}.{leaf}": t for leaf, t in found.items()}
        else:
            written[name], reference[name] = tensor, tensor.float()
    save_file({name: t.contiguous() for name, t in written.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[how]}))
    return reference


def quantise_weight(layer: str, w: Tensor, how: str, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer ``[out, in]``, and its weight."""
    config = CONFIGS[how]
    if config["quant_method"] == "compressed-tensors":
        return by_compressed_tensors(w, config)
    if how == "fp8_block":
        size = config["weight_block_size"][0]
        rows, columns = (-(-n // size) for n in w.shape)
        scale = torch.tensor(
            [[w[size * i : size * (i + 1), size * j : size * (j + 1)].abs().max() / 448 for j in range(columns)]
             for i in range(rows)]
        )  # fmt: skip
        spread = torch.stack([scale[i // size] for i in range(w.shape[0])])
        spread = torch.stack([spread[:, j // size] for j in range(w.shape[1])], 1)
        codes = (w / spread).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scale}, codes.float() * spread
    if how == "gemma":
        bits = 2 if "mlp" in layer else 8 if re.search(r"v_proj|embed_tokens", layer) else 4
        table = "embed_tokens" in layer
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = w.abs().amax(1, keepdim=True) / max(high, 1)
        codes = (w / scale).round().clamp(low, high)
        packed = codes.to(torch.int8)
        if bits < 8:
            each, unsigned = 8 // bits, (codes - low).to(torch.uint8)
            packed = sum(unsigned[:, i::each] << (bits * i) for i in range(each))
        if table:
            return {"embedding_quantized": packed, "embedding_scale": scale}, codes * scale
        more = {"input_activation_scale": torch.zeros(()), "output_activation_scale": torch.zeros(())}
        return {"weight": packed, "weight_scale": scale} | more, codes * scale
    if how.startswith("gptq"):
        return by_gptq(w, config, generator)
    if how == "awq":
        return by_awq(w, config, generator)
    if how == "modelopt_fp8":
        scale = w.abs().max() / 448
        codes = (w / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, codes.float() * scale
    assert how == "modelopt"
    whole = w.abs().max() / 448 / 6
    scale = (w.unflatten(1, (-1, 16)).abs().amax(2) / 6 / whole).to(torch.float8_e4m3fn)
    combined = (scale.float() * whole).repeat_interleave(16, 1)
    distance = ((w / combined).unsqueeze(2) - torch.tensor(E2M1)).abs()
    codes = distance.argmin(2).to(torch.uint8)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    tensors = {"weight": packed, "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.tensor(0.5)}
    return tensors, torch.tensor(E2M1)[codes.long()] * combined


def by_compressed_tensors(w: Tensor, config: dict) -> tuple[dict[str, Tensor], Tensor]:
    """Packed and unpacked by the package: its own weight, with the scales in float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    group = config["config_groups"]["group_0"]
    scheme = QuantizationScheme(targets=group["targets"], weights=group["weights"])
    args, compressor = scheme.weights, BaseCompressor.get_value_from_registry(group["format"])
    parts = w.unflatten(1, (-1, args.group_size)) if args.group_size else w.unsqueeze(1)
    if args.block_structure:
        rows, columns = args.block_structure
        parts = w.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
    low, high = parts.amin(2), parts.amax(2)
    whole = generate_gparam(low.min(), high.max()) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(low, high, args, whole)
    scale = scale.bfloat16() if scale.dtype == torch.float32 else scale
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    state |= {"weight_global_scale": whole.reshape(1)} if whole is not None else {}
    stored = compressor.compress(state, scheme)
    if whole is not None:
        # The package's decompress works in bfloat16: its own codes, and the product of the paper in float32.
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

        codes = unpack_fp4_from_uint8(stored["weight_packed"], *w.shape, dtype=torch.float32)
        return stored, codes * (stored["weight_scale"].float() / whole).repeat_interleave(16, 1)
    wide = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in stored.items()}
    return stored, compressor.decompress(wide, scheme)["weight"]


def by_gptq(w: Tensor, config: dict, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """As AutoGPTQ's pack: words along the inputs, zero points less one along the outputs."""
    bits, (out, columns) = config["bits"], w.shape
    size = config["group_size"] if config["group_size"] > 0 else columns
    groups = torch.arange(columns) // size
    if config.get("desc_act"):
        groups = groups[torch.randperm(columns, generator=generator)]
    scales = (torch.rand(columns // size, out, generator=generator) / 10).half()
    zeros = torch.randint(1, 2**bits, scales.shape, generator=generator)
    codes = torch.randint(0, 2**bits, w.shape, generator=generator)
    stored_zeros = zeros - (0 if config.get("checkpoint_format") == "gptq_v2" else 1)
    tensors = {
        "qweight": words(codes.T, bits, 0),
        "qzeros": words(stored_zeros, bits, 1),
        "scales": scales,
        "g_idx": groups.int(),
    }
    return tensors, (codes - zeros[groups].T) * scales[groups].T.float()


def by_awq(w: Tensor, config: dict, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """As AutoAWQ's WQLinear_GEMM: words along the outputs, in the order of its kernel."""
    (out, columns), size = w.shape, config["group_size"]
    scales = (torch.rand(columns // size, out, generator=generator) / 10).half()
    zeros = torch.randint(0, 16, scales.shape, generator=generator)
    codes = torch.randint(0, 16, w.shape, generator=generator)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(values: Tensor) -> Tensor:
        return words(torch.cat([chunk[:, order] for chunk in values.split(8, 1)], 1), 4, 1)

    groups = torch.arange(columns) // size
    tensors = {"qweight": packed(codes.T.contiguous()), "qzeros": packed(zeros), "scales": scales}
    return tensors, (codes - zeros[groups].T) * scales[groups].T.float()


def words(values: Tensor, bits: int, dim: int) -> Tensor:
    """Values packed into int32 along a dimension, bit by bit as they come."""
    values = values.movedim(dim, -1)
    rows = []
    for row in values.reshape(-1, values.shape[-1]).tolist():
        number = sum(value << (bits * place) for place, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        row_words = [(number >> (32 * word)) & 0xFFFFFFFF for word in range(count)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in row_words])
    packed = torch.tensor(rows, dtype=torch.int32).reshape(*values.shape[:-1], -1)
    return packed.movedim(-1, dim).contiguous()
