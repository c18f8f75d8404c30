"""Which keys a row may see: itself and what comes before it in its own document, and never padding.

One rule serves the base and the drafter. The drafter reads the base's keys and values at every row of a sequence at
once, so it needs the base's causal masks; the masks that ``Gemma4AssistantForCausalLM.forward`` builds are
bidirectional, right for the single last row of generation and a leak of the answer in training.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_overlay,
)

from joint_train.pair.attention import BY_LAYER_TYPE, flex_takes, head_dim
from joint_train.pair.blocks import BLOCK, block_mask

Masks = dict[str, Tensor | BlockMask | None]


def attention_masks(
    config: PreTrainedConfig,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    document_ids: Tensor | None = None,
    blocks: Tensor | None = None,
) -> Masks:
    """Masks of each attention type, in the form that the model's attention implementation takes.

    Row t of a document sees j with j <= t in the same document, and on sliding layers t - j < ``sliding_window``.

    Args:
        config: text configuration: ``sliding_window`` and the attention implementation are read.
        shape: ``(B, S)``.
        dtype: of the hidden states (an eager mask is added to scores of that dtype).
        device: where the masks are made.
        document_ids: ``[B, S]`` int64, 0 for padding; ``None`` where each row is one document padded on the right:
            causality alone then keeps padding out of sight, and no mask tensor is made where SDPA can do without.
        blocks: ``[B, S]`` int64, the image that a position belongs to, or -1: positions of one image see each other
            both ways on sliding layers (``use_bidirectional_attention="vision"``).

    Returns:
        ``{"full_attention": mask, "sliding_attention": mask}``; ``None`` means plain causal.
    """
    batch, length = shape
    masks: Masks = {}
    for layer_type, window in (("full_attention", None), ("sliding_attention", config.sliding_window)):
        rule = causal_mask_function
        if window is not None:
            if blocks is not None:
                rule = or_masks(rule, blockwise_overlay(blocks))
            rule = and_masks(rule, sliding_window_overlay(window))
        if document_ids is not None:
            rule = and_masks(rule, packed_sequence_mask_function(document_ids))
        plain = document_ids is None and (window is None or blocks is None)
        if config._attn_implementation == BY_LAYER_TYPE:
            if plain and (window is None or window >= length):
                masks[layer_type] = None
                continue
            # In rows of one block there is nothing to leave out, and FlexAttention has another kernel, for decoding.
            if length > BLOCK and flex_takes(head_dim(config, layer_type), dtype, device.type):
                masks[layer_type] = block_mask(rule, length, device, window, document_ids, blocks)
                continue
        masks[layer_type] = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
            batch_size=1 if plain else batch,
            q_length=length,
            kv_length=length,
            mask_function=rule,
            local_size=window,
            allow_is_causal_skip=plain,
            dtype=dtype,
            device=device,
            config=config,
        )
    return masks
