"""What a run reports and how it steps, against a count from whole models' logits in one process, target by target."""

import functools
import json
import re
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from joint_train import Gemma4WithDrafter
from joint_train.config import load
from joint_train.distributed.preemption import Preemption
from joint_train.errors import DataError, WriteError
from joint_train.metrics import METRICS
from joint_train.train import trainer
from joint_train.train.diagnostics import POSITIONS
from joint_train.train.pace import Since, utilisation

K, STEPS, ROUND_WEIGHTS, LOSS_WEIGHT, MIX = 2, 2, [1.0, 0.5], 0.7, {"ce": 0.25, "kl": 0.75}
LR, DRAFTER_LR = 3e-3, 6e-3


def settings(pair, data, output_dir, *more: str) -> list[str]:
    sources = "[" + ", ".join(f"{{path: {data}/{name}.jsonl, name: {name}}}" for name in ("long", "short")) + "]"
    return [
        "+experiment=starter", f"pair={pair}", f"output_dir={output_dir}", f"data.train={sources}",
        f"data.val={sources}", "data.max_length=64", "data.micro_batch_size=2", "data.num_workers=0",
        "optim.grad_accum=2", "optim.warmup_steps=2", f"optim.lr={LR}", f"optim.drafter_lr={DRAFTER_LR}",
        "optim.max_grad_norm=0.1", "optim.clip=joint", "drafter.base_grad_scale=1",
        f"drafter.num_steps={K}", f"drafter.loss_weight={LOSS_WEIGHT}",
        f"loss.round_weights={ROUND_WEIGHTS}", "loss.drafter={ce: 0.25, kl: 0.75}", "eval.batches=2",
        "eval.prompts=3", "eval.max_new_tokens=10", "eval.every=1", "tracking.wandb=disabled",
        "tracking.diagnose_every=1", "model.export.at_end=false", f"max_steps={STEPS}", *more,
    ]  # fmt: skip


def recorded_run(rank: int, overrides: list[str]) -> tuple[list, list, int]:
    """The job on one rank.

    Returns:
        Its batches as (what for, step, batch), the weights after each step (whole, on rank 0), planned FLOPs.
    """
    batches, weights, flops = [], [], []

    class Recorded(trainer.Trainer):
        def prepare(self, batch, sources):
            what = "fixed" if not hasattr(self, "loader") else "train" if self.model.training else "val"
            what = what if sources else "own"
            batches.append((what, getattr(self, "step", 0), dict(batch)))
            return super().prepare(batch, sources)

        def train_step(self, batches):
            metrics = super().train_step(batches)
            whole = {name: p.detach().full_tensor().clone() for name, p in self.model.named_parameters()}
            weights.append(whole if self.rank == 0 else None)
            flops.append(self.plan.flops)
            return metrics

    Recorded(load(overrides), Preemption(60)).train()
    return batches, weights, flops[0]


def tally(model: Gemma4WithDrafter, batches: list[dict], first: int | None = None) -> SimpleNamespace:
    """Every target of some batches, one after the other.

    Returns:
        ``rounds``: for the base and each round, a column over its targets of each: the source, the cross-entropy, what
        is trained, whether the text's and whether the base's most likely token is hit, sum min(p, q), p(argmax q);
        ``accepted``: for each row with all rounds, how many are right in a row; ``walked``: the same for those of these
        rows that decoding would stop at; ``log_probs``: the base's on the
        ``first`` targets of each batch; ``left_out``: the share of the rounds' targets where no decoding comes.
    """
    rounds, accepted, walked, log_probs, left_out = [[] for _ in range(1 + K)], [], [], [], 0
    for batch in batches:
        ids, labels, documents = batch["input_ids"], batch["labels"], batch["document_ids"]
        inputs = {"input_ids": ids, "position_ids": batch["position_ids"], "document_ids": documents}
        out = model(**inputs, return_logits=True)
        logits = [out.logits, *out.drafter_logits]
        targets = [[] for _ in logits]  # (row of the batch, position, row that predicts it)
        for b in range(ids.shape[0]):
            for p in range(1, ids.shape[1]):
                if labels[b, p] == -100 or documents[b, p] == 0 or documents[b, p - 1] != documents[b, p]:
                    continue
                targets[0].append((b, p, p - 1))
                for k in range(K):
                    if p - 2 - k >= 0 and documents[b, p - 2 - k] == documents[b, p]:
                        if -100 in labels[b, p - 1 - k : p]:  # decoding never visits that row
                            left_out += 1
                        else:
                            targets[1 + k].append((b, p, p - 2 - k))
        right = {}
        for i, found in enumerate(targets):
            b, p, row = torch.tensor(found).T
            teacher, q, token = logits[0][b, p - 1].log_softmax(-1), logits[i][b, row].log_softmax(-1), labels[b, p]
            if i == 0:
                log_probs += teacher.detach()[:first]
            teacher = teacher.detach()
            ce, choice = -q.gather(1, token[:, None])[:, 0], q.argmax(-1)
            kl = (teacher.exp() * (teacher - q)).sum(-1)
            agrees, overlap = choice == teacher.argmax(-1), torch.minimum(q.exp(), teacher.exp()).sum(-1).detach()
            loss = ce if i == 0 else MIX["ce"] * ce + MIX["kl"] * kl
            of_argmax = teacher.exp().gather(1, choice[:, None])[:, 0]
            columns = batch["source"][b, p], ce, loss, choice == token, agrees, overlap, of_argmax
            rounds[i].append(columns)
            if i > 0:
                for where, agreed in zip(zip(b.tolist(), row.tolist(), strict=True), agrees.tolist(), strict=True):
                    right.setdefault(where, {})[i - 1] = agreed
        leading = {
            where: [answers.get(k, False) for k in range(K + 1)].index(False) for where, answers in right.items()
        }
        accepted += [leading[where] for where, answers in right.items() if len(answers) == K]
        rows = {(b, row) for b, _, row in targets[0]}
        for b, row in ((b, row) for b, row in rows if (b, row - 1) not in rows):
            while (b, row) in rows:
                if len(right.get((b, row), {})) == K:
                    walked.append(leading[b, row])
                row += 1 + leading.get((b, row), 0)
    rounds = [[torch.cat(column) for column in zip(*parts, strict=True)] for parts in rounds]
    left_out = left_out / (left_out + sum(len(columns[0]) for columns in rounds[1:]))
    return SimpleNamespace(
        rounds=rounds,
        accepted=torch.tensor(accepted),
        walked=torch.tensor(walked),
        log_probs=torch.stack(log_probs),
        left_out=left_out,
    )


def mean(values: Tensor) -> float:
    return values.double().mean().item()


def expected_losses(found: SimpleNamespace) -> dict[str, float]:
    """The metrics of the losses, by their documented meanings."""
    base, *drafts = found.rounds
    expected = {"base_loss": mean(base[1]), "base_accuracy": mean(base[3])}
    for k, columns in enumerate(drafts):
        acceptance = ("acceptance_sampled", 5), ("acceptance_argmax", 6)
        for name, i in (("drafter_ce", 1), ("drafter_loss", 2), ("agreement", 4), *acceptance):
            expected[f"{name}_{k}"] = mean(columns[i])
    for name in ("drafter_ce", "drafter_loss"):
        expected[name] = sum(expected[f"{name}_{k}"] for k in range(K)) / K
    expected["drafter_targets_left_out"] = found.left_out
    expected["accepted_length_expected"] = 1 + mean(found.accepted)
    expected["accepted_length_walked"] = 1 + mean(found.walked)
    for index, source in enumerate(("long", "short")):
        expected[f"{source}/targets"] = int((base[0] == index).sum())
        expected[f"{source}/base_ce"] = mean(base[1][base[0] == index])
        expected[f"{source}/agreement"] = mean(torch.cat([columns[4][columns[0] == index] for columns in drafts]))
        expected[f"{source}/drafter_ce"] = mean(torch.cat([columns[1][columns[0] == index] for columns in drafts]))
    return expected


def gradient_norms(model: Gemma4WithDrafter, found: SimpleNamespace, base_too: bool) -> dict[str, float]:
    """L2 norms of the gradients of the joint loss, or of the drafter's part of it."""
    model.zero_grad()
    base, *drafts = found.rounds
    loss = base[2].mean() * base_too
    for weight, columns in zip(ROUND_WEIGHTS, drafts, strict=True):
        loss = loss + LOSS_WEIGHT * weight * columns[2].mean()
    loss.backward()
    squares = {
        name: sum(p.grad.square().sum().item() for p in part.parameters() if p.grad is not None)
        for name, part in model.parts()
    }
    norms = {f"grad_norm_{name}": square**0.5 for name, square in squares.items()}
    return {"grad_norm": sum(squares.values()) ** 0.5, **norms}


@pytest.fixture(scope="module")
def data(starter_dir, tmp_path_factory):
    """Two sources with answers of very different lengths."""
    folder = tmp_path_factory.mktemp("data")
    chats = [json.loads(line) for line in (starter_dir / "train.jsonl").open()][:60]
    for name, characters in (("long", 400), ("short", 25)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for chat in chats:
                chat["messages"][-1]["content"] = chat["messages"][-1]["content"][:characters]
                file.write(json.dumps(chat) + "\n")
    return folder


@pytest.fixture(scope="module")
def job(starter_dir, data, tmp_path_factory):
    """``job(replicas)``: a run on two ranks, made once: records, batches, weights, whole models, planned FLOPs."""
    model = Gemma4WithDrafter.from_pretrained(
        starter_dir / "base", starter_dir / "drafter", drafter_num_steps=K, drafter_loss_weight=LOSS_WEIGHT
    ).eval()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    @functools.cache
    def job(replicas: int) -> SimpleNamespace:
        output_dir = tmp_path_factory.mktemp("run")
        overrides = settings(starter_dir, data, output_dir, f"parallel.dp_replicate={replicas}")
        (ours, weights, flops), (theirs, _, _) = run_ranks(recorded_run, 2, overrides)
        weights = [start, *weights]
        records = {r["step"]: r for r in map(json.loads, (output_dir / "metrics.jsonl").open())}

        def at(step: int) -> Gemma4WithDrafter:
            """The whole model after a step."""
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(weights[step][name])
            return model

        def batches(what: str, step: int) -> list[dict[str, Tensor]]:
            """Of both ranks."""
            return [batch for kind, when, batch in ours + theirs if (kind, when) == (what, step)]

        return SimpleNamespace(records=records, batches=batches, at=at, weights=weights, flops=flops)

    return job


@pytest.fixture(scope="module")
def run(job):
    return job(1)


def assert_close(record: dict, expected: dict[str, float], prefix: str = "", rel: float = 1e-4) -> None:
    assert {name: record[prefix + name] for name in expected} == pytest.approx(expected, rel=rel, abs=1e-6)


@pytest.mark.parametrize(("replicas", "step"), [(1, 1), (1, 2), (2, 2)])
def test_a_steps_metrics_are_means_over_all_targets_of_all_ranks(job, replicas, step):
    run = job(replicas)
    model, record = run.at(step - 1), run.records[step]
    batches = run.batches("train", step - 1)
    assert len(batches) == 4
    found = tally(model, batches)
    assert_close(record, expected_losses(found))
    assert_close(record, gradient_norms(model, found, base_too=True), rel=1e-5)
    tokens = sum(int((batch["document_ids"] > 0).sum()) for batch in batches)
    assert record["tokens_per_second"] * record["seconds"] == pytest.approx(tokens)
    assert record["tokens_per_second_per_gpu"] * record["seconds"] == pytest.approx(tokens / 2)
    assert record["tflops_per_gpu"] * record["seconds"] == pytest.approx(run.flops / 1e12)
    assert 0 <= record["data_wait"] < record["seconds"]


@torch.no_grad()
@pytest.mark.parametrize("step", [0, STEPS])
def test_validation_metrics_are_means_over_all_ranks_too(run, step):
    batches = run.batches("val", step)
    assert len(batches) == 4
    assert_close(run.records[step], expected_losses(tally(run.at(step), batches)), prefix="val/")


@torch.no_grad()
@pytest.mark.parametrize("step", range(STEPS + 1))
def test_every_validation_measures_the_drafter_on_what_the_base_wrote_last(run, step):
    batches = run.batches("own", step)
    assert len(batches) == 2  # 3 prompts: two on one rank, one on the other
    found = tally(run.at(step), [batch | {"source": torch.zeros_like(batch["labels"])} for batch in batches])
    expected = {f"own_agreement_{k}": mean(found.rounds[1 + k][4]) for k in range(K)}
    assert_close(run.records[step], expected | {"own_accepted_length": 1 + mean(found.walked)}, prefix="val/")
    written = step if "val/tokens_per_forward" in run.records[step] else 0  # by the base as it was then
    assert written == (0 if step < STEPS else STEPS)
    model = run.at(written)
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            for p in labels.ge(0).nonzero()[:, 0].tolist():
                assert labels[p] == model.base(input_ids=ids[None, :p]).logits[0, -1].argmax()


def test_the_first_steps_are_as_long_as_the_warm_up_says(run):
    """AdamW's first step moves a weight whose gradient isn't tiny by the learning rate."""
    assert [run.records[step]["lr"] / LR for step in (1, 2)] == pytest.approx([1 / 3, 2 / 3])
    assert [run.records[step]["drafter_lr"] / DRAFTER_LR for step in (1, 2)] == pytest.approx([1 / 3, 2 / 3])
    for part, lr in (("base", LR), ("drafter", DRAFTER_LR)):
        moved = [
            (run.weights[1][name] - before).abs().max().item()
            for name, before in run.weights[0].items()
            if name.startswith(part) and name.endswith("norm.weight")
        ]
        assert max(moved) == pytest.approx(lr / 3, rel=1e-2)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_what_the_drafters_loss_does_to_the_base_and_how_far_it_has_moved(run, step):
    batches = run.batches("fixed", 0)
    assert len(batches) == 2
    with torch.no_grad():
        start = tally(run.at(0), batches, first=POSITIONS).log_probs.double()
    model, record = run.at(step), run.records[step]
    found = tally(model, batches, first=POSITIONS)
    norms = gradient_norms(model, found, base_too=False)
    assert record["grad_norm_base_from_drafter"] == pytest.approx(norms["grad_norm_base"], rel=1e-5)
    before, now = (
        torch.cat([w.flatten().double() for name, w in run.weights[at].items() if name.startswith("base.")])
        for at in (0, step)
    )
    assert record["base_drift"] == pytest.approx(((now - before).norm() / before.norm()).item(), rel=1e-4)
    kl = (start.exp() * (start - found.log_probs.double())).sum(-1)
    assert POSITIONS < len(kl) <= 2 * POSITIONS
    assert record["base_drift_kl"] == pytest.approx(mean(kl), rel=1e-3)


def test_utilisation_is_a_share_of_the_gpus_dense_bfloat16_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    found = utilisation(494.5e12, 98.9e12, torch.device("cuda"))
    assert found == pytest.approx({"tflops_per_gpu": 494.5, "hfu": 0.5, "mfu": 0.4})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Something new")
    assert utilisation(1e12, 0.0, torch.device("cuda")) == {"tflops_per_gpu": 1.0}


def test_the_documented_metrics_are_those_that_are_logged(run):
    logged = {name for record in run.records.values() for name in record}

    def pattern(template: str) -> str:
        return re.escape(template).replace(r"\{k\}", r"\d+").replace(r"\{source\}", "(long|short)")

    plain = [name for name in METRICS if name != "val/{metric}"]

    def meanings(name: str) -> list[str]:
        return [t for t in plain if re.fullmatch(pattern(t), name)]

    for name in logged:
        assert meanings(name.removeprefix("val/")) or meanings(name), f"{name} isn't documented"
    # Those that need a GPU whose peak is known, ordered embeddings, and model.adapters.
    assert {t for t in plain if not any(t in meanings(name) for name in logged)} == {
        "hfu", "mfu", "centroid_hit_{k}", "dense_{metric}", *(name for name in METRICS if "{adapter}" in name)
    }  # fmt: skip


def test_pace_is_that_of_the_steps_since_it_was_read():
    since = Since(torch.device("cpu"))
    for tokens, waited, seconds in ((10, 0.5, 2.0), (30, 0.0, 4.0)):
        since.add(torch.tensor(tokens), waited, seconds)
    assert since.read() == (20, 0.25, 3.0)
    since.add(torch.tensor(7), 1.0, 2.0)
    assert since.read() == (7, 1.0, 2.0)


def test_sources_that_are_not_there_are_told_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "init_distributed", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(trainer, "init_mesh", lambda *_: None)
    monkeypatch.setattr(trainer, "data_rank", lambda *_: (0, 1))
    cfg = load(["model.base=none", "model.drafter=none", f"data.train={tmp_path}/no.jsonl", f"output_dir={tmp_path}"])
    with pytest.raises(DataError, match="there is no file at .*/no.jsonl"):
        trainer.Trainer(cfg, Preemption(1))
    (tmp_path / "file").touch()
    cfg.output_dir = str(tmp_path / "file/run")
    with pytest.raises(WriteError, match="output_dir .*/file/run can't be written: .*/file isn't a folder"):
        trainer.Trainer(cfg, Preemption(1))
