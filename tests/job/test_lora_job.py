"""The main job with adapters on the starter pair, to the end: metrics, resume, export, evaluation."""

import json

import pytest
import torch
from ranks import run_ranks
from test_parallel import full

from joint_train.checkpoint.reader import stored_tensors
from joint_train.config import load
from joint_train.distributed.lora import adapter_parameters
from joint_train.distributed.preemption import Preemption
from joint_train.evaluate.__main__ import main as evaluate
from joint_train.train import trainer


def finished(rank: int, overrides: list[str]):
    """The job on one rank; the adapters at its end, whole."""
    run, found = trainer.Trainer(load(overrides), Preemption(60)), {}
    export = run.export

    def kept(folder):
        found.update({name: full(p.detach()).clone() for name, p in adapter_parameters(run.model.base).items()})
        export(folder)

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
