"""The main job with adapters on the starter pair, to the end: metrics, resume, export, evaluation."""

import json

import pytest
import torch
from adapters import make_adapter
from ranks import run_ranks
from safetensors.torch import load_file
from test_parallel import full
from transformers import AutoTokenizer

from joint_train.checkpoint.reader import stored_tensors
from joint_train.config import load, read
from joint_train.distributed.lora import adapter_parameters
from joint_train.distributed.preemption import Preemption
from joint_train.evaluate.__main__ import main as evaluate
from joint_train.run_export import export_run
from joint_train.train import trainer


def finished(rank: int, overrides: list[str]):
    """The job on one rank; the adapters at its end, whole."""
    run, found = trainer.Trainer(load(overrides), Preemption(60)), {}
    export = run.export

    def kept(*args):
        found.update({name: full(p.detach()).clone() for name, p in adapter_parameters(run.model.base).items()})
        export(*args)

    run.export = kept
    run.train()
    return found


def test_a_run_with_adapters_is_trained_resumed_exported_and_evaluated(starter_dir, tmp_path):
    out = tmp_path / "run"
    overrides = [
        "+experiment=starter", f"pair={starter_dir}", f"output_dir={out}", "lora.r=8", "lora.dropout=0.1",
        "data.max_length=96", "data.micro_batch_size=2", "data.num_workers=0", "optim.warmup_steps=0",
        "optim.schedule=constant", "drafter.num_steps=2", "eval.prompts=0", "eval.batches=1", "tracking.wandb=disabled",
        "activation_checkpointing.base=full", "tracking.diagnose_every=4", "checkpoint.every=4",
        "checkpoint.keep_last=0", "max_steps=5",
    ]  # fmt: skip
    whole, _ = run_ranks(finished, 2, overrides)
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    losses = [r["base_loss"] for r in records if "base_loss" in r]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.05, losses
    last = next(r for r in records if "base_drift" in r)
    assert 0 < last["base_drift"] < 0.5 and last["grad_norm_base_from_drafter"] > 0 and last["base_drift_kl"] > 0
    for step in (4, 5):
        names = stored_tensors(out / f"checkpoints/step_{step:08d}/base/model")
        assert names.keys() == whole.keys()
    stored = sum(f.stat().st_size for f in (out / "checkpoints/step_00000005/base").rglob("*") if f.is_file())
    assert stored < 0.5 * (starter_dir / "base/model.safetensors").stat().st_size

    # The last step again, dropout included.
    again = [*overrides, f"output_dir={tmp_path / 'again'}", f"resume={out}/checkpoints/step_00000004"]
    resumed, _ = run_ranks(finished, 2, again)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())

    for change in (["lora.alpha=64"], ["lora.rank_stabilized=true"]):
        with pytest.raises(AssertionError, match="the adapters' product was multiplied by 4, and would now be by"):
            run_ranks(finished, 1, [*again, f"output_dir={tmp_path / 'other'}", *change])

    arguments = ["--prompts", "starter", "--limit", "1", "--num-steps", "2", "--max-new-tokens", "8"]
    folders = [str(out / "export" / part) for part in ("base", "drafter")]
    assert evaluate([*folders, *arguments, "--out", str(tmp_path / "evaluation")]) == 0
    assert any((tmp_path / "evaluation").iterdir())


def test_a_run_trains_an_adapter_of_peft_on_with_a_tokenizer_of_more_tokens(starter_dir, tmp_path):
    """What the adapter's folder says is in config.yaml, and enough for a resume and an export."""
    adapter, out = make_adapter(starter_dir / "base", tmp_path / "adapter", target_modules=["q_proj"]), tmp_path / "run"
    tokenizer = AutoTokenizer.from_pretrained(starter_dir / "base")
    size = len(tokenizer) + tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(adapter)
    overrides = [
        "+experiment=starter", f"pair={starter_dir}", f"output_dir={out}", "model.base=''", f"model.adapter={adapter}",
        "model.continue_adapter=true", "model.resize_vocabulary=true", "data.max_length=64", "data.micro_batch_size=2",
        "data.num_workers=0", "drafter.num_steps=2", "eval.prompts=0", "eval.batches=1", "tracking.wandb=disabled",
        "checkpoint.every=1", "checkpoint.keep_last=0", "max_steps=2",
    ]  # fmt: skip
    (whole,) = run_ranks(finished, 1, overrides)
    cfg = read(out / "config.yaml")
    assert (cfg.model.base, cfg.data.tokenizer) == (str(starter_dir / "base"), str(adapter))
    assert (cfg.lora.r, cfg.lora.alpha, cfg.lora.target_modules) == (4, 8, ["q_proj"])
    assert size == 2049 and cfg.model.resize_vocabulary == 2112
    before = load_file(adapter / "adapter_model.safetensors")
    for name, value in whole.items():
        begun = before[f"base_model.model.{name.replace('.default', '')}"]
        assert 0 < (value - begun).abs().max() < 0.1
    resumed = [*overrides, f"output_dir={tmp_path / 'again'}", f"resume={out}/checkpoints/step_00000001"]
    (again,) = run_ranks(finished, 1, resumed)
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert export_run(out / "checkpoints/step_00000002", tmp_path / "exported", check=True) == 0
    for part in ("base", "drafter"):
        one, other = (load_file(path / part / "model.safetensors") for path in (out / "export", tmp_path / "exported"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        table = next(value for key, value in one.items() if key.endswith("embed_tokens.weight"))
        assert len(table) == 2112
