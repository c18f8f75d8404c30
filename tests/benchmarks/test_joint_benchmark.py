"""benchmarks.joint: its measurement against decoding itself, its counting, and two arms from end to end."""

import json
import shutil
import xml.etree.ElementTree

import pytest
import torch
from pairs import build_pair
from safetensors.torch import load_file
from transformers import AutoTokenizer, Gemma4AssistantForCausalLM

from benchmarks import joint, results, runs
from benchmarks.greedy import compared, greedy_texts, variety, verifications, walk
from joint_train.config import load
from joint_train.errors import ConfigError
from joint_train.evaluate.decoding import decode
from joint_train.evaluate.prompts import load_prompts
from joint_train.pair.model import JointModel
from joint_train.train import trainer


def test_a_walk_by_hand():
    # Text from position 2 on: 5 6 7 8 9 3. Row t guesses the tokens from t + 2 on.
    tokens = [0, 1, 5, 6, 7, 8, 9, 3]
    drafts = [[0, 0]] * 8
    drafts[1] = [6, 0]  # one right: settles 6 and the base's 7
    drafts[3] = [8, 9]  # both right: settles 8, 9 and the base's 3
    assert list(walk(drafts, tokens, 2)) == [2, 3]
    assert list(walk([[0, 0]] * 8, tokens, 2)) == [1] * 5
    assert list(walk(drafts, tokens[:7], 2)) == [2, 2]  # where the text ends at 9, only 8 could be drafted
    assert list(walk(drafts, tokens[:3], 2)) == []


def test_losses_and_divergences_are_those_of_each_row():
    base = build_pair("e2b")[0].eval()
    torch.manual_seed(1)
    other = build_pair("e2b")[0].eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    rows = [([5, 9, 11, 40, 3], [False, False, True, True, True]), ([7, 8, 20], [False, True, True])]
    found = compared(other, base, rows, batch=2)
    for i, (tokens, targets) in enumerate(rows):
        with torch.no_grad():
            p, r = (m(input_ids=torch.tensor([tokens])).logits[0].double().softmax(-1) for m in (other, base))
        positions = [j for j, target in enumerate(targets) if target]
        loss = -sum(p[j - 1, tokens[j]].log() for j in positions)
        kl = sum((r[j - 1] * (r[j - 1] / p[j - 1]).log()).sum() for j in positions)
        entropy = -sum((p[j - 1] * p[j - 1].log()).sum() for j in positions)
        got = [found[name][i] for name in ("loss", "kl", "entropy", "targets")]
        assert got == pytest.approx([loss.item(), kl.item(), entropy.item(), len(positions)], rel=1e-4, abs=1e-5)
    assert sum(found["kl"]) > 1e-4


def test_variety_by_hand():
    found = variety([[1, 2, 1, 2, 1, 2], [1, 2, 3]])
    assert found["distinct_2"] == 3 / 7  # 12 21 12 21 12, 12 23
    assert found["distinct_3"] == 3 / 5  # 121 212 121 212, 123
    assert found["repeated_4"] == pytest.approx(1 / 3)  # 1212 2121 1212


ARGUMENTS = ["--seeds", "0", "--steps", "2", "--start-steps", "3", "--prompts", "8", "--max-new-tokens", "20"]
ARGUMENTS += ["--arms", "stale", "sequential", "--set", "data.num_workers=0"]


@pytest.fixture(scope="module")
def made(starter_dir, tmp_path_factory):
    """A folder in which two arms have run, their training in this process."""
    folder = tmp_path_factory.mktemp("joint")
    shutil.copytree(starter_dir, folder / "seed_0" / "pair")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "run_module", in_this_process)
        assert joint.main([str(folder), *ARGUMENTS]) == 0
    return folder


def in_this_process(module: str, *overrides: str, **_) -> None:
    if module == "joint_train":
        trainer.run(load([*overrides, "data.num_workers=0"]))


def test_two_arms_end_to_end(made):
    arms = {row["arm"]: row for row in json.loads((made / "joint.json").read_text())["rows"]}
    assert arms["stale"]["drafter_steps"] == 0 and arms["sequential"]["drafter_steps"] == 2
    assert arms["stale"]["base_loss"] == arms["sequential"]["base_loss"]  # one base
    assert arms["sequential"]["flops_of_sequential"] == 1 > arms["stale"]["flops_of_sequential"]
    assert xml.etree.ElementTree.parse(made / "joint.svg").getroot().tag.endswith("svg")


def test_nothing_finished_is_run_again_and_settings_stay(made, monkeypatch, capsys):
    def refuse(module, *overrides, **_):
        assert module == "joint_train.starter"  # which looks for itself

    monkeypatch.setattr(runs, "run_module", refuse)
    assert joint.main([str(made), *ARGUMENTS]) == 0
    assert capsys.readouterr().out == results.table(results.read(made / "joint.json")) + "\n"
    assert joint.main([str(made), *ARGUMENTS, "--steps", "3"]) == 2
    assert "other settings" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="other settings"):
        runs.train(made / "seed_0" / "start", made / "seed_0" / "pair", "seed=1")


def test_the_base_that_counts_as_trained_alone_is_it(made, monkeypatch):
    monkeypatch.setattr(runs, "run_module", in_this_process)
    run = made / "seed_0" / "runs" / "drafter.base_grad_scale_0_optim.clip_separate_2"
    settings = json.loads((run / runs.DONE).read_text())
    runs.train(made / "alone", made / "seed_0" / "pair", *settings, "drafter.loss_weight=0", "optim.clip=joint")
    alone, trained, before = (
        load_file(folder / "export" / "base" / "model.safetensors")
        for folder in (made / "alone", run, made / "seed_0" / "start")
    )
    assert all(torch.equal(alone[name], trained[name]) for name in alone)
    assert not all(torch.equal(before[name], trained[name]) for name in before)


@torch.no_grad()
def test_the_walk_over_finished_texts_is_what_decoding_does(made):
    export = made / "seed_0" / "start" / "export"
    base = joint.load_base(export / "base")
    drafter = Gemma4AssistantForCausalLM.from_pretrained(export / "drafter", dtype=torch.float32).eval()
    for model in (base, drafter):  # both say one of three tokens, so that they agree now and then
        table = model.get_input_embeddings().weight
        kept = table[300:303] * 5
        table *= 0.01
        table[300:303] = kept
    prompts = [
        p.ids for p in load_prompts(str(made / "code" / "val.jsonl"), AutoTokenizer.from_pretrained(export / "base"), 8)
    ]
    texts = greedy_texts(base, prompts, 24, batch=5)
    found = verifications(JointModel(base, drafter, drafter_num_steps=3).eval(), prompts, texts, batch=4)
    for prompt, text, settled in zip(prompts, texts, found, strict=True):
        decoded = decode(base, drafter, prompt, 3, 24, engine=True)
        assert (decoded.ids, decoded.settled) == (text, settled)
    assert 1 <= min(map(min, found)) < max(map(max, found)) == 4  # drafts are accepted, and drafts are not


def test_flops_without_a_drafter(starter_dir):
    separate, frozen = ("optim.clip=separate", "drafter.base_grad_scale=0"), ("freeze.base=true",)
    four, five = (joint.planned_flops(starter_dir, (*separate, f"drafter.num_steps={k}")) for k in (4, 5))
    assert joint.without_drafter(starter_dir, separate) == pytest.approx(5 * four - 4 * five)
    # A base that is trained has a forward and a backward of twice its work; a frozen one the forward.
    base_alone, forward = (joint.without_drafter(starter_dir, stage) for stage in (separate, frozen))
    assert base_alone == pytest.approx(3 * forward, rel=0.05)
