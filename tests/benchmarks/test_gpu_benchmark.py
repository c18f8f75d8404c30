"""benchmarks.gpu on CPU: its table, and that what it calls the loss and attention is that."""

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from benchmarks import compare, gpu
from benchmarks.joint_step import reference_step
from joint_train.distributed.mesh import init_distributed, init_mesh

CPU = torch.device("cpu")
LENGTH, ROUNDS, VOCABULARY, CENTROIDS, HIDDEN, DRAFTER_HIDDEN = 48, 3, 512, 16, 64, 32
BASE_LAYERS, DRAFTER_LAYERS = 10, 4


@pytest.fixture
def cfg(tmp_path):
    gpu.write_configs("E2B", tmp_path, small=True)
    recomputed = "activation_checkpointing.base=full", "activation_checkpointing.drafter=full"
    return gpu.configure(tmp_path, LENGTH, "data.packing=false", f"drafter.num_steps={ROUNDS}", *recomputed)


def test_the_table(tmp_path, capsys):
    arguments = ["--device", "cpu", "--small", "--pairs", "E2B", "--out", str(tmp_path)]
    assert gpu.main([*arguments, "--tflops", "0.01", "--hbm-gb-per-second", "10", "drafter.num_steps=2"]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "gpu.md").read_text()
    assert f"CPU; torch {torch.__version__}, transformers " in text and "no numbers to keep" in text
    assert [line.split(" | ")[3:5] for line in text.splitlines() if line.startswith("| E2B | 10 |")] == [
        ["1", "ours"], ["1", "reference"], ["4", "ours"]
    ]  # fmt: skip
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["documents"], row["step"]) for row in result["rows"]] == [
        ("1", "ours"), ("1", "reference"), ("4", "ours")
    ]  # fmt: skip
    assert all(old == new for _, _, old, new in compare.ratios(result, result))
    for one in result["measured"]:
        assert one["ours"]["ms"] > one["ours"]["loss"] > 0 and one["ours"]["ms"] > one["ours"]["attention"] > 0
        assert 0 < one["mfu"] and one["planned"] > 0
        of_parts = [one["bounds"][part] for part in ("loss", "attention")]
        for kind in ("compute", "memory"):
            assert 0 < sum(part[kind] for part in of_parts) < one["bounds"]["step"][kind]


def test_work_of_loss_and_attention_is_what_formulas_say(cfg):
    plan, parts = gpu.planned(cfg, torch.device("cuda"))  # whose products are all counted; nothing runs there
    targets = LENGTH - 1
    head = 6 * targets * VOCABULARY * (HIDDEN + ROUNDS * DRAFTER_HIDDEN)  # three products: logits, two gradients
    routing = 6 * targets * CENTROIDS * ROUNDS * DRAFTER_HIDDEN
    assert parts["loss"][0] == pytest.approx(head + routing, rel=0.02)  # sums over the vocabulary, too
    # Two products forward, two again in the recomputation, five in a fused kernel's backward; 4 heads of 16 or 32.
    sizes = 16 * 8 + 32 * 2 + ROUNDS * (16 * 3 + 32)
    assert parts["attention"][0] == 9 * 2 * LENGTH**2 * 4 * sizes
    assert sum(flops for flops, _ in parts.values()) < plan.flops


def test_every_attention_is_marked_forward_recomputed_and_backward(cfg):
    assert init_distributed(60) == CPU
    try:
        step = gpu.OurStep(cfg, CPU, init_mesh(cfg.parallel))
        ticks = iter(range(10**6))
        with gpu.parts(lambda: next(ticks)) as spans:
            loss = step.forward_backward()
    finally:
        torch.distributed.destroy_process_group()
    # Random weights say nothing about a token: log V from the base, and some distance of each round from it.
    assert math.log(VOCABULARY) < float(loss) < 1.3 * math.log(VOCABULARY)
    assert len(spans["attention"]) == 3 * (BASE_LAYERS + ROUNDS * DRAFTER_LAYERS) and len(spans["loss"]) == 1
    assert all(start < end for pairs in spans.values() for start, end in pairs)


def test_the_reference_has_our_loss(cfg, monkeypatch):
    """On one pair: what the two rows of the table compute is the same."""
    cfg.loss.centroid_weight = 0
    cfg.drafter.base_grad_scale = 1.0
    pair = gpu.build(cfg, CPU, None)
    pair.drafter.config.use_ordered_embeddings, pair.drafter.masked_embedding = False, None
    ids = gpu.rows(cfg, 1)[0]
    ours = pair(input_ids=ids, labels=ids)
    losses, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: (losses.append(self.detach()), backward(self)))
    reference_step(pair.base, pair.drafter, gpu.Namespace(
        rounds=ROUNDS, freeze_base=False, loss="kl", reference_recompute=False
    ))(ids, ids)  # fmt: skip
    assert F.l1_loss(losses[0], ours.loss.detach()) < 1e-4 * ours.loss.detach()


def stand_in_for_nemo(monkeypatch) -> list:
    """Modules with the names and the arguments of NeMo AutoModel's; it has a number of losses for each step."""
    calls: list = []

    class Composite(torch.nn.Module):
        def __init__(self, base, drafter, *, drafter_num_steps, base_activation_checkpointing):
            super().__init__()
            assert base_activation_checkpointing
            self.base, self.drafter, self.rounds = base, drafter, drafter_num_steps

        def forward(self, input_ids, position_ids):
            logits = self.base(input_ids=input_ids, position_ids=position_ids).logits
            drafted = [logits * (k + 2) for k in range(self.rounds)]
            return SimpleNamespace(logits=logits, drafter_logits=drafted, drafter_loss_weight=0.5)

    class MaskedCrossEntropy:
        def __call__(self, logits, labels, num_label_tokens):
            calls.append((labels, num_label_tokens))
            return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / num_label_tokens

    for name, contents in {
        "nemo_automodel.components.loss.masked_ce": {"MaskedCrossEntropy": MaskedCrossEntropy},
        "nemo_automodel.components.models.gemma4_drafter.composite": {"Gemma4WithDrafter": Composite},
    }.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), module := ModuleType(".".join(parts[:end])))
        vars(module).update(contents)
    monkeypatch.setattr(gpu, "find_spec", lambda name: name == "nemo_automodel")
    return calls


def test_nemo_is_measured_beside_ours_and_rows_are_written_as_they_come(tmp_path, capsys, monkeypatch):
    calls, kept, measure = stand_in_for_nemo(monkeypatch), [], gpu.measure

    def noted(*args):
        kept.append((tmp_path / "gpu.md").read_text() if (tmp_path / "gpu.md").exists() else "")
        return measure(*args)

    monkeypatch.setattr(gpu, "measure", noted)
    arguments = ["--device", "cpu", "--small", "--pairs", "E2B", "--out", str(tmp_path), "--skip-reference"]
    assert gpu.main([*arguments, "--lengths", "24", "40", "--documents", "1", "--against", "nemo"]) == 0
    assert "" == kept[0] and "| E2B | 10 | 24 | 1 | ours |" in kept[1] and "| 40 |" not in kept[1]
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| E2B | 10 |" in line]
    assert [(row[2], row[4]) for row in rows] == [
        ("24", "ours"), ("24", "NeMo AutoModel"), ("40", "ours"), ("40", "NeMo AutoModel")
    ]  # fmt: skip
    assert all(float(row[5]) > 0 and float(row[6]) > 0 for row in rows)
    labels, tokens = zip(*calls, strict=True)
    assert set(tokens) == {23, 39}
    # Base and first round predict the next token, each further round one later.
    assert [int((y != -100).sum()) for y in labels[:3]] == [23, 23, 22]


def test_without_nemo_it_says_so(capsys):
    assert gpu.main(["--device", "cpu", "--small", "--against", "nemo"]) == 2
    assert "pip install nemo-automodel" in capsys.readouterr().err
