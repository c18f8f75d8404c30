"""The main job as a whole: resuming, what it leaves behind, and what it refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

import joint_train.__main__ as main_job
from joint_train.config import Config, conf_dir, load
from joint_train.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "data.max_length=48",
    "data.micro_batch_size=1",
    "data.num_workers=0",
    "optim.grad_accum=2",
    "optim.warmup_steps=2",
    "drafter.num_steps=2",
    "eval.every=0",
    "eval.batches=1",
    "eval.prompts=0",
    "tracking.wandb=disabled",
]


def settings(pair: Path, output_dir: Path, *more: str) -> list[str]:
    return ["+experiment=starter", f"pair={pair}", f"output_dir={output_dir}", *SMALL, *more]


def train(rank: int, overrides: list[str], die_after: int | None = None) -> None:
    """The job on one rank; with ``die_after``, the process is gone without a word after that step."""
    from joint_train.train import trainer

    if die_after is not None:
        step = trainer.Trainer.train_step

        def dying(self, batches):
            if self.step == die_after:
                os._exit(9)
            return step(self, batches)

        trainer.Trainer.train_step = dying
    trainer.run(load(overrides))


def records(output_dir: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines), "a step is recorded twice"
    return {line["step"]: line for line in lines}


def comparable(record: dict) -> dict:
    of_the_machine = ("time", "tokens_per_second", "seconds", "data_wait", "memory", "tflops", "hfu", "mfu")
    return {name: x for name, x in record.items() if not name.startswith(of_the_machine)}


@pytest.fixture(scope="module")
def uninterrupted(starter_dir, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run")
    run_ranks(train, 2, settings(starter_dir, output_dir, "max_steps=8", "checkpoint.every=3"))
    return output_dir


@pytest.mark.parametrize("die_after", [2, 7])
def test_a_killed_run_resumes_bit_for_bit(starter_dir, uninterrupted, tmp_path, die_after):
    overrides = settings(starter_dir, tmp_path, "max_steps=8", "checkpoint.every=3")
    with pytest.raises(AssertionError, match="it died|Connection|closed"):
        run_ranks(train, 2, overrides, die_after)
    run_ranks(train, 2, overrides)
    whole, resumed = records(uninterrupted), records(tmp_path)
    assert resumed.keys() == whole.keys()
    for step in whole:
        assert comparable(resumed[step]) == comparable(whole[step]), f"step {step}"


def test_a_run_that_stops_on_purpose_goes_on_bit_for_bit(starter_dir, uninterrupted, tmp_path):
    overrides = settings(starter_dir, tmp_path, "max_steps=8", "checkpoint.every=3")
    run_ranks(train, 2, [*overrides, "stop_after=4"])
    assert records(tmp_path).keys() == set(range(5)) and (tmp_path / "export/drafter/config.json").exists()
    assert any(name.startswith("val/") for name in records(tmp_path)[4]), "its last step is validated"
    run_ranks(train, 2, overrides)
    whole, resumed = records(uninterrupted), records(tmp_path)
    assert resumed.keys() == whole.keys()
    for step in whole:
        found = comparable(resumed[step])
        expected = {name: found.get(name) for name in comparable(whole[step])}
        assert expected == comparable(whole[step]), f"step {step}"


def test_a_generation_is_due_whether_or_not_a_validation_is(starter_dir, tmp_path):
    more = ["max_steps=2", "eval.generate_every=1", "eval.prompts=1", "eval.max_new_tokens=2"]  # and eval.every=0
    run_ranks(train, 1, settings(starter_dir, tmp_path, *more))
    assert "val/tokens_per_forward" in records(tmp_path)[1]


def test_files_on_disk(uninterrupted):
    names = {path.name for path in (uninterrupted / "checkpoints").iterdir()}
    assert names == {"step_00000003", "step_00000006", "step_00000008"}
    for name in names:
        checkpoint = uninterrupted / "checkpoints" / name
        for part in ("base/model", "drafter/model", "optimizer"):
            assert any((checkpoint / part).glob("*.distcp")), part
        assert (checkpoint / "COMPLETE").exists()
    assert (uninterrupted / "config.yaml").exists() and (uninterrupted / "metrics.jsonl").exists()
    assert records(uninterrupted).keys() == set(range(9))


def test_a_finished_run_has_nothing_left_to_do(starter_dir, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_text()
    run_ranks(train, 2, settings(starter_dir, uninterrupted, "max_steps=8", "checkpoint.every=3"))
    assert (uninterrupted / "metrics.jsonl").read_text() == before


def test_the_export_is_the_trained_pair(uninterrupted):
    """Plain ``from_pretrained``, the checkpoint's weights, and greedy text that drafting doesn't change."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from joint_train import Gemma4WithDrafter

    base_dir, drafter_dir = (uninterrupted / "export" / part for part in ("base", "drafter"))
    trained = Gemma4WithDrafter.from_pretrained(base_dir, drafter_dir, drafter_num_steps=2)
    trained.load_pretrained(uninterrupted / "checkpoints" / "step_00000008")
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    drafter = AutoModelForCausalLM.from_pretrained(drafter_dir)
    for ours, exported in ((trained.base, base), (trained.drafter, drafter)):
        assert exported.dtype == torch.bfloat16
        for (name, a), b in zip(ours.named_parameters(), exported.parameters(), strict=True):
            assert torch.equal(a.bfloat16(), b), name
    assert base.lm_head.weight is base.get_input_embeddings().weight
    assert drafter.lm_head.weight is drafter.get_input_embeddings().weight

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    chat = [{"role": "user", "content": "What does `os.path.join` do?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        logits = Gemma4WithDrafter(base.bfloat16().float(), drafter.float())(input_ids=prompt["input_ids"]).logits
        reference = Gemma4WithDrafter.from_pretrained(base_dir, drafter_dir)(input_ids=prompt["input_ids"]).logits
    # float() leaves the embedding's scale at its bfloat16 value.
    torch.testing.assert_close(logits, reference, rtol=2e-2, atol=2e-2)
    options = {"max_new_tokens": 24, "do_sample": False}
    plain = base.generate(**prompt, **options)
    assert drafter.generation_config.num_assistant_tokens == 2
    assisted = base.generate(**prompt, **options, assistant_model=drafter)
    assert torch.equal(plain, assisted)


def job(*overrides: str, ranks: int = 0, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    """The command line: plain Python, or torchrun with so many ranks."""
    command = [sys.executable, "-m", "joint_train"]
    if ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "joint_train"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | env
    return subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)


REFUSALS = [
    ("parallel.pp=2", "parallel.pp=2 is not supported: the drafter reads the keys and values"),
    ("parallel.cp=2", "parallel.cp=2 is not supported: the drafter's rows attend"),
    ("parallel.tp=2", "parallel.tp=2 is not supported"),
    ("model.dtype=float16", "model.dtype=float16: the drafter is released"),
    ("parallel.dp_shard=3", "parallel: dp_replicate x dp_shard = 1 x 3 = 3 doesn't fit 1 rank."),
    ("drafter.pairing=eagle", "drafter.pairing=eagle: choose one of serving, same_token"),
    ("drafter.num_steps=0", "drafter.num_steps=0: must be at least 1"),
    ("optim.lrr=1", "optim.lrr"),
    ("optim.lr=fast", "optim.lr"),
    ("+peft.r=8", "peft.r is not a key. Did you mean lora.r?"),
    ("loss.drafter=mse", "loss.drafter"),
    ("loss.round_weights=[1,2]", "loss.round_weights"),
    ("profile.steps=ten", "profile.steps=ten"),
    ("model.base=/nowhere", "/nowhere"),
]


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=-1e-4", "optim.drafter_lr=nan", "optim.weight_decay=-1", "optim.eps=-1", "optim.min_lr_ratio=3",
        "optim.betas=[0.9]", "optim.betas=[0.9,1.5]", "loss.temperature=0", "loss.teacher_grad=-1", "data.max_length=1",
        "data.micro_batch_size=0", "data.max_line_bytes=0", "eval.max_new_tokens=0", "tracking.diagnose_every=-1",
        "checkpoint.keep_every=-1", "profile.steps=499-501",
    ],
)  # fmt: skip
def test_numbers_that_cannot_work_are_refused(override):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^{key}(=| is ).*(must be|give two numbers|ends at)"):
        load(["+experiment=starter", "pair=/nowhere", override])


@pytest.mark.parametrize("override, message", REFUSALS, ids=[override for override, _ in REFUSALS])
def test_refusals(override, message, tmp_path):
    """Named, explained, and gone within seconds: nothing was loaded and nothing was written."""
    started = time.monotonic()
    run = job("+experiment=starter", "pair=/nowhere", f"output_dir={tmp_path / 'run'}", override)
    assert run.returncode == 2
    assert message in run.stderr + run.stdout
    assert "Traceback" not in run.stderr or "HYDRA_FULL_ERROR" in run.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert time.monotonic() - started < 120


def test_an_error_leaves_no_process_behind(starter_dir, tmp_path):
    """Of a line that can't be read, in a loader's process: file and line, and the process is gone with the run."""
    (tmp_path / "bad.jsonl").write_text('{"messages": [}\n' * 4)
    overrides = settings(
        starter_dir, tmp_path / "run", f"data.train=[{{path: {tmp_path}/bad.jsonl}}]", "data.num_workers=2"
    )
    command = [sys.executable, "-m", "joint_train", *overrides]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    assert f"{tmp_path}/bad.jsonl:1: malformed JSON" in run.communicate(timeout=120)[1]
    assert run.returncode == 2
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)


def test_a_refusal_under_torchrun_is_said_once():
    run = job("+experiment=starter", "pair=/nowhere", "parallel.dp_replicate=3", ranks=2)
    assert run.returncode != 0
    lines = (run.stderr + run.stdout).splitlines()
    # Once by the job, and in torchrun's report, which is the end of the log.
    own, report = (line for line in lines if "dp_replicate = 3 doesn't divide 2 ranks" in line)
    assert own.startswith("joint_train: parallel: ") and report.split(":")[0].strip() == "traceback"


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.train=[{path: /nowhere.jsonl}]", "no file at /nowhere.jsonl"),
        ("resume=/nowhere", "/nowhere is not a folder; a checkpoint is"),
        ("output_dir=/proc/nowhere", "output_dir /proc/nowhere can't be written: No such file or directory"),
        ("+model.text_config={num_hidden_layers: 2}", "model.text_config={'num_hidden_layers': 2} doesn't fit"),
        ("drafter.share_embedding_with_base=true", "Set drafter.share_embedding_with_base=false"),
    ],
)
def test_what_is_found_while_loading_is_said_in_a_sentence(starter_dir, tmp_path, override, message):
    run = job(*settings(starter_dir, tmp_path, override))
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("joint_train: ") and message in run.stderr
    assert "Traceback" not in run.stderr


def test_a_refusal_of_another_rank_waits_for_rank_0_and_is_said_in_the_end(monkeypatch):
    """torchrun ends all ranks when the first one ends: rank 1 must not be it, unless rank 0 has nothing to say."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    for rank in (0, 1):
        with pytest.raises(SystemExit) as end:
            main_job.refuse(ConfigError("max_steps=0: must be at least 1"), rank)
        assert end.value.code == ["", "[rank 1] "][rank] + "joint_train: max_steps=0: must be at least 1"
    assert len(waited) == 1 and 10 <= waited[0] <= 60


def test_help_and_composed_configuration_from_any_folder(tmp_path):
    run = job("--help", cwd=tmp_path)
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and len(lines) <= 40 and max(map(len, lines)) <= 120  # a screen
    for group in dataclasses.fields(Config):
        assert dataclasses.is_dataclass(group.type) == any(line.startswith(f"  {group.name} ") for line in lines)
    run = job("--help", "all", cwd=tmp_path)
    assert run.returncode == 0 and all(
        line in run.stdout
        for line in ("\n\nrun: ", "\n  pair ", "\n  drafter.num_steps ", "\n  checkpoint.background ")
    )
    run = job("--help", "loss", "nonsense", cwd=tmp_path)
    assert run.returncode == 2 and "There is no group or key nonsense. Groups: model, drafter," in run.stderr
    run = job("--cfg", "job", "+experiment=starter", "pair=/somewhere", cwd=tmp_path)
    assert run.returncode == 0 and "num_steps: 4" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_every_key_has_a_meaning():
    def check(schema, prefix=""):
        for field in dataclasses.fields(schema):
            assert field.metadata.get("help"), prefix + field.name
            if dataclasses.is_dataclass(field.type):
                check(field.type, f"{prefix}{field.name}.")

    check(Config)


def test_configuration_files_hold_only_known_keys():
    for experiment in (conf_dir() / "experiment").glob("*.yaml"):
        needed = ["model.base=b", "model.drafter=d", "data.train=[{path: p}]"] * (experiment.stem == "retune_drafter")
        load([f"+experiment={experiment.stem}", "pair=/somewhere", *needed])
    for group in ("model", "data"):
        for file in (conf_dir() / group).glob("*.yaml"):
            given = ["model.base=b", "model.drafter=d", "data.train=[{path: p}]", "pair=/somewhere"]
            load([f"{group}={file.stem}", *given])
