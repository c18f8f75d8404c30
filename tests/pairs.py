"""Tiny pairs of every shape that Gemma 4 is released in, with random but lively weights.

    base, drafter = build_pair("e2b")                       # in memory, float32
    base_dir, drafter_dir = make_pair(tmp_path, "26b_a4b")  # save_pretrained folders, bfloat16

Both hold the same weights: the values in memory are exactly representable in bfloat16.
"""

import math
from pathlib import Path

import torch
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAssistantForCausalLM,
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
    Gemma4VisionConfig,
)

SHAPES = {
    "e2b": "KV sharing, per-layer embeddings, double-wide MLP, ordered embeddings; no towers",
    "text": "the same as Gemma4ForCausalLM",
    "multimodal": "the same with a vision and an audio tower",
    "26b_a4b": "mixture of experts, keys equal values on full layers, no KV sharing; a vision tower",
    "31b": "dense, keys equal values on full layers, no KV sharing; a vision tower",
    "12b_unified": "gemma4_unified: no towers, patches and audio frames are projected",
}

VOCAB_SIZE = 256
TOKENS = dict(pad_token_id=0, eos_token_id=1, bos_token_id=2)
# The multimodal placeholders, of the gemma4 and the gemma4_unified configuration alike.
MM_TOKENS = dict(
    boi_token_id=248, eoi_token_id=249, image_token_id=250, video_token_id=251,
    boa_token_id=252, eoa_token_index=253, audio_token_id=254,
)  # fmt: skip
MEL_BINS = 16

COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    head_dim=16,
    global_head_dim=32,
    sliding_window=8,
    max_position_embeddings=512,
    final_logit_softcapping=30.0,
    tie_word_embeddings=True,
    **TOKENS,
)
E2B = dict(
    COMMON,
    num_hidden_layers=5,
    layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    num_key_value_heads=1,
    num_kv_shared_layers=2,
    use_double_wide_mlp=True,
    vocab_size_per_layer_input=VOCAB_SIZE,
    hidden_size_per_layer_input=8,
)
LARGE = dict(
    COMMON,
    num_hidden_layers=4,
    layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    num_key_value_heads=2,
    num_global_key_value_heads=1,
    attention_k_eq_v=True,
    num_kv_shared_layers=0,
    use_bidirectional_attention="vision",
)
NO_PLE = dict(vocab_size_per_layer_input=0, hidden_size_per_layer_input=0)
MOE = dict(enable_moe_block=True, num_experts=3, top_k_experts=2, moe_intermediate_size=32)
TEXT = {
    "e2b": E2B,
    "text": E2B,
    "multimodal": E2B,
    "26b_a4b": {**LARGE, **NO_PLE, **MOE},
    "31b": {**LARGE, **NO_PLE},
    "12b_unified": LARGE,
}


def vision_config(**kwargs) -> Gemma4VisionConfig:
    return Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        patch_size=4,
        pooling_kernel_size=2,
        position_embedding_size=32,
        **kwargs,
    )


def audio_config() -> Gemma4AudioConfig:
    return Gemma4AudioConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        subsampling_conv_channels=[MEL_BINS, 8],
        attention_chunk_size=4,
        attention_context_left=5,
        output_proj_dims=48,
    )


def base_config(shape: str, **overrides):
    """Configuration of the base; `overrides` are keys of its text configuration."""
    text = TEXT[shape] | overrides
    if shape == "text":
        return Gemma4TextConfig(**text)
    if shape == "12b_unified":
        return Gemma4UnifiedConfig(
            text_config=Gemma4UnifiedTextConfig(**text),
            vision_config=Gemma4UnifiedVisionConfig(
                patch_size=4, pooling_kernel_size=2, mm_embed_dim=48, mm_posemb_size=16, output_proj_dims=48
            ),
            audio_config=Gemma4UnifiedAudioConfig(audio_embed_dim=40),
            **MM_TOKENS,
        )
    vision = {
        "multimodal": vision_config(use_clipped_linears=True),
        "26b_a4b": vision_config(standardize=True),
        "31b": vision_config(standardize=True),
    }.get(shape)
    audio = audio_config() if shape == "multimodal" else None
    return Gemma4Config(
        text_config=Gemma4TextConfig(**text), vision_config=vision, audio_config=audio, **MM_TOKENS
    )  # fmt: skip


def drafter_config(base, drafter_overrides: dict | None = None):
    """Configuration of the drafter that fits `base`'s; `drafter_overrides` are keys of its own, not its text's."""
    text = base.get_text_config()
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    unified = base.model_type == "gemma4_unified"
    sliding, full = (text.per_layer_config[text.layer_types.index(kind)] for kind in layers[1:])
    config = dict(
        vocab_size=text.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=len(layers),
        layer_types=layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=sliding.num_key_value_heads,
        num_global_key_value_heads=full.num_key_value_heads,
        attention_k_eq_v=text.attention_k_eq_v,
        head_dim=sliding.head_dim,
        global_head_dim=full.head_dim,
        sliding_window=text.sliding_window,
        max_position_embeddings=text.max_position_embeddings,
        num_kv_shared_layers=len(layers),
        tie_word_embeddings=True,
        **TOKENS,
    )
    ordered = not unified and bool(text.hidden_size_per_layer_input)
    own = dict(
        backbone_hidden_size=text.hidden_size,
        use_ordered_embeddings=ordered,
        num_centroids=16,
        centroid_intermediate_top_k=4,
    ) | (drafter_overrides or {})
    if unified:
        config["use_bidirectional_attention"] = None
        return Gemma4UnifiedAssistantConfig(text_config=Gemma4UnifiedTextConfig(**config), **own)
    return Gemma4AssistantConfig(text_config=Gemma4TextConfig(**config | NO_PLE), **own)


def model_class(config):
    return {
        "gemma4": Gemma4ForConditionalGeneration,
        "gemma4_text": Gemma4ForCausalLM,
        "gemma4_unified": Gemma4UnifiedForConditionalGeneration,
        "gemma4_assistant": Gemma4AssistantForCausalLM,
        "gemma4_unified_assistant": Gemma4UnifiedAssistantForCausalLM,
    }[config.model_type]


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter and persistent buffer with values of a healthy size, exact in bfloat16.

    Matrices have variance 1 / fan-in and the output head 4 times that; norms' weights and `layer_scalar` differ from 1,
    the towers' clipping bounds are finite, `token_ordering` is a permutation. Nothing is left at a value that would
    hide a tensor that wasn't loaded.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = model.state_dict(keep_vars=True)
    done = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in done:  # tied
            continue
        done.add(tensor.data_ptr())
        if name.endswith("token_ordering"):
            tensor.copy_(torch.randperm(tensor.numel(), generator=generator))
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("input_max", "output_max")):
            value = 2 + noise.abs()
        elif name.endswith(("input_min", "output_min")):
            value = -2 - noise.abs()
        elif name.endswith("layer_scalar"):
            value = 1 + 0.2 * noise.clamp(-2, 2)
        elif "embed_tokens" in name:
            value = noise * 2 / math.sqrt(tensor.shape[-1])
        elif tensor.ndim <= 1:
            value = (0 if name.endswith(("bias", "per_dim_scale")) else 1) + 0.2 * noise
        else:
            value = noise / math.sqrt(tensor[0].numel() if tensor.ndim != 3 else tensor.shape[-1])
        tensor.copy_(value.bfloat16())


def build_pair(
    shape: str = "e2b",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    drafter_overrides: dict | None = None,
    attn_implementation: str | dict | None = None,
    **overrides,
):
    """A base and its drafter in memory, in eval mode.

    Args:
        shape: one of `SHAPES`.
        seed: of the weights.
        dtype: of the weights; their values are exact in bfloat16 either way.
        drafter_overrides: keys of the drafter's configuration, e.g. `{"use_ordered_embeddings": False}`.
        overrides: keys of the base's text configuration, e.g. `num_hidden_layers=2, layer_types=[...]`.
    """
    config = base_config(shape, **overrides)
    models = []
    for offset, cfg in enumerate((config, drafter_config(config, drafter_overrides))):
        model = model_class(cfg)._from_config(cfg, dtype=dtype, attn_implementation=attn_implementation)
        randomize(model, 2 * seed + offset)
        models.append(model.eval())
    return tuple(models)


def make_pair(
    directory,
    shape: str = "e2b",
    *,
    seed: int = 0,
    drafter_overrides: dict | None = None,
    max_shard_size: str = "5GB",
    **overrides,
) -> tuple[Path, Path]:
    """Write `build_pair(...)` by `save_pretrained` in bfloat16 to `directory`/base and `directory`/drafter."""
    pair = build_pair(shape, seed=seed, dtype=torch.bfloat16, drafter_overrides=drafter_overrides, **overrides)
    folders = Path(directory) / "base", Path(directory) / "drafter"
    for model, folder in zip(pair, folders, strict=True):
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folders
