"""Keys and values of KV-shared layers: weights that no forward uses, but that some engines expect in a folder.

The last ``num_kv_shared_layers`` layers of a Gemma 4 base reuse the keys and values of the last layer of their type
before them, so they have no ``k_proj``, ``v_proj`` and ``k_norm``. vLLM before September 2026 refuses a folder without
them (https://github.com/vllm-project/vllm/issues/44788); the released E2B and E4B have them.
"""

import re
from collections.abc import Iterable

from transformers import PreTrainedConfig

# Of the text model only: towers have layers, too.
KEYS_AND_VALUES = re.compile(
    r"((?:model\.)?(?:language_model\.)?(?:model\.)?layers\.)(\d+)(\.self_attn\.(?:k_proj|v_proj|k_norm)\..+)"
)


def absent_copies(config: PreTrainedConfig, keys: Iterable[str]) -> dict[str, str]:
    """What a folder lacks of the KV-shared layers' keys and values.

    Args:
        config: of the model.
        keys: names of the tensors in the folder.

    Returns:
        For the name of each absent tensor, that of the one whose part it plays: its layer would compute the same keys
        and values with a copy of it. Empty for a model without KV sharing, and for a drafter, which computes none.
    """
    keys = set(keys)
    text = config.get_text_config()
    own = text.num_hidden_layers - getattr(text, "num_kv_shared_layers", 0)
    reused = {kind: layer for layer, kind in enumerate(text.layer_types[:own])}  # the last one of each type
    sharing: dict[int, list[int]] = {}  # by the layer that is reused
    for layer in range(own, text.num_hidden_layers):
        sharing.setdefault(reused.get(text.layer_types[layer], -1), []).append(layer)
    copies: dict[str, str] = {}
    for key in sorted(keys):
        if found := KEYS_AND_VALUES.fullmatch(key):
            before, number, after = found.groups()
            copies |= {f"{before}{other}{after}": key for other in sharing.get(int(number), [])}
    return {absent: key for absent, key in copies.items() if absent not in keys}
