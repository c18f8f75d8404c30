"""Many PEFT adapters on one frozen base: each token under its own is what each merged base would make of it."""

from types import SimpleNamespace

import pytest
import torch
from adapters import make_adapter
from configs import compose
from pairs import make_pair
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from joint_train.config.values import adapter_index, parse_served
from joint_train.distributed.mesh import data_rank, init_mesh
from joint_train.errors import ConfigError, WeightsError
from joint_train.evaluate import accepted_length
from joint_train.evaluate.prompts import Prompt
from joint_train.pair.targets import joint_targets
from joint_train.weights.composite import load_pair
from joint_train.weights.settle import with_adapter

K, S = 2, 24
SHAPES = ["e2b", "26b_a4b"]


def sources(*adapters):
    return [{"path": f"{i}.jsonl", "name": f"s{i}", "adapter": adapter} for i, adapter in enumerate(adapters)]


def config(folders, **settings):
    pair = {"model.base": str(folders[0]), "model.drafter": str(folders[1]), "drafter.num_steps": K}
    pair |= {"freeze.base": True, "precision.compute": "float32"}
    return with_adapter(compose(pair | {key.replace("__", "."): value for key, value in settings.items()}))


def served(folders, adapters, **settings):
    paths = [str(path) for path in adapters]
    return config(folders, model__adapters=paths, data__train=sources(*paths), **settings)


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    """Rows of two documents each."""
    ids = torch.randint(3, 240, (rows, S), generator=torch.Generator().manual_seed(1))
    documents = torch.arange(S).expand(rows, S).ge(S // 2).long() + 1
    positions = torch.arange(S).expand(rows, S) % (S // 2)
    return {"input_ids": ids, "labels": ids.clone(), "document_ids": documents, "position_ids": positions}


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def step(model, rows: dict, counts: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """This rank's share of the loss, and the drafter's whole gradients, of a step of ``counts`` targets."""
    model.zero_grad()
    labels, documents = rows["labels"], rows["document_ids"]
    inputs = {name: x for name, x in rows.items() if name != "labels"}
    targets = joint_targets(labels, documents, K, model.pairing, model.prompt_rows)
    loss = model(**inputs, targets=targets, weights=model.loss_weights(counts)).loss
    loss.backward()
    grads = {name: full(p.grad) for name, p in model.drafter.named_parameters() if p.grad is not None}
    assert all(p.grad is None for p in model.base.parameters())
    return loss.item(), grads


def counts_of(rows: dict) -> torch.Tensor:
    return joint_targets(rows["labels"], rows["document_ids"], K, "serving", None).counts


def assert_same(found, expected) -> None:
    (loss, grads), (expected_loss, expected_grads) = found, expected
    assert abs(loss - expected_loss) <= 1e-5 * abs(expected_loss)
    assert grads.keys() == expected_grads.keys() and len(grads) > 10
    for name, grad in grads.items():
        error = (grad - expected_grads[name]).norm() / expected_grads[name].norm()
        assert error <= 1e-5, (name, error)


def added(*parts):
    return sum(loss for loss, _ in parts), {n: sum(grads[n] for _, grads in parts) for n in parts[0][1]}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """A pair, and two adapters with other ranks, layers and scales."""
    root = tmp_path_factory.mktemp("served")
    folders = make_pair(root / ("experts" if "a4b" in request.param else "dense"), request.param)
    one = make_adapter(folders[0], root / "one")
    other = make_adapter(
        folders[0], root / "other", seed=1, r=3, target_modules=["q_proj", "down_proj"], use_rslora=True,
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 5}, alpha_pattern={"down_proj": 7},
    )  # fmt: skip
    return folders, one, other


def test_each_document_is_under_its_own_adapter(pair):
    """Whole batches of one adapter, none, and rows that mix them: as the merged bases, whose gradients add up."""
    folders, one, other = pair

    def load(cfg):
        # A merged weight is rounded to float32. That they compute the same shows without further rounding; the experts
        # of 26B-A4B have no other dtype, and that pair is less sensitive.
        return load_pair(cfg, None, "cpu").to(torch.float32 if "experts" in folders[0].parts[-2] else torch.float64)

    paths = {-1: None, 0: str(one), 1: str(other)}
    merged = {number: load(config(folders, model__adapter=path)) for number, path in paths.items()}
    model, rows = load(served(folders, [one, other])), batch()
    counts = counts_of(rows)
    expected = {number: step(reference, rows, counts) for number, reference in merged.items()}
    assert len({round(loss, 4) for loss, _ in expected.values()}) == 3
    for number, whole in expected.items():
        assert_same(step(model, rows | {"adapter_ids": torch.full((4, S), number)}, counts), whole)
    assert_same(step(model, rows, counts), expected[-1])
    alone = load(served(folders, [one]))
    assert_same(step(alone, rows | {"adapter_ids": torch.zeros(4, S, dtype=torch.long)}, counts), expected[0])

    # Of each document only one, under the adapter that it has.
    of_documents = torch.tensor([[0, 1], [1, 1], [-1, 0], [1, -1]])
    ids = of_documents.repeat_interleave(S // 2, dim=1)
    parts = []
    for number, reference in merged.items():
        own = rows | {"labels": rows["labels"].masked_fill(ids != number, -100)}
        parts.append(step(reference, own, counts))
    assert_same(step(model, rows | {"adapter_ids": ids}, counts), added(*parts))


def test_generation_has_each_prompt_under_its_adapter(pair):
    folders, one, other = pair
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    texts = [[3, 4, 5], [9, 8, 7, 6], [20, 30]]
    model = load_pair(served(folders, [one, other]), None, "cpu")
    prompts = [Prompt(ids, "", "", name) for ids, name in zip(texts, ("one", "other", None), strict=True)]
    found = accepted_length(model.base, model.drafter, tokenizer, prompts, K, 12, adapters=model.adapters)
    for number, path in enumerate([one, other, None]):
        alone = load_pair(config(folders, model__adapter=path and str(path)), None, "cpu")
        of = [Prompt(texts[number], "", "")]
        expected = accepted_length(alone.base, alone.drafter, tokenizer, of, K, 12)
        assert found["examples"][number]["text"] == expected["examples"][0]["text"]
        if path is not None:
            assert found["by_adapter"][path.name] == expected["tokens_per_forward"]
    assert len({tuple(e["text"].split()[:6]) for e in found["examples"]}) == 3 and len(found["by_adapter"]) == 2


def sharded_step(rank: int, cfg, ids, names):
    mesh = init_mesh(cfg.parallel)
    model = load_pair(cfg, mesh, "cpu").train()
    index, size = data_rank(mesh)
    rows = batch() | {"adapter_ids": ids}
    loss, grads = step(model, {name: x.chunk(size)[index] for name, x in rows.items()}, counts_of(batch()))
    return loss, grads, model.base.state_dict().keys() == names


def test_sharded_is_as_one_process(pair):
    """Each rank has documents of other adapters; the base has no tensors but its own."""
    folders, one, other = pair
    cfg = served(folders, [one, other])
    ids = torch.tensor([[0, 1], [0, 0], [-1, 1], [1, 1]]).repeat_interleave(S // 2, dim=1)
    whole = load_pair(cfg, None, "cpu")
    expected = step(whole, batch() | {"adapter_ids": ids}, counts_of(batch()))
    plain = load_pair(config(folders), None, "cpu").base.state_dict()
    found = run_ranks(sharded_step, 2, cfg, ids, set(plain))
    assert all(names for *_, names in found)
    assert_same((sum(loss for loss, *_ in found), found[0][1]), expected)


REFUSED = [
    ({"model.adapter": "c"}, "set one of them"),
    ({"lora.r": 4, "freeze.base": False}, "lora.r=4 trains new adapters .* set lora.r=0"),
    ({"freeze.base": False}, "set freeze.base=true"),
    ({"parallel.compile": True}, "set parallel.compile=false"),
    ({"data.train": sources("a")}, "no source of data.train names b"),
    ({"data.train": sources("a", "b", "c")}, r"data.train\[2\].adapter: 'c' is not one of model.adapters .a, b."),
    ({"data.val": sources("d")}, r"data.val\[0\].adapter: 'd' is not one of"),
    ({"model.adapters": []}, r"data.train\[0\].adapter: 'a' is not one of model.adapters .empty."),
    ({"model.adapters": ["x/a", "y/a"]}, "two adapters have the name 'a'"),
    (
        {"model.adapters": [{"path": "a", "scale": 2}, "b"]},
        "a: there is no key scale; known are path, weight, revision, name",
    ),
]


@pytest.mark.parametrize("settings, said", REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_work_is_refused(settings, said):
    fine = {"freeze.base": True, "model.adapters": ["a", "b"], "data.train": sources("a", "b", None)}
    compose(fine)
    with pytest.raises(ConfigError, match=said):
        compose(fine | settings)


def test_adapters_have_names():
    specs = parse_served(["/data/math", {"path": "/other/math", "name": "more", "weight": 0.5}])
    assert [spec.name for spec in specs] == ["math", "more"] and specs[1].weight == 0.5
    found = [adapter_index(specs, named) for named in ("math", "more", "/other/math", "/data/math", None)]
    assert found == [0, 1, 1, 0, -1]


def test_what_no_document_can_have_of_its_own_is_refused(tmp_path):
    folders = make_pair(tmp_path / "pair", "multimodal")
    text = {"target_modules": r".*language_model.*q_proj"}
    tower = make_adapter(folders[0], tmp_path / "tower", target_modules=r".*embedding_projection")
    with pytest.raises(WeightsError, match="model.adapters: .*embedding_projection.* model.adapter, which merges"):
        load_pair(served(folders, [tower]), None, "cpu")
    whole = make_adapter(folders[0], tmp_path / "whole", modules_to_save=["lm_head"], **text)
    found = load_file(whole / "adapter_model.safetensors")
    kept = {key: x for key, x in found.items() if "lora_" in key}
    norm = "base_model.model.model.language_model.norm.weight"
    save_file(kept | {norm: torch.ones(64)}, whole / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match="model.adapters: .* holds a whole .*norm.weight"):
        load_pair(served(folders, [whole]), None, "cpu")
    # The base is the one that they name, and sources have their names.
    fine = make_adapter(folders[0], tmp_path / "fine", **text)
    cfg = served(("", folders[1]), [fine])
    assert cfg.model.base == str(folders[0]) and [s.adapter for s in cfg.data.train] == ["fine"]
    assert len(load_pair(cfg, None, "cpu").adapters.layers) == 5
