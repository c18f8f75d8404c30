"""Which kernel computes attention: ``model.attn_implementation=auto`` chooses one for each layer type and mask.

``by_layer_type`` is an attention implementation of transformers like ``sdpa``; the form of a layer's mask says what
computes it. :func:`joint_train.pair.visibility.attention_masks` gives a ``BlockMask`` for FlexAttention to sliding
layers and to packed rows, and no mask at all to SDPA where plain causality is the rule. What transformers makes itself,
in generation, are SDPA's masks.
"""

import functools
import logging

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from joint_train.errors import ConfigError
from joint_train.pair.blocks import block_mask
from joint_train.pair.recompute import keep_output, run_or_replay
from joint_train.torch_private import graph_limit, has_triton

log = logging.getLogger(__name__)

BY_LAYER_TYPE = "by_layer_type"
FLEX = (BY_LAYER_TYPE, "flex_attention")
GRAPHS = 128  # of FlexAttention: by head_dim, heads, mask, with a gradient or without, one length or any


@functools.cache
def _properties(index: int | None):
    return torch.cuda.get_device_properties(index)


def _tiles(forward: tuple[int, int, int, int], backward: tuple[int, int, int]) -> dict[str, int]:
    """FlexAttention's ``kernel_options`` for (queries, keys, stages, warps) and (queries and keys, stages, warps)."""
    names = [f"fwd_{name}" for name in ("BLOCK_M", "BLOCK_N", "num_stages", "num_warps")]
    names += [f"bwd_{name}" for name in ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_stages", "num_warps")]
    return dict(zip(names, (*forward, *4 * backward[:1], *backward[1:]), strict=True))


# Options of FlexAttention in half precision by the largest head_dim that they are for, the fastest first, and the bytes
# of shared memory that a block then takes, the more of forward and backward: from compute capability 9.0 on and before
# it, where Triton pipelines otherwise. The bytes are the compiler's, and a test compiles for them. Inductor's own tiles
# take 263,168 bytes at head_dim 512, more than any card has; at 256 its backward spills registers with 4 warps.
KERNEL_OPTIONS: dict[int, tuple[tuple[int, int, dict[str, int]], ...]] = {
    256: (
        (197_888, 152_576, {"bwd_num_warps": 8}),
        (69_888, 69_888, _tiles((64, 32, 2, 4), (32, 1, 4))),
    ),
    512: (
        (197_920, 135_424, _tiles((64, 32, 2, 8), (32, 1, 8))),
        (67_584, 67_584, _tiles((32, 32, 1, 4), (16, 1, 4))),
    ),
}


def options_for(size: int, dtype: torch.dtype, shared: int | None, major: int = 9) -> dict[str, int]:
    """The first of :data:`KERNEL_OPTIONS` that fit; none where inductor's own are right: small or fp32 heads.

    Args:
        size: head_dim.
        shared: most bytes of shared memory of a block on the card; None, not known: what takes least.
        major: of the card's compute capability.
    """
    known = next((options for most, options in KERNEL_OPTIONS.items() if most // 2 < size <= most), ())
    if dtype.itemsize != 2 or not known:
        return {}
    needed = ((hopper if major >= 9 else before, options) for hopper, before, options in known)
    return next((options for taken, options in needed if shared is not None and taken <= shared), known[-1][-1])


@torch.compiler.assume_constant_result  # in a layer that is compiled
def kernel_options(size: int, dtype: torch.dtype, index: int | None) -> dict[str, int]:
    """:func:`options_for` a CUDA device, by its index, as the driver describes it."""
    card = _properties(index)
    return options_for(size, dtype, getattr(card, "shared_memory_per_block_optin", None), card.major)


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


def check_flex(config: PreTrainedConfig, dtype: torch.dtype, device_type: str) -> None:
    """Refuse ``model.attn_implementation=flex_attention`` where a layer type can't have it: nothing takes its place.

    Args:
        config: the base's text configuration, of the model that was built.
        dtype: of compute.
        device_type: as in :func:`kernels`.

    Raises:
        ConfigError: naming the layers and what to set instead.
    """
    if config._attn_implementation != "flex_attention":
        return
    for kind in sorted(set(config.layer_types)):
        if not flex_takes(size := head_dim(config, kind), dtype, device_type):
            raise ConfigError(
                f"model.attn_implementation=flex_attention: FlexAttention with head_dim {size} ({kind} layers) doesn't "
                f"run on this GPU in {str(dtype).removeprefix('torch.')}. Set model.attn_implementation=auto, which "
                "takes SDPA for those layers."
            )


def head_dim(config: PreTrainedConfig, layer_type: str) -> int:
    """head_dim of the layers of a type; 0 without one."""
    layers = zip(config.layer_types, range(len(config.layer_types)), strict=True)
    return next((config.per_layer_config[i].head_dim for kind, i in layers if kind == layer_type), 0)


def flex_takes(size: int, dtype: torch.dtype, device_type: str) -> bool:
    """Whether FlexAttention runs, forward and backward, with a head_dim; on a GPU it is tried."""
    return size == 0 or device_type != "cuda" or not torch.cuda.is_available() or _kernel_runs(size, dtype)


@functools.cache
def _kernel_runs(size: int, dtype: torch.dtype) -> bool:
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:  # with shapes of its own
        options = kernel_options(size, dtype, query.device.index)
        return flex_attention(query, key, value, block_mask=mask, scale=1.0, enable_gqa=True, kernel_options=options)

    try:
        with torch.enable_grad():
            # Keys that aren't the values: those that are need less shared memory.
            query, key, value = (
                torch.zeros(1, heads, 256, size, dtype=dtype, device="cuda", requires_grad=True) for heads in (2, 1, 1)
            )
            mask = block_mask(lambda b, h, q, k: q >= k, 256, query.device)
            torch.compile(attend, fullgraph=True)(query, key, value, mask).sum().backward()
            torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler, the card's shared memory or the driver has against it
        log.warning("FlexAttention with head_dim %d doesn't run on this GPU: %s", size, str(error).split("\n")[0])
        return False
    return True


@functools.cache
def compiled(backend: str = "inductor"):
    """FlexAttention's fused kernels. Past the limit of graphs it raises: what isn't compiled holds all the scores."""
    return torch.compile(flex_attention, fullgraph=True, backend=backend, **graph_limit(GRAPHS, isolated=True))


def flex(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None, window: int | None
) -> Tensor:
    """FlexAttention of ``[B, heads, S, head_dim]``, keys and values with as many heads as they have.

    Args:
        window: that `mask` has, for those who count what is computed.
    """
    function = compiled() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    grouped, options = query.shape[1] != key.shape[1], _options(query)
    return function(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped, kernel_options=options)


def _options(query: Tensor) -> dict[str, int] | None:
    return kernel_options(query.shape[-1], query.dtype, query.device.index) if query.is_cuda else None


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
        return keep_output(sdpa_attention_forward)(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: FlexAttention has none; set model.attn_implementation=sdpa.")
    out = run_or_replay(flex, query, key, value, attention_mask, scaling, sliding_window)
    return out.transpose(1, 2).contiguous(), None


def flex_with_options(module: nn.Module, query: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
    """transformers' ``flex_attention``, with tiles that fit the card unless others are given."""
    if kwargs.get("kernel_options") is None:
        kwargs["kernel_options"] = _options(query)
    return flex_attention_forward(module, query, *args, **kwargs)


# A name that transformers doesn't know, for every model; the pair's own layers keep the outputs of the others, too, and
# leave those of other models as they are.
AttentionInterface.register(BY_LAYER_TYPE, by_layer_type)
AttentionMaskInterface.register(BY_LAYER_TYPE, sdpa_mask)
OF_THE_PAIR = AttentionInterface()
OF_THE_PAIR["sdpa"] = keep_output(sdpa_attention_forward)  # the same outside of what is recomputed selectively
OF_THE_PAIR["flex_attention"] = keep_output(flex_with_options)
