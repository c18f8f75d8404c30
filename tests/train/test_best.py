"""The best validation: early stopping, the export of the best checkpoint, and what can't be the best."""

import json
import math
from pathlib import Path

import pytest
from ranks import run_ranks
from safetensors import safe_open

from joint_train.checkpoint import layout
from joint_train.checkpoint.__main__ import main as checkpoint_command
from joint_train.config import ConfigError, load
from joint_train.train.best import Best

PLAIN = ["model.base=b", "model.drafter=d", "data.train=x"]


def train(rank: int, overrides: list[str], out: str) -> None:
    """The job, twice: the second goes on from the first's checkpoint; then an export of its first step."""
    import logging

    from joint_train.run_export import export_run
    from joint_train.train import trainer

    logging.basicConfig(filename=f"{out}.log", level=logging.INFO, format="%(message)s", force=True)
    for _ in range(2):
        trainer.run(load(overrides))
    export_run(Path(out) / "checkpoints" / "step_00000001", Path(out) / "first")


def test_a_run_ends_when_patience_is_over_and_exports_its_best_checkpoint(starter_dir, tmp_path):
    """By the highest loss of the base every step is worse than the one before: the run ends at the second."""
    out = tmp_path / "run"
    run_ranks(train, 1, [
        "+experiment=starter", f"pair={starter_dir}", f"output_dir={out}", "max_steps=40", "eval.every=1",
        "eval.batches=1", "eval.prompts=1", "eval.max_new_tokens=4", "eval.patience=2", "checkpoint.every=1",
        "checkpoint.keep_last=1", "checkpoint.keep_best=-val/base_loss", "model.export.weights=best",
        "drafter.num_steps=2", "data.num_workers=0", "data.max_length=64", "tracking.wandb=disabled",
    ], str(out))  # fmt: skip
    log = (tmp_path / "run.log").read_text()
    assert "the run ends at step 2 of 40: 2 validations in a row were no better than step 0 (val/base_loss" in log
    assert [path.name for path in layout.list_steps(out / "checkpoints")] == ["step_00000002", "step_00000001"]
    assert "resumed from step 2 of 40" in log and "export of step 1, the best of the checkpoints" in log
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    generations = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    # The validation that ends the run generates, as that of a last step does.
    assert [line["step"] for line in generations] == [0, 2] and "val/tokens_per_forward" in records[2]
    assert generations[0]["step"] == 0 and set(generations[0]["examples"][0]) == {
        "prompt",
        "text",
        "tokens_per_forward",
    }
    for part in ("base", "drafter"):
        with safe_open(out / "export" / part / "model.safetensors", "pt") as exported:
            with safe_open(out / "first" / part / "model.safetensors", "pt") as first:
                assert exported.keys() == first.keys()
                assert all(exported.get_tensor(name).equal(first.get_tensor(name)) for name in first.keys())
    card = (out / "export" / "base" / "README.md").read_text()
    assert "| optimizer steps | 1 |" in card and f"{records[1]['val/base_loss']:.3f}" in card


def train_once(rank: int, overrides: list[str]) -> None:
    from joint_train.train import trainer

    trainer.run(load(overrides))


def test_a_checkpoint_has_the_metrics_of_its_own_step(starter_dir, tmp_path):
    """Validated are steps 2, which is saved because it is the best so far, and 4; step 3 is saved without a validation,
    so nothing is known of it."""
    out = tmp_path / "run"
    run_ranks(train_once, 2, [
        "+experiment=starter", f"pair={starter_dir}", f"output_dir={out}", "max_steps=4", "eval.every=2",
        "eval.batches=1", "eval.prompts=0", "checkpoint.every=3", "checkpoint.keep_last=0",
        "checkpoint.keep_best=val/base_loss", "model.export.weights=best", "optim.lr=1e-3", "optim.warmup_steps=0",
        "drafter.num_steps=2", "data.num_workers=0", "data.max_length=64", "tracking.wandb=disabled",
    ])  # fmt: skip
    records = {r["step"]: r for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())}
    manifests = {m.step: m for _, m in layout.list_complete(out / "checkpoints")}
    assert sorted(manifests) == [2, 3, 4] and not manifests.pop(3).metrics
    assert records[2]["val/base_loss"] < records[0]["val/base_loss"]
    for step, manifest in manifests.items():
        assert manifest.metrics["val/base_loss"] == pytest.approx(records[step]["val/base_loss"])


def test_the_best_is_by_its_metric_and_waits_only_for_validations_that_have_it():
    best = Best("-val/a", 3)
    for step, value in enumerate([1.0, 3.0, math.nan, math.inf]):
        best.observe(step, {"val/a": value})
        best.observe(step, {"val/b": 9.0})
        best.observe(step, {"val/a": value})  # repeated, it doesn't count again
    assert (best.step, best.value, best.waited, best.exhausted) == (1, 3.0, 2, False)
    again = Best("-val/a", 3, best.state())
    again.observe(4, {"val/a": 3.0})  # as good isn't better
    assert again.exhausted and not Best("val/a", 3, best.state()).exhausted
    never = Best(None, 0)
    never.observe(1, {"val/a": 1.0})
    assert not never.exhausted


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["checkpoint.keep_best=val/bas_loss"], "Did you mean val/base_loss?"),
        (["checkpoint.keep_best=-accepted_length_expected"], "Did you mean -val/accepted_length_expected?"),
        (["checkpoint.keep_best=val/drafter_ce_9"], "don't measure that. Did you mean val/drafter_ce_"),
        (["checkpoint.keep_best=val/base_loss", "data.val=[]"], "data.val is empty"),
        (["eval.patience=3"], "eval.patience=3 needs to know what is better: set checkpoint.keep_best"),
        (["model.export.weights=best"], "model.export.weights=best needs to know what is better"),
    ],
)
def test_a_best_that_cannot_be_found_is_refused_at_the_start(overrides, said):
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        load([*PLAIN, "data.val=y", *overrides])


def test_known_metrics_are_accepted_those_of_sources_too():
    for name in ("val/drafter_ce_3", "-val/dense_agreement_0", "val/code/base_ce", "-val/tokens_per_forward"):
        load([*PLAIN, "data.val=y", f"checkpoint.keep_best={name}"])


def test_prune_refuses_a_metric_that_no_checkpoint_has(tmp_path, capsys):
    folder = tmp_path / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    files = {"config.json": b'{"checkpoint": {}}'}
    written = {name: list(layout.write_file(folder / name, data)) for name, data in files.items()}
    written |= {name: [0, "00000000"] for name in layout.REQUIRED if name not in files}
    for name in written.keys() - files.keys():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    manifest = layout.Manifest(1, 1, "", "2026-01-01T00:00", {}, {"val/base_loss": 1.0}, written)
    (folder / layout.MANIFEST).write_bytes(manifest.to_bytes())
    assert checkpoint_command(["prune", str(tmp_path), "--keep-best", "val/x", "--dry-run"]) == 2
    assert "has the metric val/x; they have val/base_loss" in capsys.readouterr().err
    assert checkpoint_command(["prune", str(tmp_path), "--keep-best", "val/base_loss", "--dry-run"]) == 0
