"""The main job on a quantised base: checkpoints without the base, resume bit for bit, exports, evaluation."""

import json
import shutil

import pytest
import torch
from quantised_folders import quantise
from ranks import run_ranks
from safetensors.torch import load_file
from test_parallel import full

from joint_train import Gemma4WithDrafter
from joint_train.checkpoint.reader import stored_tensors
from joint_train.config import load
from joint_train.distributed.preemption import Preemption
from joint_train.errors import JointTrainError
from joint_train.evaluate.__main__ import main as evaluate
from joint_train.run_export import export_run
from joint_train.train import trainer
from joint_train.weights.placing import MANIFEST


def finished(rank: int, overrides: list[str]):
    """The job on one rank; what was trained, at its end, whole."""
    run, found = trainer.Trainer(load(overrides), Preemption(60)), {}
    export = run.export

    def kept(*args):
        trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
        found.update({name: full(p.detach()).clone() for name, p in trained.items()})
        export(*args)

    run.export = kept
    run.train()
    return found


def settings(pair, out, *more):
    return [
        "+experiment=starter", f"pair={pair}", f"output_dir={out}", "data.max_length=64", "data.micro_batch_size=2",
        "data.num_workers=0", "optim.warmup_steps=0", "optim.schedule=constant", "drafter.num_steps=2",
        "eval.prompts=0", "eval.batches=1", "tracking.wandb=disabled", "tracking.diagnose_every=2",
        "checkpoint.every=2", "checkpoint.keep_last=0", "max_steps=3", *more,
    ]  # fmt: skip


def test_a_base_in_four_bits_with_adapters(starter_dir, tmp_path):
    out = tmp_path / "run"
    overrides = settings(starter_dir, out, "model.quantization=nf4", "lora.r=4", "lora.dropout=0.1",
                         "activation_checkpointing.base=full")  # fmt: skip
    whole, _ = run_ranks(finished, 2, overrides)
    checkpoint = out / "checkpoints/step_00000003"
    assert json.loads((checkpoint / "base/frozen.json").read_text())["quantization"] == "nf4"
    assert all(".lora_" in name for name in stored_tensors(checkpoint / "base/model"))
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert 0 < next(r["base_drift"] for r in records if "base_drift" in r) < 0.5

    # The last step again, dropout included; not with another base.
    again = [*overrides, f"output_dir={tmp_path / 'again'}", f"resume={out}/checkpoints/step_00000002"]
    resumed, _ = run_ranks(finished, 2, again)
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], value) for name, value in whole.items())
    with pytest.raises(AssertionError, match="model.quantization=nf4; it is none now"):
        run_ranks(finished, 1, [*again, f"output_dir={tmp_path / 'other'}", "model.quantization=none"])

    # The export has the folder's own weights, with the adapters; from a checkpoint as from the run.
    source, exported = (
        load_file(folder / "model.safetensors") for folder in (starter_dir / "base", out / "export/base")
    )
    adapters = {name.replace(".default", ""): tensor for name, tensor in whole.items() if ".lora_" in name}
    changed = 0
    for name, weight in source.items():
        expected = weight.float()
        a = adapters.get(f"base.{name.removesuffix('.weight')}.lora_A.weight")
        if a is not None:
            b = adapters[f"base.{name.removesuffix('.weight')}.lora_B.weight"]
            expected, changed = expected + 32 / 4 * (b @ a), changed + 1
        torch.testing.assert_close(exported[name].float(), expected.bfloat16().float(), rtol=0.01, atol=1e-6)
    assert changed == len(adapters) / 2 > 10
    assert export_run(checkpoint, tmp_path / "export", check=True) == 0
    for part in ("base", "drafter", "adapter"):
        file = "adapter_model.safetensors" if part == "adapter" else "model.safetensors"
        a, b = (load_file(folder / part / file) for folder in (tmp_path / "export", out / "export"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), part
    assert "kept as nf4" in (out / "export/base/README.md").read_text()


@pytest.mark.parametrize(
    "more", [["freeze.base=true"], pytest.param(["lora.r=4"], marks=pytest.mark.slow)], ids=["frozen", "adapters"]
)
def test_a_base_as_it_is_saved(starter_dir, tmp_path, more):
    pair, out = tmp_path / "pair", tmp_path / "run"
    shutil.copytree(starter_dir, pair)
    quantise(pair / "base", "int4")
    overrides = settings(pair, out, "model.quantization=as_saved", *more)
    run_ranks(finished, 1, overrides)
    adapters = "lora.r=4" in more
    checkpoint = out / "checkpoints/step_00000003"
    assert (
        len(stored_tensors(checkpoint / "base/model")) > 10
        if adapters
        else not stored_tensors(checkpoint / "base/model")
    )
    parts = {"drafter", "adapter"} if adapters else {"drafter"}
    assert {folder.name for folder in (out / "export").iterdir()} == parts
    again = [*overrides, "max_steps=4"]
    run_ranks(finished, 1, again)
    (tmp_path / "export/base").mkdir(parents=True)
    for name in ("config.json", MANIFEST):
        (tmp_path / "export/base" / name).write_text("{}")  # an older export's, which goes
    assert export_run(out / "checkpoints/step_00000004", tmp_path / "export", check=True) == 0
    assert {folder.name for folder in (tmp_path / "export").iterdir()} == parts
    for part in parts:
        file = "adapter_model.safetensors" if part == "adapter" else "model.safetensors"
        a, b = (load_file(folder / part / file) for folder in (tmp_path / "export", out / "export"))
        assert all(torch.equal(a[name], b[name]) for name in b), part
    shutil.copytree(starter_dir / "base", tmp_path / "other")
    quantise(tmp_path / "other", "int8")
    for base in (tmp_path / "other", starter_dir / "base"):
        with pytest.raises(JointTrainError, match=f"weights in {base} differ|{base} holds no quantised weights"):
            export_run(out / "checkpoints/step_00000004", tmp_path / "of_another", base=str(base))
        assert not (tmp_path / "of_another").exists() or not list((tmp_path / "of_another").iterdir())
    if not adapters:
        arguments = ["--prompts", "starter", "--limit", "1", "--num-steps", "2", "--max-new-tokens", "8"]
        folders = [str(pair / "base"), str(out / "export/drafter")]
        assert evaluate([*folders, *arguments, "--out", str(tmp_path / "evaluation")]) == 0


def test_a_frozen_base_is_not_in_checkpoints(starter_dir, tmp_path):
    out = tmp_path / "run"
    overrides = settings(starter_dir, out, "freeze.base=true")
    whole = run_ranks(finished, 1, overrides)[0]
    assert not stored_tensors(out / "checkpoints/step_00000003/base/model")
    again = [*overrides, f"output_dir={tmp_path / 'again'}", f"resume={out}/checkpoints/step_00000002"]
    resumed = run_ranks(finished, 1, again)[0]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert export_run(out / "checkpoints/step_00000003", tmp_path / "export", check=True) == 0
    source, exported = (
        load_file(folder / "model.safetensors") for folder in (starter_dir / "base", tmp_path / "export/base")
    )
    assert all(torch.equal(exported[name], tensor) for name, tensor in source.items())

    # A pair whose base was changed since gets it from its folder again.
    model = Gemma4WithDrafter.from_pretrained(starter_dir / "base", starter_dir / "drafter")
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    with torch.no_grad():
        for parameter in model.base.parameters():
            parameter.add_(1)
    model.load_pretrained(out / "checkpoints/step_00000003")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base.state_dict().items())

    # The run goes on with adapters; the steps before had none, and export as the base that they were trained on.
    run_ranks(finished, 1, [*overrides, "freeze.base=false", "lora.r=4", "max_steps=4"])
    assert export_run(out / "checkpoints/step_00000003", tmp_path / "earlier", check=True) == 0
    exported = load_file(tmp_path / "earlier/base/model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in source.items())


@pytest.mark.slow
def test_the_best_step_of_a_frozen_base_is_exported_with_that_base(starter_dir, tmp_path):
    """Not with the one that the run has trained since."""
    out = tmp_path / "run"
    best = ["checkpoint.keep_best=val/base_loss", "model.export.weights=best", "eval.every=2"]
    overrides = settings(starter_dir, out, "freeze.base=true", *best, "max_steps=2")
    run_ranks(finished, 2, overrides)
    run_ranks(finished, 2, [*overrides, "freeze.base=false", "optim.lr=0.3", "max_steps=4"])
    source, exported = (
        load_file(folder / "model.safetensors") for folder in (starter_dir / "base", out / "export/base")
    )
    assert all(torch.equal(exported[name], tensor) for name, tensor in source.items())


@pytest.mark.slow
def test_a_base_that_was_trained_stays_in_checkpoints(starter_dir, tmp_path):
    """Frozen, then trained, then frozen again: its weights are the trained ones."""
    out = tmp_path / "run"
    overrides = settings(starter_dir, out, "freeze.base=true")
    run_ranks(finished, 1, overrides)
    joint = [
        *overrides,
        "freeze.base=false",
        f"output_dir={tmp_path / 'joint'}",
        f"resume={out}/checkpoints/step_00000002",
    ]
    trained = run_ranks(finished, 1, joint)[0]
    assert stored_tensors(tmp_path / "joint/checkpoints/step_00000003/base/model")
    frozen = [*overrides, "max_steps=4", f"output_dir={tmp_path / 'joint'}"]
    run_ranks(finished, 1, frozen)
    name = next(name for name in trained if name.endswith("layers.0.mlp.up_proj.weight") and name.startswith("base"))
    exported = load_file(tmp_path / "joint/export/base/model.safetensors")[name.removeprefix("base.")]
    assert torch.equal(exported, trained[name].bfloat16())
    assert stored_tensors(tmp_path / "joint/checkpoints/step_00000004/base/model")
