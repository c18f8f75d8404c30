"""What a LoRA run leaves on disk: checkpoints of the adapters alone, a merged base, and a folder for peft."""

import json
import os
import re
from pathlib import Path

import peft
import pytest
import torch
from pairs import make_pair
from ranks import run_ranks
from safetensors.torch import load_file
from test_lora import ALPHA, R, lora_config
from test_parallel import all_counts, batch, full, step
from torch import Tensor
from transformers import AutoModelForCausalLM

from joint_train import Gemma4WithDrafter
from joint_train.checkpoint import Checkpointer
from joint_train.checkpoint.reader import stored_tensors
from joint_train.checkpoint.state import optimizer_tensors, pair_tensors
from joint_train.config import to_yaml
from joint_train.distributed.lora import adapter_parameters
from joint_train.distributed.mesh import data_rank, init_mesh
from joint_train.errors import CheckpointError, WeightsError
from joint_train.model_card import model_cards
from joint_train.run_export import export_run
from joint_train.train.optim import build_optimizer, update
from joint_train.weights.composite import load_pair
from joint_train.weights.export import export_model

SHAPE = "multimodal"  # whose towers have layers of the same names


def everything(model, optimizer) -> dict[str, Tensor]:
    parts = {**pair_tensors(model), "optimizer": optimizer_tensors(model, optimizer)}
    return {f"{part}/{n}": full(t.detach()).clone() for part, tensors in parts.items() for n, t in tensors.items()}


def started(folders, out, options: dict):
    cfg = lora_config(folders, **options)
    model = load_pair(cfg, init_mesh(cfg.parallel), "cpu").train()
    return cfg, model, build_optimizer(model, cfg.optim), Checkpointer(out, cfg.checkpoint, timeout_seconds=60)


def trained(rank: int, folders, out):
    """Two steps, saved and exported; the pair's state and its logits."""
    cfg, model, optimizer, checkpointer = started(folders, out, {})
    index, size = data_rank(init_mesh(cfg.parallel))
    rows = {name: x.chunk(size)[index] for name, x in batch().items()}
    for _ in range(2):
        model.zero_grad()
        step(model, rows, all_counts(batch()))
        update(optimizer, model, 1.0, 1.0)
    checkpointer.save(2, model, optimizer, {"step": 2}, config=cfg)
    checkpointer.close()
    if rank == 0:
        (Path(out) / "config.yaml").write_text(to_yaml(cfg))
    model.save_pretrained(Path(out) / "export", cards=model_cards(cfg, model.sources, 2, {}, {}))
    export_model(model.base, folders[0], Path(out) / "float32", dtype=torch.float32)
    model.load_pretrained(Path(out) / "export")  # the adapters, exactly, beside the same frozen weights
    with torch.no_grad():
        logits = model.eval()(batch()["input_ids"]).logits
    return everything(model, optimizer), logits


def resumed(rank: int, folders, out, options: dict):
    _, model, optimizer, checkpointer = started(folders, out, options | {"seed": 9})
    try:
        found = checkpointer.resume("auto", model, optimizer, config=lora_config(folders, **options))
        return found[1], everything(model, optimizer)
    except CheckpointError as error:
        return str(error)
    finally:
        checkpointer.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folders of a pair and of its run, the run's last state, and its logits."""
    root = tmp_path_factory.mktemp("lora")
    folders, out = make_pair(root / "pair", SHAPE), root / "run"
    state, logits = run_ranks(trained, 2, folders, out)[0]
    return folders, out, state, logits


@pytest.mark.parametrize("ranks, options", [(1, {}), (4, {"parallel__dp_replicate": 2})])
def test_a_resume_on_other_ranks_is_exact(run, ranks, options):
    folders, out, state, _ = run
    saved, found = run_ranks(resumed, ranks, folders, out, options)[0]
    assert saved == {"step": 2} and found.keys() == state.keys()
    of_drafter = [name for name in state if name.startswith("drafter/")]
    for name in state.keys() - set(of_drafter):
        assert torch.equal(found[name], state[name]), name
    for name in of_drafter:  # load_pretrained has read the rounded export since
        assert torch.equal(found[name].bfloat16(), state[name].bfloat16()), name
    moved = [n for n in state if n.startswith("base/") and ".lora_B." in n]
    assert all(state[name].any() for name in moved) and f"optimizer/{moved[0].replace('/model/', '.')}" in {
        name.rpartition("/")[0] for name in state if name.startswith("optimizer/")
    }


def test_a_checkpoint_holds_the_adapters_alone_and_names_their_base(run):
    folders, out, *_ = run
    checkpoint = out / "checkpoints/step_00000002"
    names = stored_tensors(checkpoint / "base/model")
    assert names.keys() == adapter_parameters(load_pair(lora_config(folders), None, "cpu").base).keys()
    assert "pre_projection.weight" in stored_tensors(checkpoint / "drafter/model")
    frozen = json.loads((checkpoint / "base/frozen.json").read_text())
    assert frozen["folder"] == str(folders[0]) and re.fullmatch("[0-9a-f]{64}", frozen["hash"])


def test_a_resume_on_another_base_or_without_adapters_is_refused(run, tmp_path):
    folders, out, *_ = run
    other = make_pair(tmp_path, SHAPE, seed=1)  # of the same names, shapes and dtypes
    said = run_ranks(resumed, 1, (other[0], folders[1]), out, {})[0]
    why = f"trained on the base in {folders[0]}, which it doesn't contain, and the weights in {other[0]} differ from"
    assert re.search(f"{why} that base. Set model.b", said)
    said = run_ranks(resumed, 1, folders, out, {"lora__r": 0})[0]
    assert "was saved from other models than lora.r give now: base lacks model." in said
    with pytest.raises(CheckpointError, match="differ from that base. Set model.base"):
        export_run(out / "checkpoints/step_00000002", tmp_path / "out", base=str(other[0]))


def test_the_merged_base_is_base_and_adapter(run):
    folders, out, state, _ = run
    source, merged = load_file(folders[0] / "model.safetensors"), load_file(out / "float32/model.safetensors")
    rounded = load_file(out / "export/base/model.safetensors")
    assert source.keys() == merged.keys() == rounded.keys()
    adapted = 0
    for key, weight in source.items():
        expected, name = weight.double(), f"base/model/{key.removesuffix('.weight')}.lora_{{}}.default.weight"
        if name.format("A") in state:
            a, b = (state[name.format(part)].double() for part in "AB")
            expected, adapted = expected + ALPHA / R * b @ a, adapted + 1
            assert not torch.equal(rounded[key], weight)
        error = (merged[key].double() - expected).abs().max() / expected.abs().max()
        assert error <= 1e-6, f"{key}: {error:.2e}"
        assert torch.equal(rounded[key], merged[key].bfloat16())
    assert adapted == len(adapter_parameters(load_pair(lora_config(folders), None, "cpu").base)) / 2


def test_peft_and_plain_transformers_load_what_was_exported(run):
    folders, out, _, logits = run
    ids = batch()["input_ids"]
    assert sorted(os.listdir(out / "export")) == ["adapter", "base", "drafter"]
    assert sorted(os.listdir(out / "export/adapter")) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "joint_train_export.json",
    ]  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    with torch.no_grad():
        without = base(ids).logits
        loaded = peft.PeftModel.from_pretrained(base, out / "export/adapter")
        torch.testing.assert_close(loaded(ids).logits, logits, rtol=1e-5, atol=1e-5)
        assert (without - logits).abs().max() > 0.01
        merged = AutoModelForCausalLM.from_pretrained(out / "float32", dtype=torch.float32)
        torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert loaded.peft_config["default"].base_model_name_or_path == str(folders[0])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_is_exported_as_the_run_exports(run, tmp_path):
    _, out, *_ = run
    assert export_run(out / "checkpoints/step_00000002", tmp_path / "out", check=True) == 0
    files, again = (
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (out / "export", tmp_path / "out")
    )
    assert files.keys() == again.keys() and [name for name in files if files[name] != again[name]] == []


def test_adapters_are_read_back_by_a_pair_that_has_the_same(run, tmp_path):
    folders, out, state, _ = run
    for folder in (out / "checkpoints/step_00000002", out / "export"):
        model = load_pair(lora_config(folders, seed=3), None, "cpu")
        model.load_pretrained(folder)
        for name, parameter in adapter_parameters(model.base).items():
            assert torch.equal(parameter, state[f"base/model/{name}"]), name
    given = peft.LoraConfig(r=2)
    model = Gemma4WithDrafter.from_pretrained(*folders, peft_config=given)
    with pytest.raises(WeightsError, match="has other adapters than this base: .* such as base_model"):
        model.load_pretrained(out / "export")
    with pytest.raises(FileNotFoundError, match="has no adapter/"):
        model.load_pretrained(folders[0].parent)
