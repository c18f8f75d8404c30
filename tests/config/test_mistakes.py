"""Mistakes on the command line and in a file of one's own: one sentence each, that names the key and the way out."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from joint_train.config import ConfigError, SourceConfig, checked_command_line, groups, help_text, keys, load
from joint_train.config.mistakes import ELSEWHERE, SOURCE_ELSEWHERE
from launch.submit import Options, plan_runs

PAIR = ["model.base=/a", "model.drafter=/b"]
DATA = ["data.train=[{path: x.jsonl}]"]
KEYS = {key for group in groups() for key, _, _ in keys(group)}


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        load([*PAIR, *words])
    message = str(error.value)
    assert "\n" not in message and "HYDRA" not in message and "reference_type" not in message, message
    assert len(message) < 400, message
    return message


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "optim.learning_rate=1e-4",
            "optim.learning_rate is not a key. Did you mean optim.lr? `--help optim` lists them.",
        ),
        ("+optim.learning_rate=1e-4", "optim.learning_rate is not a key. Did you mean optim.lr? `--help optim` lists"),
        ("++optim.wieght_decay=0", "Did you mean optim.weight_decay?"),
        ("optim={lrr: 1}", "optim.lrr is not a key. Did you mean optim.lr?"),
        ("num_train_epochs=3", "num_train_epochs is not a key. Did you mean epochs? `--help all` lists them."),
        ("datta.max_length=3", "Did you mean data.max_length?"),
        ("max_length=3", "Did you mean data.max_length?"),
        ("mdoel=gemma4_e4b", "mdoel is not a key. Did you mean model?"),
        ("zzz=1", "zzz is not a key. `--help all` lists them."),
        ("optim.name.x=3", "optim.name.x is not a key"),
        ("optim.lr=fast", "optim.lr=fast: a number is expected"),
        ("optim.lr=", "optim.lr=: a number is expected"),
        ("max_steps=1k", "max_steps=1k: a whole number is expected"),
        ("drafter.num_steps=1.5", "drafter.num_steps=1.5: a whole number is expected"),
        ("seed=null", "seed=null: a whole number is expected"),
        ("model.base=[a]", "model.base=[a]: a text is expected"),
        ("freeze.base=maybe", "freeze.base=maybe: true or false is expected"),
        ("optim=adamw", "optim=adamw: a group of keys (optim.…, see `--help optim`) is expected"),
        ("data.columns=3", "data.columns is not a key"),
        ("data.chat_template_kwargs=3", "data.chat_template_kwargs=3: a dictionary, e.g. {a: 1}, is expected"),
        ("optim.betas=0.9", "optim.betas=0.9: a list is expected"),
        ("data.train=[{file: x}]", "data.train[0].file is not a key. Did you mean path? Known here: path, name"),
        ("+data.val=[{path: x, wieght: 2}]", "data.val[0].wieght is not a key. Did you mean weight?"),
        ("data.train=[{path: x, weight: much}]", "weight: a number is expected"),
        ("data.train=3", "data.train=3: a list of sources, e.g. [{path: train.jsonl}], is expected"),
        ("data.train.0.path=x", "data.train[0]: a source, e.g. {path: train.jsonl}, is expected"),
        ("model=gemma4_e4", "Did you mean gemma4_e4b?"),
        ("model=models/e4b", "model= takes a prepared name (gemma4_12b_unified, "),
        ("+experiment=startr", "experiment=startr: there is no such prepared setting. Did you mean starter?"),
        ("experiment=starter", "a prepared setting that is added to the others begins with a +: +experiment=starter"),
        ("optim.lr=1 max_steps=3", "holds several settings in one word"),
        ("…", "'…' is not KEY=VALUE"),
        ("optim.lr", "'optim.lr' is not KEY=VALUE"),
        ("my.yaml", "A configuration file is given with --config: --config my.yaml"),
        ("--foo", "--foo is not an option of this command"),
        ("--optim.lr=1e-4", "a setting is written KEY=VALUE, without dashes: optim.lr=1e-4"),
        ("OPTIM.LR=1", "Did you mean optim.lr?"),
        ("optim.lr=inf", "optim.lr=inf: must be a finite number"),
        ("loss.temperature=nan", "loss.temperature=nan: must be a finite number"),
        ("optim.betas=[a,b]", "optim.betas[0]: a number is expected"),
        ("data.train=[{path:", "put all of it in single quotes, as in 'data.train=[{path: train.jsonl}]'"),
        ("data.train[0].path=x", "items of a list are written with dots: data.train.0.path=x"),
        ("+data.train.0.path=x", "+data.train.0.path: this key is there already: leave out the +"),
        ("data.train=[{path: x, limit: 0}]", "data.train[0].limit=0: must be at least 1"),
        ("data.train=https://a/b.jsonl", "must be a file, a folder, or the id of a dataset on the hub"),
        ("data.train=", "data.train[0].path=: must be a file"),
        ("output_dir=s3://a/b", "output_dir=s3://a/b: must be a folder"),
        ("output_dir=", "output_dir=: must be a folder"),
        ("resume=maybe", "resume=maybe: choose auto, never, or the folder of a checkpoint"),
        ("checkpoint.mirror=s3://", "checkpoint.mirror=s3:// names no bucket"),
        ("data=mine.jsonl", "For a file: data.train=mine.jsonl."),
        ("+recipe=gemma4_e4b", "gemma4_e4b_full_8gpu, …; `--help recipe` lists all."),
        ("+experiment=mine", "--config-dir DIR adds your own, DIR/experiment/NAME.yaml"),
        ("~optim.lr", "a key can't be taken away"),
        ("tracking.name=a(b", "tracking.name=a(b: Hydra can't read this value."),
        ("optim.lr=1e-4,3e-4", "optim.lr=1e-4,3e-4: one value is expected"),
        ("tracking.name=${oc.env:NO_SUCH_NAME}", "the environment variable NO_SUCH_NAME, which it reads, isn't set"),
    ],
)
def test_a_mistake_is_one_sentence(word, said):
    assert said in refusal(*(word,) if "data.train" in word and word[0] != "+" else (*DATA, word))


def test_keys_of_other_trainers_lead_to_keys_that_exist():
    assert set(ELSEWHERE.values()) <= KEYS
    assert set(SOURCE_ELSEWHERE.values()) <= {field.name for field in dataclasses.fields(SourceConfig)}
    for theirs, ours in ELSEWHERE.items():
        if theirs not in KEYS:
            assert f"Did you mean {ours}?" in refusal(*DATA, f"{theirs}=1"), theirs


@pytest.mark.parametrize(
    ("word", "paths"),
    [
        ("data.train=/a b/x.jsonl", ["/a b/x.jsonl"]),
        ('data.train="/a/it\'s.jsonl"', ["/a/it's.jsonl"]),
        ("data.train=[a.jsonl,'b,c.jsonl']", ["a.jsonl", "b,c.jsonl"]),
        ("data.train=x/*.jsonl", ["x/*.jsonl"]),
        ("data.train=${pair}/train.jsonl", ["/p/train.jsonl"]),
        ("data.train=[{path: a, weight: 2}]", ["a"]),
    ],
)
def test_a_file_alone_is_a_source(word, paths):
    cfg = load([*PAIR, "pair=/p", word])
    assert [source.path for source in cfg.data.train] == paths


def test_a_file_of_ones_own(tmp_path):
    """Over what is prepared, under the command line; groups by their names; a source by its file."""
    (mine := tmp_path / "it's mine.yaml").write_text(
        "model: gemma4_e4b\nmax_steps: 7\noptim: {lr: 3e-6, betas: [0.9, 0.95]}\n"
        "data:\n  train: /data/a.jsonl\n  val: [/data/b.jsonl, {path: c, limit: 3}]\n"
        "  chat_template_kwargs: {enable_thinking: true}\ntracking: {name: '${oc.env:HOME}'}\n"
    )
    (more := tmp_path / "more.yaml").write_text("max_steps: 9\nloss: {drafter: kl}\n")
    cfg = load(["--config", str(mine), f"--config={more}", "optim.lr=1e-6"])
    assert cfg.model.base == "google/gemma-4-E4B-it" and cfg.loss.drafter == "kl" and cfg.max_steps == 9
    assert cfg.optim.lr == 1e-6 and cfg.optim.betas == [0.9, 0.95]
    assert [source.path for source in cfg.data.train + cfg.data.val] == ["/data/a.jsonl", "/data/b.jsonl", "c"]
    assert cfg.data.val[1].limit == 3 and cfg.data.chat_template_kwargs == {"enable_thinking": True}
    [run] = plan_runs(Options(), ["--config", str(mine), f"output_dir={tmp_path}"], multirun=False)
    assert run.cfg.optim.lr == 3e-6 and any(str(mine) in word for word in run.overrides)


def test_a_folder_of_ones_own(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nmax_steps: 5\n")
    for words in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        assert load([*PAIR, *DATA, *words, "+experiment=mine"]).max_steps == 5
    mistakes = {
        "max_steps: 5\n": "experiment/mine.yaml: its keys are those of the whole configuration: begin it with the line",
        "# @package _global_\noptim: {lrr: 5}\n": "experiment/mine.yaml: optim.lrr is not a key. Did you mean optim",
        "# @package _global_\noptim: {lr: fast}\n": "experiment/mine.yaml: optim.lr=fast: a number is expected",
    }
    for text, said in mistakes.items():
        (tmp_path / "experiment" / "mine.yaml").write_text(text)
        assert said in refusal(*DATA, "--config-dir", str(tmp_path), "+experiment=mine")
    assert "Known here: mine, " in refusal(*DATA, "--config-dir", str(tmp_path), "+experiment=zz")
    for of in (load, checked_command_line):
        with pytest.raises(ConfigError, match="--config-dir /no/folder: there is no such folder"):
            of(["--config-dir", "/no/folder", "+experiment=mine"])


def test_hydras_options_stand_before_the_settings_and_sweeps_are_refused_before_it_speaks():
    words = checked_command_line(["optim.lr=1", "--config-dir", "/", "+experiment=mine", "--cfg=job", "-i"])
    assert words == ["--config-dir", "/", "--cfg=job", "-i", "optim.lr=1", "+experiment=mine"]
    for word in ("-m", "--multirun"):
        with pytest.raises(ConfigError, match="Start a command for each"):
            checked_command_line(["optim.lr=1,2", word])
    with pytest.raises(ConfigError, match="-x is not an option"):
        checked_command_line(["-x"])


def test_a_home_folder_is_found_wherever_it_stands(tmp_path, monkeypatch):
    """No shell expands a ~ after a =, nor one in a file."""
    monkeypatch.setenv("HOME", "/home/me")
    (mine := tmp_path / "mine.yaml").write_text("output_dir: ~/run\ndata: {val: [~/v.jsonl]}\n")
    cfg = load([*PAIR, "--config", str(mine), "data.train=~/a b.jsonl", "pair=~/pair", "model.base='~/base'"])
    assert (cfg.output_dir, cfg.pair, cfg.model.base) == ("/home/me/run", "/home/me/pair", "/home/me/base")
    assert [source.path for source in cfg.data.train + cfg.data.val] == ["/home/me/a b.jsonl", "/home/me/v.jsonl"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim: {lrr: 1}\n", "optim.lrr is not a key. Did you mean optim.lr?"),
        ("learning_rate: 1\n", "learning_rate is not a key. Did you mean optim.lr?"),
        ("data: {train: [{file: x}]}\n", "data.train[0].file is not a key. Did you mean path?"),
        ("- a\n", "keys with values are expected"),
        ("a: [\n", "this is not YAML: line 2: "),
        ("optim:\n\tlr: 1\n", "(indent with spaces, not with tabs)"),
        ("max_steps: 1\nmax_steps: 2\n", "line 2: found duplicate key max_steps"),
        ("x: &a [*a]\n", "this is not YAML: maximum recursion"),
        ("optim.lr: 1\n", "optim.lr: a file has groups in place of dots: `optim: {lr: …}`"),
        ("defaults: [{recipe: gemma4_e4b_lora_1gpu}]\n", "write `recipe: gemma4_e4b_lora_1gpu` without the list"),
        ("optim: {lr: [1e-4, 3e-4]}\n", "optim.lr=[0.0001, 0.0003]: a number is expected"),
        (None, "No such file or directory"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, said):
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load([*PAIR, *DATA, "--config", str(file)])
    message = str(error.value)
    assert said in message and "\n" not in message and (f"--config {file}: " in message or "--config: " in message)


def test_numbers_and_empty_groups_of_a_file(tmp_path):
    """1e-1 is a number also where any value may stand; a group whose keys are all commented out is as it was."""
    (mine := tmp_path / "mine.yaml").write_text("loss: {drafter: {ce: 1e-1, nla: 0.9}}\noptim:\n")
    assert load([*PAIR, *DATA, "--config", str(mine)]).loss.drafter == {"ce": 0.1, "nla": 0.9}


def test_help_of_a_key_and_of_a_source():
    assert help_text(["optim.lr"]).strip() == "optim.lr (default: 1e-05): peak learning rate of the base"
    shown = help_text(["data.train"])
    assert all(f"  {field.name} " in shown for field in dataclasses.fields(SourceConfig))
    assert "model.export.at_end" in help_text(["model.export"])
    assert "\n+recipe=gemma4_e4b_full_8gpu" in help_text(["recipe"])
    with pytest.raises(ConfigError, match="There is no group or key optim.lrr. Did you mean optim.lr?"):
        help_text(["optim.lrr"])


def test_the_main_job_says_it_once_and_shortly(tmp_path):
    """As users start it: exit code 2, at most six lines, no advice of Hydra's; and it reads a file of one's own."""

    def job(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "joint_train", *words]
        env = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    for word, said in (("optim.learning_rate=1", "Did you mean optim.lr?"), ("optim.lr=fast", "a number is expected")):
        done = job(word)
        assert done.returncode == 2 and said in done.stderr and done.stderr.startswith("joint_train: ")
        assert len((done.stdout + done.stderr).splitlines()) == 1
    (tmp_path / "mine.yaml").write_text("max_steps: 7\n")
    done = job("--config", "mine.yaml", "--cfg", "job")
    assert done.returncode == 0 and "max_steps: 7\n" in done.stdout
    assert job("--version").stdout.startswith("joint-train ")
