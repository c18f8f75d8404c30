"""Attention by layer type: the block masks against the rule, the models against dense masks, and what is allocated."""

import logging
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from configs import compose
from pairs import build_pair, make_pair
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from joint_train.distributed.parallelize import prepare
from joint_train.errors import ConfigError
from joint_train.evaluate.decoding import decode
from joint_train.pair import attention
from joint_train.pair.attention import BY_LAYER_TYPE, check_backward, implementation, kernels
from joint_train.pair.blocks import BLOCK, visible
from joint_train.pair.visibility import attention_masks
from joint_train.plan.planner import Machine, make_plan
from joint_train.plan.step import simulate
from joint_train.weights.composite import Gemma4WithDrafter, load_pair, meta_pair

CPU = torch.device("cpu")
LENGTH, WINDOW = 3 * BLOCK + 40, 150


def config(kind: str = BY_LAYER_TYPE, **changes) -> SimpleNamespace:
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    layers["per_layer_config"] = [SimpleNamespace(head_dim=16), SimpleNamespace(head_dim=32)]
    return SimpleNamespace(**{"sliding_window": WINDOW, "_attn_implementation": kind} | layers | changes)


def masks_of(config, length: int, rows: int = 1, documents=None, images=None, dtype=torch.float32) -> dict:
    return attention_masks(config, (rows, length), dtype, CPU, documents, images)


def documents(*rows: tuple[int, ...], length: int = LENGTH) -> torch.Tensor:
    """``[B, S]`` of documents of these lengths; the rest is padding."""
    table = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, lengths in zip(table, rows, strict=True):
        start = 0
        for number, size in enumerate(lengths, start=1):
            row[start : start + size] = number
            start += size
    return table


# The masks


def blocks_of(mask, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pairs of blocks are seen in part and which as a whole, ``[B, S / 128, S / 128]`` each."""

    def table(number, order):
        places = torch.arange(order.shape[-1]) < number[..., None]
        return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order.long(), places)[:, 0]

    part = table(mask.kv_num_blocks, mask.kv_indices)
    assert torch.equal(table(mask.q_num_blocks, mask.q_indices).transpose(1, 2), part)  # as the backward reads it
    whole = table(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(table(mask.full_q_num_blocks, mask.full_q_indices).transpose(1, 2), whole)
    assert not (part & whole).any()
    return tuple(x.expand(rows, -1, -1) for x in (part, whole))


def dense(mask, rows: int, length: int) -> torch.Tensor:
    """What a block mask lets through, ``[B, S, S]``: whole blocks, and the kernel's pairs in those seen in part."""
    if length <= BLOCK:  # SDPA's, as it is
        return mask.expand(rows, 1, -1, -1)[:, 0]
    index = torch.arange(length)
    pairs = mask.mask_mod(torch.arange(rows)[:, None, None], torch.tensor(0), index[None, :, None], index[None, None])
    part, whole = (
        blocks.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :length, :length]
        for blocks in blocks_of(mask, rows)
    )
    return whole | (part & pairs)


def rule(documents: torch.Tensor, images: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which positions j a row t sees, ``[B, S, S]``, written out."""
    t, j = torch.arange(documents.shape[1])[:, None], torch.arange(documents.shape[1])[None, :]
    sees = (j <= t).expand(len(documents), -1, -1)
    if window is not None:
        sees = sees | ((images[:, :, None] == images[:, None, :]) & (images >= 0)[:, :, None])
        sees = sees & (t - j < window)
    return sees & (documents[:, :, None] == documents[:, None, :])


def random_rows(seed: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """A window, packed rows with padding on either side or holes, and spans of images in them."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    length = number(1, 5) * BLOCK if seed % 3 == 0 else number(2, 5 * BLOCK)
    table, images = torch.zeros(2, length, dtype=torch.int64), torch.full((2, length), -1)
    for row, spans in zip(table, images, strict=True):
        start, document, image = (number(0, length // 2) if seed % 4 == 1 else 0), 1, 0
        while start < length and number(0, 8):
            end = min(start + number(1, 2 * BLOCK), length)
            row[start:end] = document
            start, document = end, document + 1
        if seed % 4 == 2:  # padding inside a document
            hole = number(0, length - 1)
            row[hole : hole + number(1, BLOCK)] = 0
        for _ in range(number(0, 4)):
            start = number(0, length - 1)
            spans[start : start + number(1, 200)] = image
            image += 1
    return number(1, length + 20), table, images


@pytest.mark.parametrize("with_images", [False, True])
def test_block_masks_are_the_rule(with_images):
    whole = 0
    for seed in range(60):
        window, table, images = random_rows(seed)
        length, tokens = table.shape[1], table > 0
        masks = masks_of(config(sliding_window=window), length, 2, table, images if with_images else None)
        for kind, width in (("full_attention", None), ("sliding_attention", window)):
            expected = rule(table, images if with_images else torch.full_like(images, -1), width)
            ours = dense(masks[kind], 2, length)
            assert torch.equal(ours[tokens], expected[tokens]), (seed, kind)
            if length > BLOCK:
                whole += int(masks[kind].full_kv_num_blocks.sum())
    assert whole > 0


@pytest.mark.parametrize("with_images", [False, True])
def test_block_masks_of_rows_of_one_document(with_images):
    table = torch.ones(2, LENGTH, dtype=torch.int64)
    images = torch.full((2, LENGTH), -1)
    images[0, 100:140], images[0, 200:380], images[1, 300:] = 0, 1, 0
    masks = masks_of(config(), LENGTH, 2, None, images if with_images else None)
    assert masks["full_attention"] is None  # causality is the rule, which SDPA knows
    expected = rule(table, images if with_images else torch.full_like(images, -1), WINDOW)
    assert torch.equal(dense(masks["sliding_attention"], 2, LENGTH), expected)


def test_no_block_is_visited_that_nothing_is_seen_in():
    """Packed rows: the kernel's work is that of the documents, not that of the row."""
    table = documents((BLOCK, 200, 30), (5, 300), (LENGTH,), (64, 64, BLOCK, 40))
    masks = masks_of(config(), LENGTH, 4, table)
    for kind, window in (("full_attention", None), ("sliding_attention", WINDOW)):
        part, whole = blocks_of(masks[kind], 4)
        expected = rule(table, torch.full_like(table, -1), window)
        extra = -LENGTH % BLOCK
        tiles = torch.nn.functional.pad(expected, (0, extra, 0, extra)).unflatten(2, (-1, BLOCK))
        tiles = tiles.unflatten(1, (-1, BLOCK))
        assert torch.equal(part | whole, tiles.any(4).any(2)), kind
        assert torch.equal(whole, tiles.all(4).all(2)), kind


def test_no_mask_where_causality_is_the_rule():
    assert masks_of(config(sliding_window=512), 512, 2) == {"full_attention": None, "sliding_attention": None}


def test_layers_that_flex_cannot_run_get_dense_masks(monkeypatch):
    monkeypatch.setattr("joint_train.pair.visibility.flex_takes", lambda size, dtype, device_type: size < 32)
    masks = masks_of(config(), LENGTH, 2, documents((BLOCK, 200), (LENGTH,)))
    assert isinstance(masks["full_attention"], torch.Tensor)
    assert masks["full_attention"].shape == (2, 1, LENGTH, LENGTH)
    assert isinstance(masks["sliding_attention"], torch_flex.BlockMask)


# The models


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """Let FlexAttention go backward on CPU, where its plain version can, and torch refuses it; write down its calls."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_flex, "_WARNINGS_SHOWN", {"flex_attention_performance"})
    calls, flex = [], attention.flex

    def noted(query, key, value, mask, scaling, window):
        calls.append((query.shape[1], key.shape[1], window))
        return flex(query, key, value, mask, scaling, window)

    monkeypatch.setattr(attention, "flex", noted)
    return calls


def step(pair: Gemma4WithDrafter, ids: torch.Tensor, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = pair.train()(ids, labels=ids, **inputs)
    out.loss.backward()
    losses = torch.stack([out.loss.detach(), *(x.sum() for _, x in sorted(out.stats.named().items()))])
    return losses, {name: p.grad for name, p in pair.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", ["e2b", "31b"])
@pytest.mark.parametrize("rows", ["packed", "one document", "padded on the left"])
def test_losses_and_gradients_are_those_of_dense_masks(shape, rows, flex_on_cpu):
    """In float64, where rounding hides nothing; with recomputation against without."""
    length = BLOCK + 30
    ids = torch.randint(3, 240, (2, length), generator=torch.Generator().manual_seed(0))
    inputs = {}
    if rows == "packed":
        inputs["document_ids"] = documents((50, 79), (100, 40, 18), length=length)
    elif rows == "padded on the left":
        inputs["attention_mask"] = (torch.arange(length) >= torch.tensor([[0], [60]])).long()
    results = []
    for kind in ("sdpa", BY_LAYER_TYPE):
        pair = Gemma4WithDrafter(
            *(model.double() for model in build_pair(shape, attn_implementation=kind)),
            drafter_num_steps=2,
            base_activation_checkpointing=kind == BY_LAYER_TYPE,
            drafter_activation_checkpointing=kind == BY_LAYER_TYPE,
        )
        results.append(step(pair, ids, **inputs))
        assert bool(flex_on_cpu) == (kind == BY_LAYER_TYPE)
    assert all(query > key for query, key, _ in flex_on_cpu)  # keys and values aren't repeated
    windows = {window is None for *_, window in flex_on_cpu}
    assert windows == ({False} if rows == "one document" else {False, True})  # full layers: SDPA without a mask
    (losses, gradients), (ours, our_gradients) = results
    torch.testing.assert_close(ours, losses, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == our_gradients.keys()
    assert {name.split(".")[0] for name in gradients} == {"base", "drafter"}
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 1e-10 * gradient.norm().clamp(min=1e-3), name


def test_losses_in_float32(flex_on_cpu):
    ids = torch.randint(3, 240, (2, 180), generator=torch.Generator().manual_seed(1))
    losses = []
    for kind in ("sdpa", BY_LAYER_TYPE):
        pair = Gemma4WithDrafter(*build_pair("31b", attn_implementation=kind), drafter_num_steps=2)
        losses.append(step(pair, ids, document_ids=documents((50, 79), (100, 80), length=180)))
    (loss, gradients), (ours, our_gradients) = losses
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)
    whole = torch.stack([x.norm() for x in gradients.values()]).norm()
    assert torch.stack([(our_gradients[n] - x).norm() for n, x in gradients.items()]).norm() <= 1e-5 * whole


@pytest.mark.parametrize("assisted", [False, True])
def test_generation_is_that_of_sdpa(assisted):
    """With caches, prompts longer than the window, and the mask functions of transformers' own."""
    texts = []
    for kind in ("sdpa", BY_LAYER_TYPE):
        base, drafter = build_pair("e2b", attn_implementation=kind)
        ids = torch.randint(3, 240, (40,), generator=torch.Generator().manual_seed(0)).tolist()
        decoded = decode(base, drafter if assisted else None, ids, 3, 30, ignore_eos=True)
        batch = base.generate(
            torch.tensor([ids, [0] * 20 + ids[20:]]),
            attention_mask=torch.tensor([[1] * 40, [0] * 20 + [1] * 20]),
            max_new_tokens=10,
            do_sample=False,
        )
        texts.append((decoded.ids, decoded.drafted, batch.tolist()))
    assert texts[0] == texts[1] and len(texts[0][0]) == 30


def test_a_saved_configuration_does_not_name_it(tmp_path):
    base, drafter = build_pair("e2b", attn_implementation=BY_LAYER_TYPE)
    for name, model in (("base", base), ("drafter", drafter)):
        model.save_pretrained(tmp_path / name)
        assert BY_LAYER_TYPE not in (tmp_path / name / "config.json").read_text()


# The compiler


@torch._dynamo.config.patch(recompile_limit=8)
def test_graphs_are_few_and_never_left_for_uncompiled_attention(flex_on_cpu, monkeypatch):
    """The kernels are compiled for a GPU only; which graphs are made, and how many, shows on CPU too.

    In float64: sums over a row in another order, of gradients up to 30, differ in float32 by 1e-4 and more.
    """
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = attention.compiled(counter)
    made = []
    for length in (256, 256, 384, 300, 448):
        table = documents((100, length - 110), (length,), length=length)
        masks, plain = (masks_of(config(kind), length, 2, table) for kind in (BY_LAYER_TYPE, "sdpa"))
        for kind, size in (("sliding_attention", 16), ("full_attention", 32)):
            for heads in (4, 2):  # base and drafter
                options = {"dtype": torch.float64, "requires_grad": True}
                query, key = (torch.randn(2, n, length, size, **options) for n in (heads, 1))
                wide = key.expand(-1, heads, -1, -1)
                expected = torch.nn.functional.scaled_dot_product_attention(query, wide, wide, plain[kind], scale=1.0)
                for grad in (True, False):
                    with torch.set_grad_enabled(grad):
                        out = function(query, key, key, block_mask=masks[kind], scale=1.0, enable_gqa=True)
                    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
                    if grad:
                        grads = (torch.autograd.grad(x.square().sum(), (query, key)) for x in (out, expected))
                        for ours, theirs in zip(*grads, strict=True):
                            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        made.append(counter.frame_count)
    assert made[0] == made[1] == 8 and made[2] == made[-1] == 16  # one length, then any: new masks make no graph
    monkeypatch.setattr(attention, "GRAPHS", 1)
    function = attention.compiled(CompileCounterWithBackend("aot_eager"))
    small = [x[..., :8] for x in (query[:1], key[:1], key[:1])]
    function(*small, scale=1.0, enable_gqa=True)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        function(*(x[..., :4] for x in small), scale=1.0, enable_gqa=True)
    torch.compiler.reset()


def test_compiled_layers(flex_on_cpu):
    compile_layer, results = torch.nn.Module.compile, []
    ids = torch.randint(3, 240, (2, 180), generator=torch.Generator().manual_seed(1))
    for compiled in (False, True):
        torch.compiler.reset()
        cfg = compose()
        cfg.parallel.compile, cfg.activation_checkpointing.base = compiled, "full"
        pair = Gemma4WithDrafter(*build_pair("31b", attn_implementation=BY_LAYER_TYPE))
        with mock.patch.object(torch.nn.Module, "compile", lambda m, **o: compile_layer(m, backend="aot_eager", **o)):
            prepare(pair, cfg)
        results.append(step(pair, ids, document_ids=documents((50, 79), (100, 80), length=180)))
    torch.compiler.reset()
    (losses, gradients), (ours, our_gradients) = results
    torch.testing.assert_close(ours, losses, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm().clamp(min=1e-3), name


# What is allocated and counted


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.itemsize for x in tensors)])
        return out


def test_a_packed_step_makes_no_square_of_its_length():
    length = 8192
    numbers = torch.arange(length)[None] // 1000 + 1
    with Largest() as largest:
        masks_of(config(), length, 1, numbers, numbers)
    assert largest.elements <= length * 8

    elements = {}
    for kind in ("auto", "sdpa"):
        cfg = compose()
        cfg.model.attn_implementation, cfg.data.max_length, cfg.drafter.num_steps = kind, length, 1
        cfg.loss.memory_budget_mb = 1
        configs = (model.config for model in build_pair("31b"))
        pair = meta_pair(cfg, *configs, torch.float32, "cuda")
        with Largest() as largest:
            simulate(pair, cfg, 1, "cuda")
        elements[kind] = largest.elements
    assert elements["auto"] < length * length / 16 < length * length <= elements["sdpa"]


def test_what_a_row_sees_is_counted():
    for length, window in ((LENGTH, None), (LENGTH, WINDOW), (LENGTH, 1), (5 * BLOCK, 2 * BLOCK), (130, 7)):
        masks = masks_of(config(sliding_window=window), length, 1, torch.ones(1, length, dtype=torch.int64))
        part, whole = blocks_of(masks["full_attention" if window is None else "sliding_attention"], 1)
        assert visible(length, window) == min(length, float((part | whole).sum()) * BLOCK / part.shape[1])


def test_the_plan_counts_masks_and_windows(tmp_path):
    base, drafter = make_pair(tmp_path, "31b")
    plans = {}
    for kind in ("auto", "sdpa"):
        cfg = compose()
        cfg.model.base, cfg.model.drafter = str(base), str(drafter)
        cfg.model.attn_implementation, cfg.data.max_length = kind, 4096
        plans[kind] = make_plan(cfg, Machine(gpus=1))
    assert plans["auto"].flops < plans["sdpa"].flops
    # Two masks of a byte a pair and the kernels' form of one in bfloat16, for base and drafter.
    assert plans["sdpa"].peak - plans["auto"].peak > 4 * 4096**2
    assert plans["auto"].attention.startswith("FlexAttention for sliding layers (head_dim ")
    assert plans["sdpa"].attention == "sdpa for all layers"


# The choice


def test_auto_is_sdpa_on_cpu_and_by_layer_type_on_a_gpu(monkeypatch):
    assert implementation("auto", "cpu") == "sdpa"
    assert implementation("auto", "cuda") == BY_LAYER_TYPE
    assert implementation("eager", "cuda") == "eager"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "has_triton", lambda: False)
    assert implementation("auto", "cuda") == "sdpa"
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    assert implementation("auto", "cuda") == BY_LAYER_TYPE
    for runs, named in ((True, "FlexAttention in packed rows"), (False, "SDPA with a dense mask in packed rows")):
        monkeypatch.setattr(attention, "_kernel_runs", lambda size, dtype, runs=runs: runs or size < 32)
        sentence = kernels(config(), torch.bfloat16, "cuda")
        assert sentence.startswith("FlexAttention for sliding layers (head_dim 16)") and sentence.endswith(named)


def test_a_gpu_that_flex_does_not_compile_for(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # and then there is none
    attention._kernel_runs.cache_clear()
    assert not attention.flex_takes(512, torch.bfloat16, "cuda")
    assert "FlexAttention with head_dim 512 doesn't run on this GPU: " in caplog.text
    attention._kernel_runs.cache_clear()


def test_what_has_no_backward_is_refused():
    for name in ("by_layer_type", "flex_attention"):
        with pytest.raises(ConfigError, match=f"model.attn_implementation={name}: .* no backward on CPU; set auto"):
            check_backward(name, "cpu")
        check_backward(name, "cuda")
    check_backward("auto", "cpu")


def flags() -> dict[str, bool]:
    names = ("flash", "mem_efficient", "math", "cudnn")
    return {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names}


def test_the_choice_is_told_and_building_a_pair_leaves_the_process_as_it_is(tmp_path, caplog):
    base, drafter = make_pair(tmp_path, "e2b")
    cfg = compose()
    cfg.model.base, cfg.model.drafter = str(base), str(drafter)
    before = flags(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist()
    assert before[0]["cudnn"]
    for kind, said in (("auto", "attention: sdpa for all layers"), (BY_LAYER_TYPE, "attention: FlexAttention for")):
        cfg.model.attn_implementation = kind
        with caplog.at_level(logging.INFO, "joint_train"):
            pair = load_pair(cfg, None, "cpu")
        assert said in caplog.text
        assert pair.drafter.config.get_text_config()._attn_implementation == implementation(kind, "cpu")
    assert before == (flags(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("efficient", [True, False])
def test_a_step_has_every_allowed_kernel_but_cudnns(request, monkeypatch, efficient):
    """In the forward of base, towers and drafter, and where activation checkpointing repeats them in the backward."""
    found, attend = [], torch.nn.functional.scaled_dot_product_attention

    def noted(*args, **kwargs):
        found.append(flags())
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    base, drafter = build_pair("e2b")
    pair = Gemma4WithDrafter(
        base, drafter, drafter_num_steps=2, base_activation_checkpointing=True, drafter_activation_checkpointing=True
    ).train()
    ids = torch.randint(3, 240, (2, 12), generator=torch.Generator().manual_seed(0))
    request.addfinalizer(lambda: torch.backends.cuda.enable_mem_efficient_sdp(True))
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    before = flags()
    loss = pair(ids, labels=ids).loss
    forward = len(found)
    assert flags() == before
    loss.backward()
    assert flags() == before and before["cudnn"]
    assert (
        forward == len(base.model.language_model.layers) + 2 * len(drafter.model.layers) and len(found) == 2 * forward
    )
    assert all(kernels == {**before, "cudnn": False} for kernels in found)
