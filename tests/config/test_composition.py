"""What a command line, an experiment or a saved configuration says arrives in the dataclasses, as a run composes."""

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import pytest
from checkpoint_run import build_stand_in
from configs import compose, literal

import joint_train.__main__ as main_job
from joint_train.checkpoint import Checkpointer
from joint_train.config import (
    Config,
    ConfigError,
    FreezeConfig,
    LossConfig,
    config_to_save,
    group_of,
    load,
    read,
    select,
    to_yaml,
    with_overrides,
)
from joint_train.config.schema import RENAMED
from joint_train.data.readers import sources_of
from joint_train.train.tracking import Tracker

PAIR = ["model.base=base", "model.drafter=drafter", "data.train=[{path: unused}]", "tracking.wandb=disabled"]


def dictionaries(of: type = Config, prefix: str = "") -> Iterator[tuple[str, type]]:
    """The keys whose type is a dictionary and the type of its values; those of a source as ``data.train[].columns``."""
    for field in dataclasses.fields(of):
        if dataclasses.is_dataclass(field.type):
            yield from dictionaries(field.type, f"{prefix}{field.name}.")
        elif get_origin(field.type) is list and dataclasses.is_dataclass(item := get_args(field.type)[0]):
            yield from dictionaries(item, f"{prefix}{field.name}[].")
        elif get_origin(field.type) is dict:
            yield f"{prefix}{field.name}", get_args(field.type)[1]


DICTIONARIES = dict(dictionaries())


@pytest.fixture
def run_job(monkeypatch):
    """The main job's own ``hydra.main`` on these arguments, up to the configuration that it would train with."""

    def run(*overrides: str) -> Config:
        found: list[Config] = []
        monkeypatch.setattr(main_job, "run", lambda cfg: found.append(cfg))
        monkeypatch.setattr(sys, "argv", ["joint_train", *PAIR, *overrides])
        main_job.main()
        return found[0]

    handlers, level = logging.root.handlers[:], logging.root.level
    yield run
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def test_the_documented_dictionaries_are_known():
    assert set(DICTIONARIES) == {
        "model.text_config", "data.chat_template_kwargs", "data.train[].columns", "data.train[].chat_template_kwargs",
        "data.val[].columns", "data.val[].chat_template_kwargs",
    }  # fmt: skip


@pytest.mark.parametrize("form", ["", "+", "++", "a dictionary"])
def test_every_dictionary_takes_any_key_from_a_command_line(run_job, form):
    values = {key: "question" if of is str else True for key, of in DICTIONARIES.items()}
    whole = form == "a dictionary"
    overrides = []
    for group in ("data.train", "data.val"):  # the keys of a source stand in it, or are added to one that is there
        inside = {key.partition("[].")[2]: value for key, value in values.items() if key.startswith(f"{group}[]")}
        source = {"path": "F"} | ({name: {"user_key": value} for name, value in inside.items()} if whole else {})
        overrides.append(f"{group}={literal([source])}")
        overrides += [] if whole else [f"{form or '+'}{group}.0.{name}.user_key={x}" for name, x in inside.items()]
    for key, value in values.items():
        if "[]" not in key:
            overrides.append(f"{key}={literal({'user_key': value})}" if whole else f"{form}{key}.user_key={value}")
    cfg = run_job(*overrides)
    for key, value in values.items():
        group, _, name = key.partition("[].")
        found = getattr(select(cfg, group)[0], name) if name else select(cfg, key)
        assert found == {"user_key": value} and type(found) is dict, key


def test_an_experiment_file_may_set_them_all(run_job, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "model: {text_config: {num_hidden_layers: 3}}\n"
        "data:\n"
        "  chat_template_kwargs: {enable_thinking: true, style: short}\n"
        "  train:\n"
        "    - {path: a, columns: {prompt: question}, chat_template_kwargs: {style: long}}\n"
        "    - {path: b}\n"
    )
    arguments = ["+experiment=mine", f"hydra.searchpath=[{tmp_path}]", "data.chat_template_kwargs.more=1"]
    argv = [argument for argument in PAIR if not argument.startswith("data.train")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "PAIR", argv)
        cfg = run_job(*arguments)
    assert cfg.model.text_config == {"num_hidden_layers": 3}
    first, second = sources_of(cfg.data, "train")
    assert first.columns == {"prompt": "question"} and second.columns == {}
    assert first.chat_template_kwargs == {"enable_thinking": True, "style": "long", "more": 1}
    assert second.chat_template_kwargs == {"enable_thinking": True, "style": "short", "more": 1}


# What is refused


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+optim.lrr=1", "optim.lrr is not a key. Did you mean optim.lr?"),
        ("+peft.r=1", "peft.r is not a key. Did you mean lora.r?"),
        ("+data.train.0.wieght=2", r"data.train\[0\].wieght is not a key"),
        ("data.train=[{weight: 2}]", r"data.train\[0\].path is not set"),
        ("optim.lr=???", "optim.lr is not set"),
        ("optim.lr=${oc.env:NO_SUCH_VARIABLE}", "optim.lr: .*NO_SUCH_VARIABLE"),
        ("optim.lr=${optim.name}", "optim.lr: .*adamw"),
    ],
)
def test_what_cannot_be_typed_is_refused_by_its_key(override, said):
    with pytest.raises(ConfigError, match=said):
        load([*PAIR, override])


def test_a_pair_that_is_not_set_is_empty_where_nothing_needs_it():
    assert load(check=False).model.base == ""
    with pytest.raises(ConfigError, match="model.base is not set"):
        load(PAIR[2:])


def test_a_pair_in_one_folder_is_named_once():
    cfg = load(["pair=/pairs/one", "data.train=x"])
    assert (cfg.model.base, cfg.model.drafter) == ("/pairs/one/base", "/pairs/one/drafter")
    cfg = load(["pair=/pairs/one", "model.drafter=d", "data.train=x"])
    assert (cfg.model.base, cfg.model.drafter) == ("/pairs/one/base", "d")


def test_a_group_may_be_a_dictionary():
    assert group_of(LossConfig, {"drafter": "kl"}) == LossConfig(drafter="kl")
    assert group_of(FreezeConfig, None) == FreezeConfig()
    with pytest.raises(ConfigError, match="towerz"):
        group_of(FreezeConfig, {"towerz": True})
    with pytest.raises(ConfigError, match="towers: .*7x"):
        group_of(FreezeConfig, {"towers": "7x"})


def test_overrides_of_a_typed_configuration():
    cfg = compose()
    changed = with_overrides(cfg, {"optim.lr": 0.5, "seed": 7})
    assert (changed.optim.lr, changed.seed, cfg.optim.lr, cfg.seed) == (0.5, 7, Config().optim.lr, 0)
    assert config_to_save(changed)["optim"]["lr"] == 0.5
    cfg = compose({"tracking.name": "${model.base}", "tracking.project": "${model.base}"})
    cfg.tracking.name = "mine"
    assert (
        config_to_save(cfg)["tracking"]["name"] == "mine"
        and config_to_save(cfg)["tracking"]["project"] == "${model.base}"
    )
    with pytest.raises(AttributeError, match="lrr"):
        with_overrides(cfg, {"optim.lrr": 1})


# Earlier names of keys


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_the_earlier_name_of_a_key_is_taken_and_reported_once(run_job, capfd, plus):
    cfg = run_job(f"{plus}checkpoint.async=true")
    assert cfg.checkpoint.background is True and "async" not in config_to_save(cfg)["checkpoint"]
    assert capfd.readouterr().err.count("set checkpoint.background instead") == 1
    assert run_job("checkpoint.background=true").checkpoint.background is True
    assert "checkpoint.background instead" not in capfd.readouterr().err
    with pytest.raises(ConfigError, match="checkpoint.background.*sometimes"):
        load([*PAIR, "checkpoint.async=sometimes"])


def test_the_earlier_name_in_files(run_job, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "old.yaml").write_text("# @package _global_\ncheckpoint: {async: true}\n")
    assert run_job("+experiment=old", f"hydra.searchpath=[{tmp_path}]").checkpoint.background is True
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(compose({"optim.lr": 0.25})).replace("background: false", "async: true"))
    cfg = read(file)
    assert cfg.checkpoint.background is True and cfg.optim.lr == 0.25


def test_every_renamed_key_has_its_new_one():
    for new in RENAMED.values():
        select(Config(), new)


def test_a_configuration_of_another_version_is_read(tmp_path, caplog):
    file = tmp_path / "config.yaml"
    file.write_text("optim: {lr: 0.25, momentum: 1}\nnew_group: {key: 1}\nmodel: {base: b, drafter: d}\n")
    cfg = read(file)
    assert cfg.optim.lr == 0.25 and cfg.lora.r == 0 and cfg.model.base == "b"
    assert "ignored: new_group, optim.momentum" in caplog.text


# What is written to disk

TOKEN = "hf_secret"
SECRET = {"tracking.name": "${oc.env:HF_TOKEN}", "pair": "/pairs/one", "model.base": "${pair}/base"}


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return load([*PAIR, *(f"{key}={value}" for key, value in SECRET.items())])


def test_interpolations_are_resolved_for_the_run_and_not_on_disk(secret, tmp_path, monkeypatch, caplog):
    assert secret.tracking.name == TOKEN and secret.model.base == "/pairs/one/base"
    cfg = with_output(secret, tmp_path / "run")
    Tracker(cfg, 0).close()
    Checkpointer(cfg.output_dir, cfg.checkpoint).save(1, *build_stand_in(), {}, config=cfg, block=True)
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]
    saved = json.loads((tmp_path / "run/checkpoints/step_00000001/config.json").read_text())
    assert saved["tracking"]["name"] == "${oc.env:HF_TOKEN}" and saved["model"]["base"] == "${pair}/base"
    assert read(tmp_path / "run/config.yaml") == cfg
    monkeypatch.delenv("HF_TOKEN")  # another machine, where an export needs the folders alone
    elsewhere = read(tmp_path / "run/config.yaml")
    assert elsewhere.model.base == "/pairs/one/base" and elsewhere.tracking.name is None
    assert "tracking.name can't be resolved here" in caplog.text


def test_wandb_gets_no_resolved_interpolation(secret, tmp_path, monkeypatch):
    from joint_train.train import tracking

    given: dict[str, Any] = {}
    monkeypatch.setattr(tracking, "Wandb", lambda cfg, folder, config, step: given.update(config))
    secret.tracking.wandb = "offline"
    Tracker(with_output(secret, tmp_path / "run"), 0)
    assert TOKEN not in json.dumps(given) and given["tracking"]["name"] == "${oc.env:HF_TOKEN}"


def test_a_resume_compares_what_interpolations_stand_for(secret, tmp_path, monkeypatch, caplog):
    cfg = with_output(secret, tmp_path)
    checkpointer = Checkpointer(tmp_path, cfg.checkpoint)
    checkpointer.save(1, *build_stand_in(), {}, config=cfg, block=True)

    def said(config: Config | dict) -> list[str]:
        caplog.clear()
        checkpointer.resume("auto", *build_stand_in(), config=config)
        lines = [line for line in caplog.messages if "configuration changed" in line]
        return [line.partition("step_00000001: ")[2] for line in lines]

    assert said(cfg) == []
    whole = dataclasses.asdict(cfg)  # as earlier versions wrote it, resolved
    assert said(whole) == []
    assert said(load([*PAIR, *(f"{key}={value}" for key, value in SECRET.items()), "optim.lr=0.5"])) == [
        "optim.lr was 1e-05 and is now 0.5"
    ]
    moved = {**SECRET, "pair": "/pairs/two"}
    assert said(load([*PAIR, *(f"{key}={value}" for key, value in moved.items())])) == [
        "model.base was ${pair}/base and is now ${pair}/base",
        "pair was /pairs/one and is now /pairs/two",
    ]
    checkpointer.close()


def with_output(cfg: Config, folder) -> Config:
    """The same composition, written to another folder."""
    cfg.output_dir = str(folder)
    return cfg
