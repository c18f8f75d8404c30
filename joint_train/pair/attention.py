"""Which kernel computes attention: ``model.attn_implementation=auto`` chooses one for each layer type and mask.

``by_layer_type`` is an attention implementation of transformers like ``sdpa``; the form of a layer's mask says what
computes it. :func:`joint_train.pair.visibility.attention_masks` gives a ``BlockMask`` for FlexAttention to sliding
layers and to packed rows, and no mask at all to SDPA where plain causality is the rule. What transformers makes itself,
in generation, are SDPA's masks.
"""

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from joint_train.errors import ConfigError
from joint_train.pair.blocks import block_mask
from joint_train.torch_private import allow_graphs, has_triton

log = logging.getLogger(__name__)

BY_LAYER_TYPE = "by_layer_type"
FLEX = (BY_LAYER_TYPE, "flex_attention")
GRAPHS = 128  # of FlexAttention in a process: by head_dim, heads, mask, with a gradient or without, one length or any


def implementation(name: str, device_type: str) -> str:
    """``model.attn_implementation`` with ``auto`` resolved: by layer type on a GPU that has Triton, else ``sdpa``."""
    if name != "auto":
        return name
    if device_type != "cuda" or (torch.cuda.is_available() and not has_triton()):
        return "sdpa"
    return BY_LAYER_TYPE


def kernels(config: PreTrainedConfig, dtype: torch.dtype, device_type: str) -> str:
    """A sentence on what computes attention.

    Args:
        config: the base's text configuration, of the model that was built.
        dtype: of compute.
        device_type: "cuda" tries the kernels that it names, once in a process; "meta" and "cpu" take them as given.
    """
    if config._attn_implementation != BY_LAYER_TYPE:
        return f"{config._attn_implementation} for all layers"
    sizes = {kind: head_dim(config, kind) for kind in ("sliding_attention", "full_attention")}
    masked = {
        kind: "FlexAttention" if flex_takes(size, dtype, device_type) else "SDPA with a dense mask"
        for kind, size in sizes.items()
    }
    sliding, full = masked.values()
    return (
        f"{sliding} for sliding layers (head_dim {sizes['sliding_attention']}); for full layers (head_dim "
        f"{sizes['full_attention']}) SDPA without a mask where a row is one document, {full} in packed rows"
    )


def check_backward(name: str, device_type: str) -> None:
    """Refuse what has no backward on the device.

    Raises:
        ConfigError: for FlexAttention on CPU.
    """
    if device_type == "cpu" and name in FLEX:
        raise ConfigError(
            f"model.attn_implementation={name}: FlexAttention has no backward on CPU; set auto, sdpa or eager."
        )


def head_dim(config: PreTrainedConfig, layer_type: str) -> int:
    """head_dim of the layers of a type; 0 without one."""
    layers = zip(config.layer_types, range(len(config.layer_types)), strict=True)
    return next((config.per_layer_config[i].head_dim for kind, i in layers if kind == layer_type), 0)


def flex_takes(size: int, dtype: torch.dtype, device_type: str) -> bool:
    """Whether FlexAttention runs, forward and backward, with a head_dim; on a GPU it is tried."""
    return size == 0 or device_type != "cuda" or not torch.cuda.is_available() or _tried(size, dtype)


@functools.cache
def _tried(size: int, dtype: torch.dtype) -> bool:
    def attend(query: Tensor, key: Tensor, mask: BlockMask) -> Tensor:  # its shapes don't count among the run's
        return flex_attention(query, key, key, block_mask=mask, scale=1.0, enable_gqa=True)

    try:
        with torch.enable_grad():
            query, key = (
                torch.zeros(1, heads, 256, size, dtype=dtype, device="cuda", requires_grad=True) for heads in (2, 1)
            )
            mask = block_mask(lambda b, h, q, k: q >= k, 256, query.device)
            torch.compile(attend, fullgraph=True)(query, key, mask).sum().backward()
            torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler, the card's shared memory or the driver has against it
        log.warning("FlexAttention with head_dim %d doesn't run on this GPU: %s", size, str(error).split("\n")[0])
        return False
    return True


class TrainableKernels(AbstractContextManager):
    """Within it SDPA has the kernels that were allowed before, but not cuDNN's, and again those before after it.

    cuDNN's backward gives NaN on Hopper from micro-batches of 2 on (NeMo AutoModel, issues 2208 and 3232). A backward
    runs on its forward's kernel.
    """

    def __enter__(self) -> None:
        flags = torch.backends.cuda
        allowed = {
            SDPBackend.FLASH_ATTENTION: flags.flash_sdp_enabled(),
            SDPBackend.EFFICIENT_ATTENTION: flags.mem_efficient_sdp_enabled(),
            SDPBackend.MATH: flags.math_sdp_enabled(),
        }
        self.kernels = sdpa_kernel([backend for backend, on in allowed.items() if on] or [SDPBackend.MATH])
        self.kernels.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.kernels.__exit__(*error)


# Of torch.utils.checkpoint, for what holds attention: it is recomputed in the backward, after the forward's choice.
CHECKPOINTING = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), TrainableKernels())}


@functools.cache
def compiled(backend: str = "inductor"):
    """FlexAttention's fused kernels. Past the limit of graphs it raises: what isn't compiled holds all the scores."""
    allow_graphs(GRAPHS)
    return torch.compile(flex_attention, fullgraph=True, backend=backend)


def flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float, window: int | None) -> Tensor:
    """FlexAttention of ``[B, heads, S, head_dim]``, keys and values with as many heads as they have.

    Args:
        window: that `mask` has, for those who count what is computed.
    """
    function = compiled() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return function(query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])


def by_layer_type(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """An attention function of transformers: FlexAttention for a ``BlockMask``, SDPA for a dense mask or none."""
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: FlexAttention has none; set model.attn_implementation=sdpa.")
    return flex(query, key, value, attention_mask, scaling, sliding_window).transpose(1, 2).contiguous(), None


AttentionInterface.register(BY_LAYER_TYPE, by_layer_type)
AttentionMaskInterface.register(BY_LAYER_TYPE, sdpa_mask)
