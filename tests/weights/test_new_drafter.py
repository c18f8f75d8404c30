"""A drafter for a base that none was released for: its sizes, its first weights, and that it runs and trains."""

import json

import numpy as np
import pytest
import torch
from pairs import SHAPES, make_pair
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma4AssistantForCausalLM

from joint_train import drafter as command
from joint_train.errors import ConfigError
from joint_train.weights.composite import Gemma4WithDrafter
from joint_train.weights.folders import read_config, read_configs
from joint_train.weights.new_drafter import assign, balanced_clusters, drafter_config, new_drafter
from joint_train.weights.released import CONFIGS, released_config

BASES = [name for name in CONFIGS if not name.endswith("-assistant")]


@pytest.mark.parametrize("name", BASES)
def test_the_sizes_derived_from_a_released_base_are_its_released_drafters(name):
    made, released = (
        drafter_config(released_config(name), ordered=name.endswith(("E2B-it", "E4B-it"))),
        released_config(f"{name}-assistant"),
    )
    absent = {None, 0}  # two ways to say that there are no per-layer embeddings
    for one, other in ((made, released), (made.get_text_config(), released.get_text_config())):
        left, right = one.to_dict(), other.to_dict()
        left.pop("text_config", None), right.pop("text_config", None)
        assert {k for k in left if left[k] != right.get(k) and not {left[k], right.get(k)} <= absent} == set()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_drafter_for_every_shape_runs_and_gets_gradients(shape, tmp_path):
    base, _ = make_pair(tmp_path, shape)
    assert command.main(["new", str(base), str(tmp_path / "new"), "--hidden-size", "32"]) == 0
    read_configs(base, tmp_path / "new")
    model = Gemma4WithDrafter.from_pretrained(
        base, tmp_path / "new", drafter_num_steps=2, freeze_base_for_drafter=True, torch_dtype=torch.bfloat16
    ).float()
    ids = torch.randint(3, 200, (2, 9))
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.drafter.named_parameters() if p.requires_grad}
    assert torch.isfinite(out.loss) and all(g is not None and g.isfinite().all() for g in gradients.values())


def test_a_base_of_other_layers_and_widths(tmp_path):
    pruned = dict(num_hidden_layers=3, layer_types=["sliding_attention", "sliding_attention", "full_attention"])
    base, _ = make_pair(tmp_path, "31b", hidden_size=48, **pruned)
    config = drafter_config(read_config(base))
    assert config.backbone_hidden_size == 48 and config.get_text_config().hidden_size == 24
    config = drafter_config(read_config(base), layers=["full_attention"], num_attention_heads=2)
    assert config.get_text_config().layer_types == ["full_attention"]


def test_like_another_drafter(tmp_path):
    base, drafter = make_pair(tmp_path, "e2b")
    like = read_config(drafter)
    made = drafter_config(read_config(base), like)
    assert made.use_ordered_embeddings and (made.num_centroids, made.centroid_intermediate_top_k) == (16, 4)
    for name in ("hidden_size", "intermediate_size", "layer_types", "num_attention_heads"):
        assert getattr(made.get_text_config(), name) == getattr(like.get_text_config(), name)


def test_the_head_is_the_bases_embedding_along_its_principal_directions(tmp_path):
    """Against numpy's singular value decomposition of the embedding."""
    base, _ = make_pair(tmp_path, "31b")
    config = read_config(base)
    made = new_drafter(config, base, drafter_config(config, hidden_size=16))
    table = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight.detach().float().numpy()
    left, sizes, _ = np.linalg.svd(table.astype(np.float64), full_matrices=False)
    expected = left[:, :16] * sizes[:16]
    expected *= (len(table) / np.square(expected).sum()) ** 0.5
    head = made.lm_head.weight.detach().numpy()
    np.testing.assert_allclose(np.abs(head), np.abs(expected), rtol=1e-3, atol=1e-4)  # a direction's sign is free
    assert np.square(head).sum(1).mean() == pytest.approx(1)


def test_queries_begin_as_those_that_the_bases_keys_were_made_for(tmp_path):
    base, _ = make_pair(tmp_path, "e2b")
    config = read_config(base)
    made = new_drafter(config, base, drafter_config(config, hidden_size=32))
    layers = AutoModelForCausalLM.from_pretrained(base).model.language_model.layers
    stores = {"sliding_attention": 2, "full_attention": 1}  # of five layers the last two share what these computed
    for layer, kind in zip(made.model.layers, made.config.get_text_config().layer_types, strict=True):
        torch.testing.assert_close(layer.self_attn.q_norm.weight, layers[stores[kind]].self_attn.q_norm.weight.float())


def test_clusters_are_of_one_size_and_no_token_would_rather_swap():
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(96, 5, generator=generator), dim=-1)
    centres = torch.nn.functional.normalize(torch.randn(8, 5, generator=generator), dim=-1)
    cluster = assign(directions, centres)
    assert torch.bincount(cluster).tolist() == [12] * 8
    likeness = directions @ centres.T
    for token in range(96):
        for centre in range(8):
            if likeness[token, centre] > likeness[token, cluster[token]]:  # it prefers this centre, which is full
                assert (likeness[cluster == centre, centre] > likeness[token, centre]).all()


def test_ordered_embeddings_are_a_permutation_with_the_clusters_means(tmp_path):
    base, _ = make_pair(tmp_path, "e2b")
    options = ["--hidden-size", "32", "--ordered", "--centroids", "16", "--top-k", "4"]
    assert command.main(["new", str(base), str(tmp_path / "new"), *options]) == 0
    made = Gemma4AssistantForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    ordering, head = made.masked_embedding.token_ordering, made.lm_head.weight
    assert sorted(ordering.tolist()) == list(range(256))
    means = head[ordering].view(16, 16, 32).mean(1)
    torch.testing.assert_close(made.masked_embedding.centroids.weight, means, atol=2e-3, rtol=2e-2)  # bfloat16
    ordering, means = balanced_clusters(head.detach(), 16)
    within = torch.cosine_similarity(head[ordering], means.repeat_interleave(16, 0), dim=-1).mean()
    by_chance = head.view(16, 16, 32).mean(1).repeat_interleave(16, 0)
    assert within > torch.cosine_similarity(head, by_chance, dim=-1).mean() + 0.1


def test_what_cant_work_is_refused_by_name(tmp_path, capsys):
    base, drafter = make_pair(tmp_path, "31b")
    config = read_config(base)
    with pytest.raises(ConfigError, match="Give a multiple"):
        drafter_config(config, num_attention_heads=3)
    with pytest.raises(ConfigError, match="divisor"):
        drafter_config(config, ordered=True, num_centroids=7)
    sliding_only = read_config(make_pair(tmp_path / "e2b", "e2b")[0])
    sliding_only.get_text_config().num_kv_shared_layers = 4
    with pytest.raises(ConfigError, match="the base computes them for sliding_attention"):
        drafter_config(sliding_only, layers=["full_attention"])
    for arguments, reason in (
        ([str(drafter), str(tmp_path / "x")], "is a drafter"),
        ([str(base), str(tmp_path / "x"), "--like", str(base)], "is a base"),
        ([str(base), str(drafter)], "exists: name a new folder"),
        ([str(tmp_path / "nothing"), str(tmp_path / "x")], "there is no folder"),
    ):
        assert command.main(["new", *arguments]) == 2 and reason in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))


def test_transformers_generates_with_a_new_drafter(starter_dir, tmp_path, capsys):
    assert command.main(["new", str(starter_dir / "base"), str(tmp_path / "new")]) == 0
    assert "freeze.base=true" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(starter_dir / "base", dtype=torch.float32)
    made = Gemma4AssistantForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(tmp_path / "new")("What is it?", return_tensors="pt")
    plain = base.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(base.generate(**prompt, max_new_tokens=8, do_sample=False, assistant_model=made), plain)
    assert json.loads((tmp_path / "new/generation_config.json").read_text())["num_assistant_tokens"] == 4
