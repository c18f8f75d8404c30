"""Sizes of the released pairs, so that one can be planned for without its folder or a network.

Public values of the ``config.json`` of google/gemma-4-{E2B,E4B,26B-A4B,31B,12B}-it and their ``-assistant``. A name
always means this table, whatever the hub's cache holds; a folder's own configuration is read. The towers of E2B and E4B
have the defaults of transformers' classes; those of 26B-A4B and 31B are assumed to be SigLIP's so400m size (27 layers
of width 1152).
"""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

TEXT: dict[str, Any] = dict(vocab_size=262_144, head_dim=256, global_head_dim=512, final_logit_softcapping=30.0)
NO_PER_LAYER = dict(vocab_size_per_layer_input=0, hidden_size_per_layer_input=0)
SMALL_TOWERS = {
    "vision_config": {"model_type": "gemma4_vision", "use_clipped_linears": True},
    "audio_config": {"model_type": "gemma4_audio"},
}
LARGE_TOWER = {
    "vision_config": dict(
        model_type="gemma4_vision", hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, head_dim=72,
        num_attention_heads=16, num_key_value_heads=16, standardize=True,
    ),
    "audio_config": None,
}  # fmt: skip
UNIFIED_TOWERS = {
    "vision_config": {"model_type": "gemma4_unified_vision"},
    "audio_config": {"model_type": "gemma4_unified_audio"},
}


def _layers(sliding: int, times: int) -> list[str]:
    return (["sliding_attention"] * sliding + ["full_attention"]) * times


def _text(hidden: int, mlp: int, heads: int, kv: int, layers: list[str], window: int, **others: Any) -> dict[str, Any]:
    return TEXT | dict(
        hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv,
        num_hidden_layers=len(layers), layer_types=layers, sliding_window=window, **others,
    )  # fmt: skip


def _drafter(hidden: int, mlp: int, heads: int, kv: int, window: int, **others: Any) -> dict[str, Any]:
    layers = _layers(3, 1)
    return _text(hidden, mlp, heads, kv, layers, window, num_kv_shared_layers=4, **others) | {
        "final_logit_softcapping": None
    }


def _pair(name: str, text: dict, drafter: dict, towers: dict, ordered: bool = False, family: str = "gemma4") -> dict:
    base = {"model_type": family, "text_config": text, **towers}
    assistant = {
        "model_type": f"{family}_assistant",
        "backbone_hidden_size": text["hidden_size"],
        "use_ordered_embeddings": ordered,
        "text_config": {"model_type": f"{family}_text", **drafter},
    }
    return {f"google/gemma-4-{name}-it": base, f"google/gemma-4-{name}-it-assistant": assistant}


K_EQ_V = {"attention_k_eq_v": True}
CONFIGS: dict[str, dict[str, Any]] = {
    **_pair(
        "E2B",
        _text(1536, 6144, 8, 1, _layers(4, 7), 512, num_kv_shared_layers=20, use_double_wide_mlp=True),
        _drafter(256, 2048, 4, 1, 512, **NO_PER_LAYER),
        SMALL_TOWERS,
        ordered=True,
    ),
    **_pair(
        "E4B",
        _text(2560, 10_240, 8, 2, _layers(5, 7), 512, num_kv_shared_layers=18),
        _drafter(256, 2048, 4, 2, 512, **NO_PER_LAYER),
        SMALL_TOWERS,
        ordered=True,
    ),
    **_pair(
        "26B-A4B",
        _text(
            2816, 2112, 16, 8, _layers(5, 5), 1024, num_global_key_value_heads=2, enable_moe_block=True,
            num_experts=128, top_k_experts=8, moe_intermediate_size=704, **K_EQ_V, **NO_PER_LAYER,
        ),
        _drafter(1024, 8192, 16, 8, 1024, num_global_key_value_heads=2, **K_EQ_V, **NO_PER_LAYER),
        LARGE_TOWER,
    ),
    **_pair(
        "31B",
        _text(5376, 21_504, 32, 16, _layers(5, 10), 1024, num_global_key_value_heads=4, **K_EQ_V, **NO_PER_LAYER),
        _drafter(1024, 8192, 32, 16, 1024, num_global_key_value_heads=4, **K_EQ_V, **NO_PER_LAYER),
        LARGE_TOWER,
    ),
    **_pair(
        "12B",
        _text(3840, 15_360, 16, 8, _layers(5, 8), 1024, num_global_key_value_heads=1, **K_EQ_V),
        _drafter(1024, 8192, 16, 8, 1024, num_global_key_value_heads=1, **K_EQ_V),
        UNIFIED_TOWERS,
        family="gemma4_unified",
    ),
}  # fmt: skip


def released_config(name: str, text_config: dict[str, Any] | None = None) -> PreTrainedConfig | None:
    """The configuration of a released model, with some of its text settings replaced; None for another name."""
    raw = next((raw for known, raw in CONFIGS.items() if known.lower() == name.lower()), None)
    if raw is None:
        return None
    return CONFIG_MAPPING[raw["model_type"]].from_dict({**raw, "text_config": raw["text_config"] | (text_config or {})})
