"""The base's own text as validation: each answer on one rank, as many forwards on each, the same after a resume."""

import json
from types import SimpleNamespace

import pytest
import torch
from configs import compose
from pairs import build_pair
from test_evaluate import FakeTokenizer, pair, prompts

from joint_train import Gemma4WithDrafter
from joint_train.config import SourceConfig
from joint_train.evaluate import accepted_length, validation_prompts
from joint_train.evaluate.prompts import Prompt
from joint_train.pair.adapters import INPUT
from joint_train.train.own_text import OwnText

K = 2


def data(**changes):
    return compose({"data.max_length": 64, "data.micro_batch_size": 2} | changes).data


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_each_answer_is_on_one_rank_and_every_rank_has_as_many_forwards(ranks):
    asked = [Prompt([7] * (3 + i), "", "") for i in range(5)]
    answers = [[10 + i] * (2 + i) for i in range(5)]
    own = OwnText(asked, answers, data())
    of_ranks = [list(own.batches(rank, ranks)) for rank in range(ranks)]
    assert len({len(batches) for batches in of_ranks}) == 1
    found = []
    for batch in (batch for batches in of_ranks for batch in batches):
        assert batch["input_ids"].shape[0] <= 2
        for ids, labels, documents in zip(batch["input_ids"], batch["labels"], batch["document_ids"], strict=True):
            if (labels == -100).all():
                continue
            target, inside = labels != -100, documents > 0
            assert torch.equal(ids[target], labels[target]) and (ids[inside & ~target] == 7).all()
            assert inside.tolist() == sorted(inside.tolist(), reverse=True)
            found.append(ids[target].tolist())
    assert sorted(found) == answers


def test_what_cant_be_read_is_left_out(caplog):
    asked = [Prompt([7] * 3, "", ""), Prompt([7] * 60, "", ""), Prompt([7], "", "", inputs={"pixel_values": 0}),
             Prompt([7], "", "", adapter="b")]  # fmt: skip
    with caplog.at_level("INFO"):
        own = OwnText(asked, [[], [8] * 5, [8], [9]], data(), SimpleNamespace(names=["a", "b"]))
    assert "3 of 4 generated answers are left out" in caplog.text
    (batch,) = own.batches(0, 1)
    assert batch["input_ids"].tolist() == [[7, 9]] and batch[INPUT].tolist() == [[1, 1]]


def test_a_resumed_run_reads_the_same_text(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"w{i} " * (i + 2)}) + "\n" for i in range(4)))
    cfg = data()
    cfg.val = [SourceConfig(path=str(tmp_path / "a.jsonl"))]
    answers = [[5, 6], [7], [8, 9]]
    own = OwnText(validation_prompts(cfg, FakeTokenizer(), 3), answers, cfg)
    resumed = OwnText.saved(json.loads(json.dumps(own.answers)), cfg, FakeTokenizer(), None)
    for one, other in zip(own.batches(0, 1), resumed.batches(0, 1), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert OwnText.saved(None, cfg, FakeTokenizer(), None) is None
    assert OwnText.saved([[5]] * 9, cfg, FakeTokenizer(), None) is None  # there are only 4 prompts now


def test_where_it_was_just_written_the_accepted_length_is_the_decoded_one():
    base, drafter = pair("31b")
    with torch.no_grad():  # both say one of few tokens, and so now and then the same
        for model in (base, drafter):
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
            model.lm_head.weight[6:] *= 0.05
    asked = prompts(4)
    found = accepted_length(base, drafter, FakeTokenizer(), asked, K, 40, engine=True)
    assert found["tokens_per_forward"] > 1.1, found["tokens_per_forward"]
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=K).eval()

    def stats_of(batch):
        with torch.no_grad():
            return model(**batch).stats

    own = OwnText(asked, found["answers"], data())
    measured = own.measure(stats_of, lambda flat: None, 0, 1)
    # The last verifications of a text, with fewer drafts, are in the one and not in the other.
    assert measured["val/own_accepted_length"] == pytest.approx(found["tokens_per_forward"], abs=0.03)
    other = accepted_length(base, drafter, FakeTokenizer(), asked, K, 40)  # what transformers shows the drafter
    assert other["answers"] == found["answers"]
    assert abs(other["tokens_per_forward"] - measured["val/own_accepted_length"]) > 0.08


def test_a_pair_needs_no_own_text():
    base, drafter = build_pair("31b")
    assert OwnText([], [], data()).measure(lambda batch: None, lambda flat: None, 0, 1) == {}
