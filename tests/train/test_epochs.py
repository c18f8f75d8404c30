"""Runs that are as long as their data: the number of steps, what is trained on, resumes, and what is logged."""

import json
import logging
import os

import pytest
from data_helpers import make_config, make_tokenizer, numbered, write_jsonl
from ranks import run_ranks

from joint_train.config import load, validate
from joint_train.config.values import DEFAULT_STEPS, run_length
from joint_train.data import OtherData, build_loader, loader_position
from joint_train.errors import ConfigError
from joint_train.train.length import run_steps

SMALL = [
    "data.max_length=64", "data.micro_batch_size=1", "data.num_workers=0", "optim.grad_accum=2", "optim.warmup_steps=2",
    "drafter.num_steps=2", "eval.every=0", "eval.batches=1", "eval.prompts=0", "tracking.wandb=disabled",
    "tracking.log_every=1", "model.export.at_end=false", "max_steps=null", "epochs=1.5", "data.train.0.limit=30",
]  # fmt: skip


def train(rank: int, overrides: list[str], rows: str, die_after: int | None = None) -> None:
    """The job on one rank, which writes each row that it trains on; with ``die_after`` it is gone after that step."""
    from joint_train.train import trainer

    class Recorded(trainer.Trainer):
        def prepare(self, batch, sources):
            if self.model.training:
                with open(f"{rows}.{rank}", "a") as file:
                    file.write(json.dumps([self.step, batch["input_ids"].tolist()]) + "\n")
            return super().prepare(batch, sources)

        def train_step(self, batches):
            if self.step == die_after:
                os._exit(9)
            return super().train_step(batches)

    trainer.Trainer = Recorded
    trainer.run(load(overrides))


def trained(rows, ranks: int) -> dict[int, list]:
    """The rows of each step on all ranks; those of a step that was run again, once."""
    steps: dict[int, dict] = {}
    for rank in range(ranks):
        for line in (rows.parent / f"{rows.name}.{rank}").read_text().splitlines():
            step, batch = json.loads(line)
            steps.setdefault(step, {}).setdefault(rank, []).append(batch)
    return {step: [of[rank][-2:] for rank in sorted(of)] for step, of in steps.items()}


def test_a_run_ends_with_its_epochs_also_when_it_is_resumed(starter_dir, tmp_path):
    """Uninterrupted, and killed and resumed: as many steps, the same learning rates, the same rows."""
    settings = ["+experiment=starter", f"pair={starter_dir}", *SMALL, "checkpoint.every=3"]
    run_ranks(train, 2, [*settings, f"output_dir={tmp_path}/a"], str(tmp_path / "rows-a"))
    again = [*settings, f"output_dir={tmp_path}/b"]
    with pytest.raises(AssertionError, match="it died|Connection|closed"):
        run_ranks(train, 2, again, str(tmp_path / "rows-b"), 4)
    run_ranks(train, 2, again, str(tmp_path / "rows-b"))
    of = {run: [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").open()] for run in "ab"}
    for run in "ab":
        steps = [record for record in of[run] if "epoch" in record]
        assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
        assert steps[-1]["epoch"] == 1.5 and all(
            b["epoch"] >= a["epoch"] for a, b in zip(steps, steps[1:], strict=False)
        )
    assert [(r["step"], r.get("lr"), r.get("epoch"), r.get("base_loss")) for r in of["a"]] == [
        (r["step"], r.get("lr"), r.get("epoch"), r.get("base_loss")) for r in of["b"]
    ]
    assert trained(tmp_path / "rows-a", 2) == trained(tmp_path / "rows-b", 2)


def loader_of(tmp_path, rank=0, size=1, position=None, **changes):
    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", numbered(60))], **changes.pop("data", {}))
    for key, value in changes.items():
        setattr(cfg, key, value)
    return cfg, build_loader(cfg, make_tokenizer(), "train", rank, size, position)


def test_the_number_of_steps(tmp_path):
    cfg, loader = loader_of(tmp_path, epochs=2.0)
    rows = loader.sequence.count_rows()
    cfg.optim.grad_accum = 3
    assert run_steps(cfg, loader, ranks=2, step=0) == -(-rows // 6)
    # Steps may have another size after a resume: what is left is counted from where the data are.
    batches = iter(loader)
    for _ in range(10):
        next(batches)
    assert run_steps(cfg, loader, ranks=1, step=5) == 5 + -(-(rows - 10) // 3)
    cfg.profile.steps = "10000"
    with pytest.raises(ConfigError, match="profile.steps=10000: the run ends at step"):
        run_steps(cfg, loader, ranks=1, step=0)


def test_many_passes_are_warned_of_by_source(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cfg, loader = loader_of(tmp_path, max_steps=20)
    assert run_steps(cfg, loader, 1, 0) == 20
    assert "passes over" not in caplog.text and "of 60 documents" in caplog.text
    cfg.max_steps = 2000
    run_steps(cfg, loader, 1, 0)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "passes over the data source 'a'" in warning and "Set epochs" in warning


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ([], (DEFAULT_STEPS, None)),
        (["max_steps=7"], (7, None)),
        (["epochs=2.5"], (None, 2.5)),
        (["data.mixture=epoch"], (None, 1.0)),
        (["data.mixture=epoch", "max_steps=7"], (7, None)),
    ],
)
def test_one_of_two_says_how_long_a_run_is(overrides, expected):
    cfg = load(["model.base=b", "model.drafter=d", "data.train=[{path: x}]", *overrides])
    validate(cfg)
    assert run_length(cfg) == expected


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["max_steps=7", "epochs=1"], "max_steps=7 and epochs=1: only one of them"),
        (["epochs=0"], "epochs=0.0: must be above 0"),
        (["epochs=-1"], "must be above 0"),
    ],
)
def test_lengths_that_cannot_be_meant(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(load(["model.base=b", "model.drafter=d", "data.train=[{path: x}]", *overrides]))


def test_a_position_says_why_it_does_not_fit(tmp_path):
    _, loader = loader_of(tmp_path, seed=0)
    position = json.loads(json.dumps(loader_position(loader)))
    loader_of(tmp_path, seed=0, position=position)
    with pytest.raises(OtherData, match="data.max_length was 64 and is now 96; seed was 0 and is now 1"):
        loader_of(tmp_path, seed=1, data={"max_length": 96}, position=position)
    before = {"rows": 12, "window": 0, "row": 12, "data": "0123456789abcdef"}
    with pytest.raises(OtherData, match="the order of the rows changed with this version of joint-train"):
        loader_of(tmp_path, seed=0, position=before)


def test_streams_have_no_epochs(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "stream").mkdir()
    datasets.Dataset.from_list(numbered(20)).to_parquet(tmp_path / "stream" / "train.parquet")
    cfg = make_config(tmp_path, [{"path": str(tmp_path / "stream"), "streaming": True}])
    loader = build_loader(cfg, make_tokenizer(), "train", 0, 1)
    assert loader.epoch is None and run_steps(cfg, loader, 1, 0) == DEFAULT_STEPS
    cfg.epochs = 1.0
    with pytest.raises(ConfigError.__mro__[1], match="a stream's length isn't known"):
        build_loader(cfg, make_tokenizer(), "train", 0, 1)
