"""The joint forward against the published formula, against generation, and against the rules of visibility."""

import inspect

import pytest
import torch
from pairs import SHAPES, build_pair, make_pair
from transformers import Gemma4AssistantForCausalLM
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from joint_train import Gemma4JointOutput, Gemma4WithDrafter
from joint_train.pair.model import FIRST_TOKEN

LENGTH = 24


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 240, (batch, length), generator=torch.Generator().manual_seed(seed))


def causal_masks(config, length: int) -> dict[str, torch.Tensor]:
    """Row t sees j <= t; on sliding layers t - j < sliding_window. Boolean ``[1, 1, S, S]``."""
    t, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    full = j <= t
    return {
        "full_attention": full[None, None],
        "sliding_attention": (full & (t - j < config.sliding_window))[None, None],
    }


def dense(drafter):
    """The drafter scoring the whole vocabulary, as training does."""
    drafter.config.use_ordered_embeddings = False
    return drafter


def published_recipe(base, drafter, input_ids, num_steps):
    """NeMo AutoModel's joint forward, written out, with the causal masks that it lacks."""
    masks = causal_masks(drafter.config.get_text_config(), input_ids.shape[1])
    drafter.create_attention_masks = lambda *args: masks
    out = base(input_ids=input_ids, output_hidden_states=True, return_shared_kv_states=True)
    position_ids = torch.arange(input_ids.shape[1])[None]
    state, drafter_logits = out.hidden_states[-1], []
    for k in range(num_steps):
        shifted = torch.cat([input_ids[:, k:], torch.zeros_like(input_ids[:, :k])], dim=1)
        x = torch.cat([base.get_input_embeddings()(shifted), state], dim=-1)
        drafted = drafter(inputs_embeds=x, position_ids=position_ids, shared_kv_states=out.shared_kv_states)
        drafter_logits.append(drafted.logits)
        state = drafted.last_hidden_state
    del drafter.create_attention_masks
    return out.logits, drafter_logits


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_token_logits_equal_the_published_formula(shape, num_steps):
    base, drafter = build_pair(shape)
    ids = tokens()
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=num_steps, pairing="same_token")
    with torch.no_grad():
        out = model(input_ids=ids)
        logits, drafter_logits = published_recipe(base, dense(drafter), ids, num_steps)
    assert isinstance(out, Gemma4JointOutput) and len(out.drafter_logits) == num_steps
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-5)
    for k in range(num_steps):
        # The last k rows read past the end: they are never targets.
        ours, theirs = out.drafter_logits[k][:, : LENGTH - k], drafter_logits[k][:, : LENGTH - k]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def moved(before: Gemma4JointOutput, after: Gemma4JointOutput, first: int, pairing: str) -> list[int]:
    """Rows whose logits differ although no token that they may know of changed: those from ``first`` on did."""
    rows = []
    for k, (a, b) in enumerate(
        [(before.logits, after.logits), *zip(before.drafter_logits, after.drafter_logits, strict=True)]
    ):
        # Round k's row t reads, besides what comes up to t, the one token at t + FIRST_TOKEN + k.
        reach = 0 if k == 0 else FIRST_TOKEN[pairing] + k - 1
        end = max(0, first - reach)
        # Experts multiply the tokens routed to them together, which rounds differently with other company.
        differs = (a[:, :end] - b[:, :end]).abs().amax(dim=(0, 2)) > 1e-4
        rows += differs.nonzero().flatten().tolist()
    return rows


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("pairing", FIRST_TOKEN)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_logit_depends_on_a_later_token(shape, pairing, padding):
    base, drafter = build_pair(shape)
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=3, pairing=pairing)
    ids, mask = tokens(), torch.ones(2, LENGTH, dtype=torch.long)
    if padding == "left":
        mask[0, :5] = 0
    elif padding == "right":
        mask[0, -5:] = 0
    inputs = {} if padding == "none" else {"attention_mask": mask}
    with torch.no_grad():
        before = model(input_ids=ids, **inputs)
        for first in (LENGTH - 1, 15, 9):
            changed = ids.clone()
            changed[:, first:] = (changed[:, first:] + 7) % 240
            after = model(input_ids=changed, **inputs)
            assert moved(before, after, first, pairing) == []
            assert not torch.equal(before.drafter_logits[0], after.drafter_logits[0])


@pytest.mark.parametrize("shape", ["e2b", "31b"])
def test_the_unmodified_forward_of_transformers_fails_the_visibility_test(shape):
    base, drafter = build_pair(shape)

    def unmodified(ids):
        out = base(input_ids=ids, output_hidden_states=True, return_shared_kv_states=True)
        x = torch.cat([base.get_input_embeddings()(ids), out.hidden_states[-1]], dim=-1)
        drafted = dense(drafter)(
            inputs_embeds=x, position_ids=torch.arange(LENGTH)[None], shared_kv_states=out.shared_kv_states
        )
        return Gemma4JointOutput(logits=out.logits, drafter_logits=[drafted.logits])

    ids = tokens()
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 7) % 240
    with torch.no_grad():
        assert moved(unmodified(ids), unmodified(changed), 12, "same_token") != []


def test_padding_is_never_seen():
    base, drafter = build_pair("e2b")
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=3)
    ids, mask = tokens(), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :5] = 0
    other = ids.clone()
    other[0, :5] = 77
    with torch.no_grad():
        a, b = model(input_ids=ids, attention_mask=mask), model(input_ids=other, attention_mask=mask)
    for x, y in zip([a.logits, *a.drafter_logits], [b.logits, *b.drafter_logits], strict=True):
        torch.testing.assert_close(x[:, 5:], y[:, 5:], rtol=0, atol=0)


@pytest.mark.parametrize("pairing", FIRST_TOKEN)
def test_packed_documents_equal_documents_of_their_own(pairing):
    base, drafter = build_pair("e2b")
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=3, pairing=pairing)
    a, b = tokens(1, 14, seed=1), tokens(1, 10, seed=2)
    packed = torch.cat([a, b], dim=1)
    documents = torch.tensor([[1] * 14 + [2] * 10])
    positions = torch.cat([torch.arange(14), torch.arange(10)])[None]
    with torch.no_grad():
        out = model(input_ids=packed, document_ids=documents, position_ids=positions)
        alone = [model(input_ids=x) for x in (a, b)]
    for k in range(3):
        reach = FIRST_TOKEN[pairing] + k
        for x, start in zip(alone, (0, 14), strict=True):
            n = x.logits.shape[1]
            torch.testing.assert_close(out.logits[:, start : start + n], x.logits, rtol=1e-4, atol=1e-4)
            ours = out.drafter_logits[k][:, start : start + n - reach]
            torch.testing.assert_close(ours, x.drafter_logits[k][:, : n - reach], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt_length", [6, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_equals_serving(shape, prompt_length):
    """K tokens drafted by transformers' generator at the end of a prompt, teacher-forced in the training forward."""
    num_steps = 4
    base, drafter = build_pair(shape)
    serving = dense(drafter)
    serving.generation_config.num_assistant_tokens = num_steps
    prompt = tokens(1, prompt_length)
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=num_steps, rope_position="next_token")
    window = drafter.config.get_text_config().sliding_window
    with torch.no_grad():
        out = base(input_ids=prompt, output_hidden_states=True, return_shared_kv_states=True)
        sampled = out.logits[:, -1:].argmax(-1)
        ids = torch.cat([prompt, sampled], dim=1)
        config = base.generation_config
        config.max_length = 100
        generator = SinglePositionMultiTokenCandidateGenerator(serving, base.get_input_embeddings(), config)
        # The generator's window holds one key more than the base's (distance <= window, where the base has <).
        drafter.config.get_text_config().sliding_window = window - 1
        drafted, served = generator.get_candidates(ids, {}, out, is_first_iteration=False, n_last_matches=0)
        drafter.config.get_text_config().sliding_window = window
        trained = model(input_ids=drafted).drafter_logits
    assert drafted.shape[1] == prompt_length + 1 + num_steps
    row = prompt_length - 1
    for k in range(num_steps):
        torch.testing.assert_close(trained[k][:, row], served[:, k], rtol=1e-4, atol=1e-5)


def test_rope_position_moves_the_drafter_only():
    base, drafter = build_pair("e2b")
    ids = tokens()
    with torch.no_grad():
        a = Gemma4WithDrafter(base, drafter, drafter_num_steps=2)(input_ids=ids)
        b = Gemma4WithDrafter(base, drafter, drafter_num_steps=2, rope_position="next_token")(input_ids=ids)
    assert torch.equal(a.logits, b.logits)
    assert not torch.allclose(a.drafter_logits[0], b.drafter_logits[0])


def store_layers(base):
    return [layer for layer in text_layers(base) if layer.self_attn.store_full_length_kv]


def text_layers(base):
    return getattr(base.model, "language_model", base.model).layers


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_drafters_loss_reaches_the_base_by_three_ways(shape, checkpointing):
    base, drafter = build_pair(shape)
    recompute = {f"{part}_activation_checkpointing": checkpointing for part in ("base", "drafter")}
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=3, **recompute).train()
    out = model(input_ids=tokens())
    sum(x.float().logsumexp(-1).mean() for x in out.drafter_logits).backward()
    for layer in store_layers(base):
        assert layer.self_attn.k_proj.weight.grad.abs().sum() > 0
        if layer.self_attn.v_proj is not None:
            assert layer.self_attn.v_proj.weight.grad.abs().sum() > 0
    assert base.get_input_embeddings().weight.grad.abs().sum() > 0
    assert text_layers(base)[-1].mlp.down_proj.weight.grad.abs().sum() > 0


def test_recomputed_rounds_drop_what_the_forward_dropped():
    base, drafter = build_pair("e2b")
    drafter.model.config.attention_dropout = 0.5
    for layer in drafter.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids, found = tokens(), []
    for recompute in (False, True):
        model = Gemma4WithDrafter(
            base, drafter, drafter_num_steps=3, drafter_activation_checkpointing=recompute, pairing="serving"
        ).train()
        model.zero_grad()
        torch.manual_seed(0)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({n: p.grad.clone() for n, p in drafter.named_parameters() if p.grad is not None})
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())
    torch.manual_seed(1)  # dropout is at work
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(not torch.equal(found[0][n], p.grad) for n, p in drafter.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("pairing", FIRST_TOKEN)
@pytest.mark.parametrize("prompt_rows", [False, True])
def test_no_loss_reads_a_token_in_a_hole_of_the_mask(pairing, prompt_rows):
    base, drafter = build_pair("e2b")
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=3, pairing=pairing)
    model.prompt_rows = prompt_rows
    ids, mask = tokens(), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 7:9] = 0
    mask[1, 12] = 0
    losses = []
    for seed in (1, 2):
        other = torch.randint(3, 240, ids.shape, generator=torch.Generator().manual_seed(seed))
        now = torch.where(mask == 1, ids, other)
        with torch.no_grad():
            out = model(input_ids=now, attention_mask=mask, labels=now)  # labels in the holes, too
        assert out.targets.valid.sum(0).tolist()[-1] > 0
        losses.append(out.loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


def test_a_frozen_base_gets_no_gradient():
    base, drafter = build_pair("e2b")
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=3, freeze_base_for_drafter=True).train()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    trained = [p for p in drafter.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_trained_parameter_gets_a_gradient(shape, num_steps):
    """Else it would get no optimizer state, and a resume couldn't find it."""
    base, drafter = build_pair(shape)
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=num_steps).train()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    towers = ("vision", "audio")
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert [n for n in missing if not any(t in n for t in towers)] == []
    assert drafter.post_projection.weight.requires_grad == (num_steps > 1)
    if drafter.masked_embedding is not None:
        assert drafter.masked_embedding.centroids.weight.requires_grad


def test_centroids_are_those_of_the_ordering_that_was_loaded_last(tmp_path):
    from joint_train.weights.loading import materialize

    folders = [make_pair(tmp_path / str(seed), seed=seed)[1] for seed in (0, 1)]
    model = Gemma4WithDrafter(*build_pair("e2b"), drafter_num_steps=2)
    for folder in folders:
        materialize(model.drafter, folder, "cpu")
        centroids, routing = model.centroids(), model.drafter.masked_embedding
        for centroid, members in enumerate(routing.token_ordering.view(routing.num_centroids, -1)):
            assert (centroids.token_centroid[members] == centroid).all()
        assert model.centroids().token_centroid is centroids.token_centroid


TIED = {
    "plain": {},
    "recomputed": dict(base_activation_checkpointing=True, drafter_activation_checkpointing=True),
    "logits in the loss": {},
    "two micro-batches": {},
    "after an error": {},
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_embedding_gets_the_gradients_of_an_embedding_and_a_head(case):
    """Against the same base with a head of its own, whose gradient and the embedding's autograd makes apart."""
    found = []
    for tied in (True, False):
        base, drafter = build_pair("multimodal")
        if not tied:
            base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
        model = Gemma4WithDrafter(base, drafter, drafter_num_steps=2, **TIED[case]).train()
        if case == "after an error":
            model(input_ids=tokens(), labels=tokens())  # its backward never comes
            with pytest.raises(ValueError, match="unpack"):
                model(input_ids=tokens(), labels=tokens(), position_ids=torch.zeros(1, 1, 1, 1))
            assert "forward" not in vars(base.get_input_embeddings())
        for seed in (0, 1) if case == "two micro-batches" else (0,):
            out = model(input_ids=tokens(seed=seed), labels=tokens(seed=seed), return_logits=case.startswith("logits"))
            loss = out.loss
            if case.startswith("logits"):
                loss = loss + out.logits.square().mean() + out.drafter_logits[1].square().mean()
            loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        if not tied:
            gradients["base.model.language_model.embed_tokens.weight"] += gradients.pop("base.lm_head.weight")
        found.append(gradients)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prompt_rows", [None, True])
def test_loss_is_the_weighted_sum_of_means_over_targets(prompt_rows):
    """Against the logits, with the published recipe's cross-entropy."""
    from joint_train.config import LossConfig

    base, drafter = build_pair("e2b")
    loss = LossConfig(drafter="ce", round_weights=[1.0, 0.5, 0.25], centroid_weight=0.0)
    model = Gemma4WithDrafter(
        base, drafter, drafter_num_steps=3, drafter_loss_weight=0.7, prompt_rows=prompt_rows, loss=loss
    )
    assert not drafter.masked_embedding.centroids.weight.requires_grad
    ids = tokens()
    labels = ids.clone()
    labels[:, :7] = -100
    first = 0 if prompt_rows else 6  # the last row of the prompt, where drafting starts
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels, return_logits=True)

    def mean_loss(logits, shift):
        logits, tokens = logits[:, first:-shift], labels[:, first + shift :]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    expected = mean_loss(out.logits, 1)
    for k, weight in enumerate([1.0, 0.5, 0.25]):
        expected = expected + 0.7 * weight * mean_loss(out.drafter_logits[k], 2 + k)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)


def test_logits_are_made_only_when_asked_for():
    base, drafter = build_pair("e2b")
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=2)
    ids = tokens()
    out = model(input_ids=ids, labels=ids)
    assert out.logits is None and out.drafter_logits == [] and out.loss is not None
    out = model(input_ids=ids)
    assert out.logits is not None and out.loss is None
    assert len(out.hidden_states) == 1
    out = model(input_ids=ids, output_hidden_states=True)
    assert len(out.hidden_states) == len(text_layers(base)) + 1


def test_share_embedding_copies_once_and_needs_equal_shapes():
    base, drafter = build_pair("31b")
    with pytest.raises(ValueError, match="tables of one shape"):
        Gemma4WithDrafter(base, drafter, share_embedding_with_base=True)


def test_refusals_name_the_argument():
    base, drafter = build_pair("e2b")
    for wrong, name in (
        ({"drafter_num_steps": 0}, "drafter_num_steps=0"),
        ({"pairing": "next"}, "pairing='next'"),
        ({"rope_position": "first"}, "rope_position='first'"),
    ):
        with pytest.raises(ValueError, match=name):
            Gemma4WithDrafter(base, drafter, **wrong)
    with pytest.raises(ValueError, match="input_ids"):
        Gemma4WithDrafter(base, drafter)(attention_mask=torch.ones(1, 4))


def test_serving_still_uses_the_drafters_own_forward():
    """The composite overrides nothing of the drafter: what is exported is transformers' own class."""
    base, drafter = build_pair("e2b")
    Gemma4WithDrafter(base, drafter)
    assert inspect.getmodule(type(drafter).forward) is inspect.getmodule(Gemma4AssistantForCausalLM)


def test_each_model_attends_within_its_own_window():
    base, drafter = build_pair("e2b")
    model, windows = Gemma4WithDrafter(base, drafter, drafter_num_steps=2), {"base": 8, "drafter": 3}
    drafter.config.get_text_config().sliding_window = windows["drafter"]
    seen = {"base": set(), "drafter": set()}

    def note(part, kind):
        def hook(module, args, kwargs):
            mask, t = kwargs["attention_mask"], torch.arange(LENGTH)
            distance = t[:, None] - t[None, :]
            rule = (distance >= 0) & (distance < windows[part]) if kind == "sliding_attention" else distance >= 0
            seen[part].add((kind, mask is None and kind == "full_attention" or torch.equal(mask[0, 0], rule)))

        return hook

    for part, text in (("base", base.model.language_model), ("drafter", drafter.model)):
        for layer, kind in zip(text.layers, text.config.layer_types, strict=True):
            layer.register_forward_pre_hook(note(part, kind), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=tokens())
    assert seen == {part: {("sliding_attention", True), ("full_attention", True)} for part in windows}
