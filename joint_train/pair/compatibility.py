"""Whether a drafter was made for a base, told from the two configurations."""

from typing import Any

from transformers import PreTrainedConfig

from joint_train.errors import ConfigError


def check_pair(base: PreTrainedConfig, drafter: PreTrainedConfig) -> None:
    """Refuse a drafter that was made for another base.

    Raises:
        ConfigError: listing every size that differs; or if one of them is a model of the other kind.
    """
    for key, config, drafts in (("model.base", base, False), ("model.drafter", drafter, True)):
        if hasattr(config, "backbone_hidden_size") != drafts:
            what = "a base, not a drafter" if drafts else "a drafter, not a base"
            raise ConfigError(f"{key} is a {config.model_type} model: {what}. Are base and drafter swapped?")
    text, draft = base.get_text_config(), drafter.get_text_config()
    wrong = []

    def expect(what: str, of_drafter: Any, of_base: Any) -> None:
        if of_drafter != of_base:
            wrong.append(f"{what} is {of_drafter} in the drafter and {of_base} in the base")

    expect("hidden size of the base (backbone_hidden_size)", drafter.backbone_hidden_size, text.hidden_size)
    expect("vocab_size", draft.vocab_size, text.vocab_size)
    own = text.layer_types[: text.num_hidden_layers - text.num_kv_shared_layers]
    for kind in sorted(set(draft.layer_types)):
        if kind not in own:
            wrong.append(f"the drafter has {kind} layers, the base has none that computes keys and values")
            continue
        store = text.per_layer_config[len(own) - 1 - own[::-1].index(kind)]
        reader = draft.per_layer_config[draft.layer_types.index(kind)]
        expect(f"head_dim of {kind}", reader.head_dim, store.head_dim)
        expect(f"num_key_value_heads of {kind}", reader.num_key_value_heads, store.num_key_value_heads)
        for name in ("rope_type", "rope_theta", "partial_rotary_factor"):
            ropes = (config.rope_parameters[kind].get(name) for config in (draft, text))
            expect(f"{name} of {kind}", *ropes)
    if wrong and all(what.startswith("vocab_size ") for what in wrong):
        raise ConfigError(
            f"model.drafter doesn't belong to model.base: {wrong[0]}. If only the vocabulary was resized, set "
            "model.resize_vocabulary=true, which gives both the larger one."
        )
    if wrong:
        raise ConfigError(
            "model.drafter doesn't belong to model.base:\n  "
            + "\n  ".join(wrong)
            + "\nTake the drafter that was released with this base, or undo the model.text_config that changes it."
        )
