"""FlexAttention's kernels as they are compiled for cards that aren't here: they fit in a block's shared memory."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from cards import A100, B200, H100, SMALL, Card, lowered, shared_memory  # noqa: E402

from joint_train.errors import ConfigError  # noqa: E402
from joint_train.pair import attention  # noqa: E402
from joint_train.pair.attention import BY_LAYER_TYPE, KERNEL_OPTIONS, check_flex, options_for  # noqa: E402
from joint_train.pair.visibility import attention_masks  # noqa: E402
from joint_train.weights.released import CONFIGS, released_config  # noqa: E402

CARDS = {"A100": A100, "H100": H100, "B200": B200, "L40S": SMALL, "RTX 5090": Card((12, 0), 99 << 10)}
LENGTH = 1024


def released_heads() -> list[tuple[int, int, int]]:
    """(head_dim, heads, heads of keys and values) of every layer type of every released pair, one for each ratio."""
    found = {}
    for name in CONFIGS:
        config = released_config(name).get_text_config()
        for layer in range(len(config.layer_types)):
            size, kv = config.per_layer_config[layer].head_dim, config.per_layer_config[layer].num_key_value_heads
            found[size, config.num_attention_heads // kv] = size, config.num_attention_heads, kv
    return sorted(found.values())


def shared_by_kernel(card: Card, size: int, heads: int, kv: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Bytes of the kernels of the project's own attention in a packed row, forward and backward."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512}
    layers["per_layer_config"] = [SimpleNamespace(head_dim=256), SimpleNamespace(head_dim=512)]
    config = SimpleNamespace(**layers, _attn_implementation=BY_LAYER_TYPE)

    def inputs():
        tensors = [torch.empty(1, n, LENGTH, size, dtype=dtype, requires_grad=True) for n in (heads, kv, kv)]
        documents = torch.ones(1, LENGTH, dtype=torch.int64)
        masks = attention_masks(config, (1, LENGTH), dtype, torch.device("cpu"), documents)
        return *tensors, masks["full_attention" if size == 512 else "sliding_attention"]

    def of_the_card(query: torch.Tensor) -> dict[str, int]:
        return options_for(query.shape[-1], query.dtype, card.shared, card.capability[0])

    with mock.patch.object(attention, "_options", of_the_card):
        kernels = lowered(card, lambda q, k, v, mask: attention.flex(q, k, v, mask, 1.0, None), inputs)
    made = {kernel.name: kernel for kernel in kernels if "_tem_" in kernel.name}
    assert len(made) == 2, [kernel.name for kernel in kernels]
    return {"backward" if "backward" in name else "forward": shared_memory(card, k) for name, k in made.items()}


def claimed(card: Card, size: int) -> int:
    """What :data:`KERNEL_OPTIONS` says that the options for the card take."""
    chosen = options_for(size, torch.bfloat16, card.shared, card.capability[0])
    hopper, before, _ = next(entry for entry in KERNEL_OPTIONS[size] if entry[-1] == chosen)
    return hopper if card.capability[0] >= 9 else before


def check(card: Card, size: int, heads: int, kv: int) -> dict[str, int]:
    found = shared_by_kernel(card, size, heads, kv)
    assert max(found.values()) <= card.shared, found
    assert max(found.values()) <= claimed(card, size), found
    return found


def test_kernels_fit_on_an_h100():
    """At 31B's shapes; with inductor's own tiles head_dim 512 takes 263,168 bytes of 232,448."""
    assert check(H100, 512, 32, 4) == {"forward": 196_864, "backward": 131_072}
    assert max(check(H100, 256, 32, 16).values()) == 197_888


@pytest.mark.slow  # Triton compiles for minutes
@pytest.mark.parametrize("heads", released_heads(), ids=str)
@pytest.mark.parametrize("card", CARDS)
def test_kernels_fit_on_every_card(card, heads):
    check(CARDS[card], *heads)


def test_the_choice_follows_shared_memory():
    for card in CARDS.values():
        for size in (256, 512):
            assert claimed(card, size) <= card.shared
    assert options_for(512, torch.bfloat16, H100.shared)["fwd_num_stages"] == 2
    assert options_for(512, torch.bfloat16, A100.shared, 8)["fwd_num_stages"] == 2
    assert options_for(512, torch.bfloat16, A100.shared)["fwd_BLOCK_M"] == 32  # as a Hopper of that size would need
    assert options_for(512, torch.bfloat16, None) == options_for(512, torch.bfloat16, SMALL.shared)
    assert options_for(256, torch.float16, H100.shared) == {"bwd_num_warps": 8}
    for size, dtype in ((128, torch.bfloat16), (512, torch.float32), (576, torch.bfloat16)):
        assert options_for(size, dtype, H100.shared) == {}


def test_the_card_is_asked(monkeypatch):
    attention._properties.cache_clear()
    for card in (H100, SMALL):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, card=card: card.properties)
        expected = options_for(512, torch.bfloat16, card.shared, card.capability[0])
        assert attention.kernel_options(512, torch.bfloat16, 0) == expected
        attention._properties.cache_clear()


def test_the_options_reach_flex_attention_compiled_or_not(monkeypatch):
    """As in a layer that is compiled, and by both names of the implementation."""
    options = options_for(512, torch.bfloat16, H100.shared)
    given = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: H100.properties)
    monkeypatch.setattr(attention, "_options", lambda query: attention.kernel_options(512, torch.bfloat16, 0))
    monkeypatch.setattr(attention, "flex_attention_forward", lambda *_, **kwargs: given.append(kwargs))
    attention._properties.cache_clear()
    attention.flex_with_options(None, torch.empty(1, 1, 1, 512), None, None, None)
    attention.flex_with_options(None, torch.empty(1, 1, 1, 512), None, None, None, kernel_options={"BLOCK_M": 16})
    assert [kwargs["kernel_options"] for kwargs in given] == [options, {"BLOCK_M": 16}]

    @torch.compile(backend="eager", fullgraph=True)
    def doubled(x):
        return attention._options(x)["fwd_BLOCK_M"] * x

    assert doubled(torch.ones(1)) == options["fwd_BLOCK_M"]
    attention._properties.cache_clear()


def test_flex_attention_is_refused_where_a_layer_cannot_have_it(monkeypatch):
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    layers["per_layer_config"] = [SimpleNamespace(head_dim=256), SimpleNamespace(head_dim=512)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "_kernel_runs", lambda size, dtype: size < 512)
    config = SimpleNamespace(**layers, _attn_implementation="flex_attention")
    with pytest.raises(ConfigError, match=r"flex_attention: .* head_dim 512 \(full_attention layers\).*=auto"):
        check_flex(config, torch.bfloat16, "cuda")
    check_flex(config, torch.bfloat16, "meta")
    config._attn_implementation = BY_LAYER_TYPE  # it takes SDPA there
    check_flex(config, torch.bfloat16, "cuda")
