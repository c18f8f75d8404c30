"""``python -m joint_train.retune``: what it starts, what it writes, and on the starter pair all of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import load_base, make_adapter
from transformers import AutoTokenizer

from joint_train import loop, retune
from joint_train.config import load, to_yaml
from joint_train.evaluate.against import compare
from joint_train.weights.released import CONFIGS


def evaluation(better: int) -> dict:
    from joint_train.evaluate.intervals import interval

    settled, share = [30 + 10 * better, 31 + 9 * better], {"value": 0.5, "low": None, "high": None}
    found = interval([settled, [20, 20]], lambda s, v: s / v, 0)
    sums = {"settled": settled, "verifications": [20, 20], "tokens": settled, "seconds": [1.0, 1.0]}
    sums |= {"first_accepted": [10, 10], "first_drafted": [20, 20], "accepted": [20, 20], "drafted": [80, 80]}
    row = {"num_steps": 4, "tokens_per_forward": found, "speedup": found, "acceptance": [{"share": share}]}
    plain = {"of_prompts": {"tokens": settled, "seconds": [2.0, 2.0]}}
    return {"speculative": [row | {"of_prompts": sums}], "plain": plain, "prompts": {"name": "held_out", "count": 2}}


@pytest.fixture
def commands(monkeypatch):
    """The commands that would be started. The main job's leave a run behind, the evaluation's an evaluation."""
    started = []

    def run(command, may_say_no=False):
        started.append(command)
        words = command[command.index("-m") + 1 :]
        if words[0] == "joint_train":
            cfg = load(words[1:])  # as the job composes it
            out = retune.Path(cfg.output_dir)
            (out / "export/drafter").mkdir(parents=True)
            (out / "export/drafter/config.json").write_text("{}")
            (out / "config.yaml").write_text(to_yaml(cfg))
        elif words[0] == "joint_train.evaluate":
            out = retune.Path(words[words.index("--out") + 1])
            out.mkdir(parents=True)
            found, other = evaluation(1), evaluation(0)
            if "--against" in words:
                rows = compare(found, other, 0)
                found["against"] = {"drafter": "x", "rows": rows, "speculative": other["speculative"]}
            (out / "evaluation.json").write_text(json.dumps(found))
        return 0

    monkeypatch.setattr(retune, "run", run)
    return started


@pytest.fixture(scope="module")
def adapter(starter_dir, tmp_path_factory):
    return make_adapter(starter_dir / "base", tmp_path_factory.mktemp("lora") / "it's an adapter")


def test_it_regenerates_trains_and_compares(commands, adapter, starter_dir, tmp_path, capsys):
    out, drafter = tmp_path / "out", str(starter_dir / "drafter")
    words = [str(adapter), "--drafter", drafter, "--data", str(starter_dir / "val.jsonl"), "--out", str(out)]
    assert retune.main([*words, "--regenerate", "--nproc-per-node", "1", "data.max_length=96"]) == 0
    first, second, job, measured = commands
    for command, part in ((first, "train"), (second, "held_out")):
        assert command[1:5] == ["-m", "joint_train.data", "regenerate", f"{out}/data/{part}.answers.jsonl"]
        cfg = load([word for word in command[7:]], check=False)
        assert cfg.model.adapter == str(adapter) and cfg.model.base == str(starter_dir / "base")
        assert [source.path for source in cfg.data.train] == [f"{out}/data/{part}.jsonl"] and cfg.data.max_length == 96
    cfg = load(job[3:])
    assert cfg.freeze.base and cfg.data.train_on == "last_assistant" and cfg.data.mixture == "epoch"
    assert cfg.model.adapter == str(adapter) and cfg.model.drafter == drafter and cfg.output_dir == str(out)
    assert [cfg.data.train[0].path, cfg.data.val[0].path] == [first[4], second[4]]
    assert measured[3:5] == [f"{out}/export/base", f"{out}/export/drafter"]
    assert measured[measured.index("--against") + 1] == drafter and "--write-card" in measured
    found = json.loads((out / "retune.json").read_text())["results"]
    assert [found[name]["tokens_per_forward"]["value"] for name in ("stale", "tuned")] == [61 / 40, 2.0]
    said, page = capsys.readouterr().out, (out / "retune.html").read_text()
    for text in (said, page):
        assert "the drafter as it was" in text and "1.5" in text and "2.00 [2.00, 2.00]" in text
        assert "difference" in text and "[+0.45, +0.50]" in text  # of the same prompts
    # The split: each example once, by its text alone.
    parts = [(out / f"data/{part}.jsonl").read_text().splitlines() for part in ("train", "held_out")]
    whole = (starter_dir / "val.jsonl").read_text().splitlines()
    assert len(parts[1]) == 64 and sorted(parts[0] + parts[1]) == sorted(whole)
    # Other data in the same folder, whose answers are there already.
    assert retune.main([*words, "--held-out", "10"]) == 2
    assert "was made from other data, or with another --held-out" in capsys.readouterr().err


def test_what_it_begins_with(adapter, starter_dir, tmp_path, capsys):
    def pair(*words):
        return retune.pair_overrides(retune.parser().parse_args([*words, "--data", "x"]))

    name = next(name for name in CONFIGS if name.endswith("E4B-it"))
    assert pair(name, str(adapter)) == [
        f"model.base='{name}'", f"model.drafter='{name}-assistant'", f"model.adapter={retune.quoted(adapter)}",
    ]  # fmt: skip
    assert retune.main([str(adapter), "--data", str(starter_dir / "val.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "--drafter is not set, and" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert retune.main([str(adapter), str(adapter), "--data", "x", "--drafter", "y"]) == 2
    assert "is an adapter itself: give the base" in capsys.readouterr().err
    few = tmp_path / "few.jsonl"
    few.write_text((starter_dir / "val.jsonl").read_text().splitlines()[0] + "\n")
    words = ["--drafter", str(starter_dir / "drafter"), "--out", str(tmp_path / "out")]
    assert retune.main([str(adapter), "--data", str(few), *words]) == 2
    assert "--held-out=64 of 1 different examples" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        retune.main([str(adapter), "--data", str(few), "--datta=3"])


@pytest.mark.parametrize("command, least", [(retune, ["BASE"]), (loop, ["--steps", "2"])])
def test_overrides_may_stand_anywhere(command, least, tmp_path, capsys):
    file = tmp_path / "lr=1.jsonl"
    file.write_text("")
    args, overrides = retune.split_command_line(
        command.parser(),
        [*least, "max_steps=9", "--data", "a.jsonl", str(file), "optim.lr=1", "data.val=[{path: b}]", "--out", "o"],
    )
    assert args.data == ["a.jsonl", str(file)] and args.out == Path("o")
    assert sorted(overrides) == ["data.val=[{path: b}]", "max_steps=9", "optim.lr=1"]
    for words, said in (
        (["--data", "optim.lr=1"], "--data names no file before optim.lr=1"),
        (["--data", "a", "--dat=b", "x"], "x"),
    ):
        with pytest.raises(SystemExit):
            retune.split_command_line(command.parser(), [*least, *words])
        assert said in capsys.readouterr().err


def test_a_command_that_fails_ends_it(capfd):
    with pytest.raises(retune.CommandFailed, match="joint_train.export ended with 2; what it printed says why"):
        retune.run([sys.executable, "-m", "joint_train.export", "nowhere", "out"])
    assert "nowhere isn't a complete checkpoint" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_starter_pair_with_an_adapter_trained_by_peft(starter_dir, tmp_path):
    """A pair is trained on docstrings; peft teaches its base one answer to everything; and the drafter is retuned
    on what the base now says."""
    import peft

    job = [sys.executable, "-m", "joint_train", "+experiment=starter", f"pair={starter_dir}", "tracking.wandb=disabled"]
    short = ["eval.prompts=0", "eval.every=0", "eval.batches=4"]
    subprocess.run([*job, f"output_dir={tmp_path}/pair", "max_steps=40", *short], check=True, timeout=900)
    base, drafter = tmp_path / "pair/export/base", tmp_path / "pair/export/drafter"

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in (starter_dir / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["messages"][1]["content"] = "It is a name of the standard library, and does what it says."
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:160]))
    torch.manual_seed(0)
    layers = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(load_base(base), peft.LoraConfig(r=16, lora_alpha=32, target_modules=layers)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    for step in range(40):
        batch = [
            tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows[8 * step : 8 * step + 8]
        ]
        batch = tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=128)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "lora")
    tokenizer.save_pretrained(tmp_path / "lora")

    out = tmp_path / "retuned"
    words = [str(tmp_path / "lora"), "--drafter", str(drafter), "--data", str(data), "--out", str(out)]
    words += [
        "--regenerate",
        "--max-new-tokens",
        "48",
        "--held-out",
        "16",
        "--eval-tokens",
        "48",
        "--nproc-per-node",
        "2",
    ]
    words += ["optim.drafter_lr=8e-3", "max_steps=40", "data.max_length=96", "tracking.wandb=disabled", *short]
    assert retune.main([*words, "checkpoint.every=1000", "data.micro_batch_size=4"]) == 0
    found = json.loads((out / "retune.json").read_text())["results"]
    stale, tuned = (found[name]["tokens_per_forward"]["value"] for name in ("stale", "tuned"))
    print(f"tokens per base forward: stale {stale:.2f}, tuned {tuned:.2f}")
    assert tuned > stale + 0.2
    merged = load_base(out / "export/base").state_dict()
    wanted = peft.PeftModel.from_pretrained(load_base(base), tmp_path / "lora").merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], value.bfloat16().float()) for name, value in wanted.items())
    shutil.rmtree(tmp_path)
