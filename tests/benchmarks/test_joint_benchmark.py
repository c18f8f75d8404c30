"""benchmarks.joint: its measurement against decoding itself, its counting, and arms from end to end."""

import argparse
import json
import shutil
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import build_pair
from safetensors.torch import load_file
from transformers import AutoTokenizer, Gemma4AssistantForCausalLM

from benchmarks import joint, results, runs
from benchmarks.greedy import compared, expected_lengths, greedy_texts, variety, verifications, walk
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


def test_expected_lengths_are_those_of_each_row():
    pair = JointModel(*build_pair("26b_a4b"), drafter_num_steps=2).eval()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length, first in ((9, 4), (7, 1), (5, 4)):  # the last has no row with targets for both rounds
        tokens = torch.randint(3, 200, (length,), generator=generator).tolist()
        rows.append((tokens, [False] * first + [True] * (length - first)))
    rows[1][1][4] = False  # a gap
    found = expected_lengths(pair, rows, batch=2)
    for i, (tokens, targets) in enumerate(rows):
        with torch.no_grad():
            out = pair(torch.tensor([tokens]), return_logits=True)
        p, q = out.logits[0].double().softmax(-1), [x[0].double().softmax(-1) for x in out.drafter_logits]
        lengths = []
        for t in range(len(tokens) - 3):
            if targets[t + 1] and targets[t + 2] and targets[t + 3]:
                first, second = (torch.minimum(p[t + 1 + k], q[k][t]).sum().item() for k in (0, 1))
                lengths.append(1 + first + first * second)
        assert found["rows"][i] == len(lengths)
        assert found["lengths"][i] == pytest.approx(sum(lengths), rel=1e-4)
    assert found["rows"] == [3, 1, 0]


def test_an_interval_says_what_start_pairs_differ_by():
    def ratio(a, b):
        return a / b

    rng = np.random.default_rng(1)
    ones = np.ones(400)

    def units(means, noise=0.0):
        return [[[m + noise * rng.standard_normal(400), ones]] for m in means]

    same = joint.hierarchical(units([2.0] * 5), ratio)
    assert same["low"] == same["value"] == same["high"] == pytest.approx(2)
    apart = joint.hierarchical(units([1.0, 2.0, 3.0, 4.0, 5.0], noise=0.1), ratio)
    # The mean of five draws with replacement: its standard deviation is sqrt(2 / 5).
    assert apart["value"] == pytest.approx(3, abs=0.02)
    assert (apart["high"] - apart["low"]) / 2 == pytest.approx(1.96 * (2 / 5) ** 0.5, rel=0.1)
    prompts = joint.hierarchical(units([2.0] * 5, noise=1.0), ratio)
    # The prompts are the same for all, but their noise here is each start pair's own.
    assert 0.5 < (prompts["high"] - prompts["low"]) / 2 / (1.96 / 400**0.5 / 5**0.5) < 2
    orders = [[[m * ones, ones] for m in (1.0, 3.0)] for _ in range(4)]
    width = joint.hierarchical(orders, ratio)
    assert (width["high"] - width["low"]) / 2 == pytest.approx(1.96 * (1 / 8) ** 0.5, rel=0.15)
    assert joint.hierarchical(units([2.0], noise=1.0), ratio)["low"] is None


ARGUMENTS = ["--starts", "0", "--steps", "20", "--start-steps", "3", "--prompts", "8", "--decoded", "4"]
ARGUMENTS += ["--max-new-tokens", "20", "--ratio-of", "toy", "--setting", "mild"]
ARGUMENTS += ["--arms", "stale", "sequential", "joint 0", "--set", "data.num_workers=0", "optim.warmup_steps=1"]


@pytest.fixture(scope="module")
def made(starter_dir, tmp_path_factory):
    """A folder in which three arms have run, their training in this process."""
    folder = tmp_path_factory.mktemp("joint")
    shutil.copytree(starter_dir, folder / "start_0" / "pair")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "run_module", in_this_process)
        assert joint.main([str(folder), *ARGUMENTS]) == 0
    return folder


def in_this_process(module: str, *overrides: str, **_) -> None:
    if module == "joint_train":
        trainer.run(load([*overrides, "data.num_workers=0"]))


def test_arms_end_to_end(made):
    result = json.loads((made / "joint.json").read_text())
    arms = {row["arm"]: row for row in result["rows"]}
    assert result["ratio_of"] == "toy" and result["setting"] == "mild"
    assert arms["stale"]["cost"] < arms["sequential"]["cost"] == 1 == pytest.approx(arms["joint 0"]["cost"], abs=0.15)
    assert len({row["base_loss"] for row in arms.values()}) == 1  # one base
    assert arms["sequential"]["gain"] == {"value": 0, "low": None, "high": None}
    assert len({row["expected_length"]["value"] for row in arms.values()}) == 3
    assert xml.etree.ElementTree.parse(made / "joint.svg").getroot().tag.endswith("svg")
    runs_made = {folder.name for folder in (made / "start_0" / "order_0" / "runs").iterdir()}
    assert len(runs_made) == 2  # stale and sequential take the base of the joint run
    for name in runs_made:
        steps = (made / "start_0" / "order_0" / "runs" / name / "metrics.jsonl").read_text().splitlines()
        rates = [json.loads(line).get("lr") for line in steps]
        trained = sum(rate is not None and rate > 0 for rate in rates)
        assert trained == (0 if "alone" in name else 5)  # a quarter of 20


def test_nothing_finished_is_run_again_and_settings_stay(made, monkeypatch, capsys):
    def refuse(module, *overrides, **_):
        assert module == "joint_train.starter"  # which looks for itself

    monkeypatch.setattr(runs, "run_module", refuse)
    assert joint.main([str(made), *ARGUMENTS]) == 0
    assert capsys.readouterr().out == results.table(results.read(made / "joint.json")) + "\n"
    assert joint.main([str(made), *ARGUMENTS, "--steps", "24"]) == 2
    assert "other settings" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="other settings"):
        runs.train(made / "start_0" / "start", made / "start_0" / "pair", "seed=1")


def test_the_base_that_counts_as_trained_alone_is_it(made, monkeypatch):
    """Also where it was frozen for the last steps of its run."""
    monkeypatch.setattr(runs, "run_module", in_this_process)
    (run,) = (made / "start_0" / "order_0" / "runs").glob("drafter.base_grad_scale_0*")
    settings = [one for one in json.loads((run / runs.DONE).read_text()) if not one.startswith("freeze.base_after")]
    assert len(settings) < len(json.loads((run / runs.DONE).read_text()))
    runs.train(made / "alone", made / "start_0" / "pair", *settings, "drafter.loss_weight=0", "max_steps=5")
    alone, trained, before = (
        load_file(folder / "export" / "base" / "model.safetensors")
        for folder in (made / "alone", run, made / "start_0" / "start")
    )
    assert all(torch.equal(alone[name], trained[name]) for name in alone)
    assert not all(torch.equal(before[name], trained[name]) for name in before)


def test_each_release_of_an_arm_goes_on_from_the_one_before(tmp_path, monkeypatch):
    """Three shifts in a row, on runs that only write down what they start from."""
    trained = []

    def note(folder, pair, *overrides, timeout):
        given = dict(one.split("=", 1) for one in overrides)
        trained.append((folder.name, Path(given.get("model.base", "")), Path(given.get("model.drafter", ""))))
        return folder

    monkeypatch.setattr(joint, "train", note)
    monkeypatch.setattr(joint, "starter_pair", lambda folder, seed: folder)
    monkeypatch.setattr(joint, "domain_data", lambda folder, release: folder / str(release))
    options = argparse.Namespace(work_dir=tmp_path, start_steps=3, timeout=1, setting="continual", steps=10, set=[])
    start = joint.Start(options, 0, 1)
    start.costs = joint.Costs(base=3.0, drafter=1.0, joint=3.2)
    own, trained[:] = start.start, []
    releases = start.run(joint.BASE_ONLY)
    names = [name for name, _, _ in trained]
    assert [base for _, base, _ in trained] == [own / "base", *(base for base, _, _ in releases[:2])]
    assert [drafter for _, _, drafter in trained] == [own / "drafter", *(d for _, d, _ in releases[:2])]
    assert [cost for _, _, cost in releases] == pytest.approx([1, 1, 1]) and names[0].endswith("_0_18")
    trained.clear()
    sequential = start.run(joint.ARMS["sequential"])
    assert [base for base, _, _ in sequential] == [base for base, _, _ in releases]
    alone = [(base, drafter) for name, base, drafter in trained if name.startswith("alone")]
    assert [base for base, _ in alone] == [base for base, _, _ in releases]
    assert [drafter for _, drafter in alone] == [own / "drafter", *(d for _, d, _ in sequential[:2])]


@pytest.mark.parametrize("release", range(len(joint.DOMAINS)))
def test_every_domain_has_enough_to_learn_and_to_hold_out(made, release):
    folder = joint.domain_data(made / "data", release)
    counts = [len((folder / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "val")]
    assert counts[0] >= 500 and counts[1] == 200


@torch.no_grad()
def test_the_walk_over_finished_texts_is_what_decoding_does(made):
    export = made / "start_0" / "start" / "export"
    base = joint.load_base(export / "base")
    drafter = Gemma4AssistantForCausalLM.from_pretrained(export / "drafter", dtype=torch.float32).eval()
    for model in (base, drafter):  # both say one of three tokens, so that they agree now and then
        table = model.get_input_embeddings().weight
        kept = table[300:303] * 5
        table *= 0.01
        table[300:303] = kept
    prompts = [
        p.ids
        for p in load_prompts(
            str(made / "data" / "functions" / "val.jsonl"), AutoTokenizer.from_pretrained(export / "base"), 8
        )
    ]
    texts = greedy_texts(base, prompts, 24, batch=5)
    found = verifications(JointModel(base, drafter, drafter_num_steps=3).eval(), prompts, texts, batch=4)
    for prompt, text, settled in zip(prompts, texts, found, strict=True):
        decoded = decode(base, drafter, prompt, 3, 24, engine=True)
        assert (decoded.ids, decoded.settled) == (text, settled)
    assert 1 <= min(map(min, found)) < max(map(max, found)) == 4  # drafts are accepted, and drafts are not


def test_costs_are_those_of_steps_with_as_many_targets(starter_dir):
    found, fewer = (joint.costs("toy", starter_dir, share) for share in (1.0, 0.25))
    # A base that is trained has a forward and a backward of twice its work; the drafter's step has the forward as well.
    assert found.base < found.joint < found.base + found.drafter
    assert (found.base + found.drafter - found.joint) == pytest.approx(found.base / 3, rel=0.05)
    for name in ("base", "drafter", "joint"):
        assert getattr(fewer, name) < 0.9 * getattr(found, name)
    assert found.of(0, 1, 1) == 1
    assert found.of(300, 0, found.steps_alone(300)) == pytest.approx(300, abs=1)
