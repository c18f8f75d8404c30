"""``model.resize_vocabulary``: base and drafter grow together, as transformers grows one model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapters import load_base
from configs import compose
from pairs import make_pair
from ranks import run_ranks
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Gemma4AssistantForCausalLM

from joint_train.checkpoint import Checkpointer
from joint_train.config import to_yaml
from joint_train.distributed.lora import folder_tensors
from joint_train.distributed.mesh import init_mesh
from joint_train.errors import ConfigError
from joint_train.pair.centroids import token_centroids
from joint_train.plan.planner import read as planned
from joint_train.run_export import export_run
from joint_train.train.optim import build_optimizer
from joint_train.weights.composite import load_pair
from joint_train.weights.settle import with_vocabulary
from joint_train.weights.vocabulary import grown_ordering

OLD = 256
CENTROIDS = 16


def tokenizer(size: int):
    vocabulary = {f"token{number}": number for number in range(size)}
    return SimpleNamespace(get_vocab=lambda: vocabulary, name_or_path="tuned")


def settled(folders, size: int, **settings):
    pair = {"model.base": str(folders[0]), "model.drafter": str(folders[1]), "model.resize_vocabulary": True}
    return with_vocabulary(compose(pair | {k.replace("__", "."): v for k, v in settings.items()}), tokenizer(size))


def trained(rank: int, folders, out, size: int):
    """A sharded pair that has grown, whole; its checkpoint and its export are in `out`."""
    cfg = settled(folders, size)
    model = load_pair(cfg, init_mesh(cfg.parallel), "cpu").train()
    checkpointer = Checkpointer(out, cfg.checkpoint, timeout_seconds=60)
    checkpointer.save(1, model, build_optimizer(model, cfg.optim), {"step": 1}, config=cfg)
    checkpointer.close()
    if rank == 0:
        (Path(out) / "config.yaml").write_text(to_yaml(cfg))
    model.save_pretrained(Path(out) / "export")
    return [
        {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in folder_tensors(half).items()}
        for half in (model.base, model.drafter)
    ]


@pytest.fixture(scope="module", params=["e2b", "31b"])
def grown(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    folders = make_pair(root / "pair", request.param)
    return request.param, folders, root, run_ranks(trained, 2, folders, root / "run", OLD + 3)[0]


def test_tables_grow_as_transformers_grows_them(grown):
    """Three new tokens: the tables end at a multiple of 64, or with ordered embeddings of the centroids."""
    shape, folders, _, (base, drafter) = grown
    rows = OLD + (CENTROIDS if shape == "e2b" else 64)
    references = load_base(folders[0]), Gemma4AssistantForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    for tensors, reference in zip((base, drafter), references, strict=True):
        reference.resize_token_embeddings(rows)
        expected = reference.state_dict()
        assert tensors.keys() == expected.keys()
        tables = [name for name in expected if "embed_tokens" in name or "lm_head" in name]
        assert len(tables) == 2 + (shape == "e2b" and tensors is base)
        for name in tensors.keys() - {"masked_embedding.token_ordering"}:
            if name in tables:  # transformers draws new rows with a billionth of the covariance around their mean
                assert torch.equal(tensors[name][:OLD], expected[name][:OLD]), name
                assert torch.allclose(tensors[name], expected[name], atol=1e-3, rtol=0), name
                mean = expected[name][:OLD].double().mean(0).float()
                assert torch.equal(tensors[name][OLD:], mean.expand(rows - OLD, -1)), name
            else:
                assert torch.equal(tensors[name], expected[name]), name


def test_a_grown_pair_drafts_as_before_and_exports_what_it_is(grown):
    """The exports of run and checkpoint are the same, and transformers generates with them what it did before."""
    shape, folders, root, _ = grown
    assert export_run(root / "run/checkpoints/step_00000001", root / "out", check=True) == 0
    for part in ("base", "drafter"):
        one, other = (load_file(root / path / part / "model.safetensors") for path in ("run/export", "out"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        text = json.loads((root / "out" / part / "config.json").read_text())["text_config"]
        assert text["vocab_size"] == OLD + (CENTROIDS if shape == "e2b" else 64)
    texts = []
    for base, drafter in (folders, (root / "out/base", root / "out/drafter")):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        assistant = Gemma4AssistantForCausalLM.from_pretrained(drafter, dtype=torch.float32)
        assistant.generation_config.num_assistant_tokens = 4
        ids = torch.arange(3, 12)[None]
        texts.append(model.generate(ids, assistant_model=assistant, max_new_tokens=12, do_sample=False, pad_token_id=0))
        assert model(ids).logits.shape[-1] == len(model.lm_head.weight)
    assert texts[0].shape[1] > 12 and torch.equal(texts[0], texts[1])


def test_each_new_token_joins_the_nearest_centroid_with_room():
    generator = torch.Generator().manual_seed(0)
    ordering = torch.randperm(12, generator=generator)
    centroids, new = torch.randn(4, 6, generator=generator), torch.randn(8, 6, generator=generator)
    found = grown_ordering(ordering, centroids, new)
    before, after = token_centroids(ordering, 4), token_centroids(found, 4)
    assert torch.equal(before, after[:12])
    room = dict.fromkeys(range(4), 2)
    for token, row in enumerate(new, 12):
        free = [c for c in range(4) if room[c]]
        nearest = max(free, key=lambda c: torch.cosine_similarity(row, centroids[c], dim=0).item())
        assert after[token] == nearest
        room[nearest] -= 1


def test_the_first_new_tokens_have_the_nearest_centroids_to_the_mean(grown):
    shape, folders, _, (_, drafter) = grown
    if shape != "e2b":
        pytest.skip("no ordered embeddings")
    centroid = token_centroids(drafter["masked_embedding.token_ordering"], CENTROIDS)
    source = load_file(folders[1] / "model.safetensors")
    assert torch.equal(token_centroids(source["masked_embedding.token_ordering"], CENTROIDS), centroid[:OLD])
    mean = source["model.embed_tokens.weight"].double().mean(0)
    near = torch.cosine_similarity(source["masked_embedding.centroids.weight"].double(), mean, dim=-1)
    assert centroid[OLD:].tolist() == near.argsort(descending=True).tolist()


@pytest.mark.parametrize("shape, rows", [("e2b", 272), ("31b", 261)])
def test_a_base_that_was_grown_before_gets_its_drafter_grown(tmp_path, shape, rows):
    """With ordered embeddings both go on to a multiple of the centroids; a dense drafter takes the base's size."""
    folders = make_pair(tmp_path, shape)
    base = AutoModelForCausalLM.from_pretrained(folders[0])
    base.resize_token_embeddings(261)
    base.save_pretrained(tmp_path / "grown")
    grown = tmp_path / "grown", folders[1]
    with pytest.raises(ConfigError, match=r"vocab_size is 256 in the drafter and 261.*\n?.*resize_vocabulary=true"):
        load_pair(compose({"model.base": str(grown[0]), "model.drafter": str(grown[1])}), None, "cpu")
    cfg = settled(grown, 261)
    assert cfg.model.resize_vocabulary == rows and planned(cfg)[0].get_text_config().vocab_size == rows
    pair = load_pair(cfg, None, "cpu")
    assert len(pair.drafter.get_input_embeddings().weight) == len(pair.base.lm_head.weight) == rows
    assert torch.equal(pair.base.lm_head.weight[:261].detach(), base.lm_head.weight.float().detach())


def test_numbers_of_rows(tmp_path, caplog):
    folders = make_pair(tmp_path, "e2b")
    assert settled(folders, 258, model__resize_vocabulary=288).model.resize_vocabulary == 288
    with pytest.raises(ConfigError, match="resize_vocabulary=260: .* need 272 rows"):
        settled(folders, 258, model__resize_vocabulary=260)
    with pytest.raises(ConfigError, match="must be true, false or a number of rows"):
        settled(folders, 258, model__resize_vocabulary="yes")
    assert settled(folders, 250).model.resize_vocabulary is False  # it has room
    assert settled(folders, 258, freeze__base=True).model.resize_vocabulary == 272
    assert "2 new tokens have rows in the base that aren't trained" in caplog.text
