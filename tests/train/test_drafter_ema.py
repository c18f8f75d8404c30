"""``optim.drafter_ema``: the average by its formula, through resumes, in what is validated and in what is exported."""

from unittest import mock

import pytest
import torch
from checkpoint_run import build, config, train_step
from ranks import run_ranks
from safetensors.torch import load_file
from test_parallel import full

from joint_train import export
from joint_train.checkpoint import Checkpointer
from joint_train.config import load
from joint_train.distributed.preemption import Preemption
from joint_train.errors import ConfigError
from joint_train.train import trainer
from joint_train.weights.average import averaged, start_average, update_average

STEPS, DECAY = 4, 0.6


def settings(pair, output_dir, *more: str) -> list[str]:
    return [
        "+experiment=starter", f"pair={pair}", f"output_dir={output_dir}", "data.max_length=64", "data.num_workers=0",
        "data.micro_batch_size=1", "optim.warmup_steps=1", "optim.schedule=constant", "drafter.num_steps=2",
        "eval.every=2", "eval.batches=1", "eval.prompts=0", "tracking.wandb=disabled", "checkpoint.every=1",
        "checkpoint.keep_last=0", "model.export.drafter_last=true", f"optim.drafter_ema={DECAY}",
        f"max_steps={STEPS}", *more,
    ]  # fmt: skip


def drafter(model) -> dict[str, torch.Tensor]:
    return {name: full(p.detach()).clone() for name, p in model.drafter.named_parameters()}


def run(pair, folder, *more: str) -> tuple[list, list, dict]:
    """A run: the drafter's weights after each step, those that were validated by step, and the average at the end."""
    weights, validated = [], []

    class Recorded(trainer.Trainer):
        def train_step(self, batches):
            if not weights:
                weights.append(drafter(self.model))
            metrics = super().train_step(batches)
            weights.append(drafter(self.model))
            return metrics

        def prepare(self, *args):
            if not self.model.training and self.step not in dict(validated):
                validated.append((self.step, drafter(self.model)))
            return super().prepare(*args)

    with mock.patch("torch.distributed.destroy_process_group"):
        job = Recorded(load(settings(pair, folder, *more)), Preemption(60))
        job.train()
    average = job.model.drafter_average or {}
    return weights, validated, {name: full(x).clone() for name, x in average.items()}


def runs(rank: int, pair, folder) -> list:
    checkpoint = f"resume={folder}/whole/checkpoints/step_0000000"
    whole, resumed = run(pair, folder / "whole"), run(pair, folder / "resumed", f"{checkpoint}2")
    none = ["optim.drafter_ema=0.0", "model.export.drafter_last=false", "max_steps=2"]
    without, late = run(pair, folder / "without", *none), f"resume={folder}/without/checkpoints/step_00000002"
    return [whole, resumed, without[0], run(pair, folder / "late", late, "max_steps=3")]


@pytest.fixture(scope="module")
def made(starter_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ema")
    return folder, run_ranks(runs, 2, starter_dir, folder)[0]


def averages(weights: list[dict]) -> list[dict]:
    """After each step, beginning with the first weights."""
    found = [weights[0]]
    for now in weights[1:]:
        found.append({name: DECAY * x + (1 - DECAY) * now[name] for name, x in found[-1].items()})
    return found


def assert_close(ours: dict, theirs: dict) -> None:
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-6, atol=1e-7, msg=name)


def test_it_is_the_average_by_its_formula_and_a_resume_goes_on_with_it(made):
    _, ((weights, _, average), (again, _, resumed), _, _) = made
    assert len(weights) == STEPS + 1 and len(again) == STEPS - 1
    assert_close(average, averages(weights)[-1])
    assert any(not torch.equal(average[name], x) for name, x in weights[-1].items())
    assert all(torch.equal(resumed[name], x) for name, x in average.items())
    assert all(torch.equal(again[-1][name], x) for name, x in weights[-1].items())


def test_it_is_what_is_validated_and_training_goes_on_from_the_last_weights(made):
    _, ((weights, validated, _), _, without, _) = made
    assert [step for step, _ in validated] == [0, 2, 4]
    for step, seen in validated:
        assert_close(seen, averages(weights)[step])
    for step in (1, 2):
        assert all(torch.equal(without[step][name], x) for name, x in weights[step].items())


def test_a_run_that_had_none_starts_it_with_its_weights(made):
    _, (_, _, _, (weights, _, average)) = made
    assert_close(average, averages(weights)[-1])


def test_it_is_exported_with_the_last_weights_beside_it(made, capsys):
    folder, ((weights, _, average), *_) = made
    ours = folder / "whole" / "export"
    assert export.main([str(folder / "whole/checkpoints/step_00000004"), str(folder / "out"), "--verify"]) == 0
    for part, expected in (("drafter", average), ("drafter_last", weights[-1])):
        for out in (ours, folder / "out"):
            found = load_file(out / part / "model.safetensors")
            assert found and all(torch.equal(x, expected[name].to(x.dtype)) for name, x in found.items() if x.ndim > 1)
        assert (ours / part / "tokenizer_config.json").exists()


@pytest.mark.parametrize("wrong, said", [
    (["optim.drafter_ema=1.0"], "optim.drafter_ema=1.0: a decay must be below 1"),
    (["optim.drafter_ema=-0.1"], "optim.drafter_ema=-0.1: must be at least 0"),
    (["optim.drafter_ema=0.0"], "there is none: set optim.drafter_ema"),
])  # fmt: skip
def test_what_cannot_work_is_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        load(settings("/nowhere", "out", *wrong))


def test_a_checkpoint_with_one_loads_without_and_the_other_way_round(tmp_path, caplog):
    def warnings() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name.startswith("joint_train") and r.levelname == "WARNING"]

    cfg = config()
    model, optimizer = build(cfg)
    start_average(model)
    train_step(model, optimizer)
    update_average(model, 0.5)
    checkpointer = Checkpointer(tmp_path, cfg.checkpoint)
    checkpointer.save(1, model, optimizer, {}, config=cfg)
    without, other_optimizer = build(cfg, seed=1)
    assert checkpointer.resume("auto", without, other_optimizer, config=cfg)[0].name == "step_00000001"
    trained = {name: p.detach().clone() for name, p in model.drafter.named_parameters()}
    assert all(torch.equal(p, trained[name]) for name, p in without.drafter.named_parameters())
    assert not warnings()

    checkpointer.save(2, without, other_optimizer, {}, config=cfg)
    assert not (tmp_path / "checkpoints/step_00000002/drafter/ema").exists()
    checkpointer.resume("auto", model, optimizer, config=cfg)
    checkpointer.close()
    (said,) = warnings()
    assert said == "step_00000002 has no average of the drafter (optim.drafter_ema): it starts with its weights"
    average = model.drafter_average
    assert all(torch.equal(average[name], x) for name, x in trained.items() if name in average)
    with averaged(model):  # a frozen weight isn't copied, and a trained one comes back bit for bit
        pass
    assert all(torch.equal(p, trained[name]) for name, p in model.drafter.named_parameters())
