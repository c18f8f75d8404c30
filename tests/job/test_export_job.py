"""What is exported is what was trained: the run's tokenizer, template, end tokens and card in both folders."""

import json
import re
import shutil

import pytest
import yaml
from ranks import run_ranks

from joint_train import starter
from joint_train.config import load
from joint_train.export import main as export

SMALL = [
    "max_steps=1", "data.max_length=48", "data.num_workers=0", "drafter.num_steps=2", "eval.every=0", "eval.batches=1",
    "eval.prompts=1", "eval.max_new_tokens=2", "tracking.wandb=disabled", "optim.warmup_steps=0",
]  # fmt: skip
CHAT = [{"role": "user", "content": "What does `os` do?"}, {"role": "assistant", "content": "It is a module."}]


def train(rank: int, overrides: list[str], log: str) -> None:
    import logging

    from joint_train.train import trainer

    logging.basicConfig(level=logging.INFO, filename=log, format="%(message)s", force=True)
    trainer.run(load(overrides))


def without_template(pair, folder):
    """The starter pair, its base without a template and with an end token that ends no turn."""
    shutil.copytree(pair, folder)
    (folder / "base/chat_template.jinja").unlink()
    shutil.rmtree(folder / "drafter")
    shutil.copytree(pair / "drafter", folder / "drafter", ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    for part in ("base", "drafter"):
        for name in ("generation_config.json", "config.json"):
            file = folder / part / name
            values = json.loads(file.read_text())
            if "eos_token_id" in values:
                file.write_text(json.dumps(values | {"eos_token_id": 1}))
    (folder / "base/README.md").write_text("---\nlicense: apache-2.0\n---\nAnother model.\n")
    return folder


@pytest.fixture(scope="module")
def run(starter_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("export_job")
    pair = without_template(starter_dir, root / "pair")
    tokenizer = shutil.copytree(
        starter_dir / "base", root / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors")
    )
    (tokenizer / "preprocessor_config.json").write_text('{"image_processor_type": "none"}')
    template = tokenizer / "chat_template.jinja"
    template.write_text(template.read_text() + "{# of this run #}")
    overrides = ["+experiment=starter", f"pair={pair}", f"data.tokenizer={tokenizer}", f"output_dir={root}/run"]
    run_ranks(train, 1, [*overrides, *SMALL, f"data.cache_dir={root}/cache"], str(root / "log"))
    return root


def tokens(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, return_dict=True)["input_ids"]


def test_both_folders_have_what_the_run_was_trained_with(run):
    wanted, log = tokens(run / "tokenizer"), (run / "log").read_text()
    for part in ("base", "drafter"):
        folder = run / "run/export" / part
        assert tokens(folder) == wanted
        assert (folder / "chat_template.jinja").read_text().endswith("{# of this run #}")
        assert (folder / "preprocessor_config.json").read_text() == '{"image_processor_type": "none"}'
        ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        ids = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        turn = next(token["id"] for token in ids if token["content"] == starter.TURN_END)
        assert ends == [1, turn]
    assert json.loads((run / "run/export/base/config.json").read_text())["eos_token_id"] == [1, turn]
    assert f"chat template are those of the run, from {run}/tokenizer; those of {run}/pair/base differ" in log
    assert f"tokenizer and chat template are those of the run, from {run}/tokenizer; {run}/pair/drafter has none" in log
    assert f"generation also ends with {starter.TURN_END}, as answers did in training" in log
    assert "preprocessor_config.json are those of the run" in log


def test_each_folder_has_a_model_card(run):
    for part in ("base", "drafter"):
        card = (run / "run/export" / part / "README.md").read_text()
        metadata = yaml.safe_load(card.split("---\n")[1])
        assert metadata["library_name"] == "transformers" and "base_model" not in metadata
        assert metadata.get("license") == ("apache-2.0" if part == "base" else None)  # that of the source
        for words in (
            "`base`, a folder", "| optimizer steps | 1 |", "| train | docstrings | train.jsonl |  | 1 | all |",
            "| base loss | ", "| tokens per base forward | ", "| `drafter.num_steps` | `2` |", "| transformers | 5.",
            "vllm serve base", '"model": "drafter"', "assistant_model=drafter",
        ):  # fmt: skip
            assert words in card, words
        assert str(run) not in card and "Another model" not in card
    before, after = card.split("| base loss | ")[1].split("\n")[0].rstrip(" |").split(" | ")
    records = [json.loads(line) for line in (run / "run/metrics.jsonl").read_text().splitlines()]
    found = [f"{record['val/base_loss']:.4g}" for record in records if "val/base_loss" in record]
    assert [before, after] == [found[0], found[-1]]


def test_a_checkpoints_export_is_the_runs(run, tmp_path, capsys):
    step = run / "run/checkpoints/step_00000001"
    assert export([str(step), str(tmp_path / "out"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "a conversation has the tokens of training" in said and said.count("loaded with transformers") == 2
    for part in ("base", "drafter"):
        ours, theirs = tmp_path / "out" / part, run / "run/export" / part
        names = sorted(path.name for path in theirs.iterdir())
        assert sorted(path.name for path in ours.iterdir()) == names
        assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)
    # Without the tokenizer of the run nothing is exported; another one may be named.
    (run / "tokenizer").rename(run / "moved")
    try:
        assert export([str(step), str(tmp_path / "other")]) == 2
        assert "Give the run's tokenizer with --tokenizer" in capsys.readouterr().err
        assert export([str(step), str(tmp_path / "other"), "--tokenizer", str(run / "moved")]) == 0
        assert tokens(tmp_path / "other/base") == tokens(run / "moved")
    finally:
        (run / "moved").rename(run / "tokenizer")


def test_only_an_older_export_is_replaced(run, tmp_path, capsys):
    step = run / "run/checkpoints/step_00000001"
    (tmp_path / "mine/base").mkdir(parents=True)
    (tmp_path / "mine/base/thesis.txt").write_text("")
    (tmp_path / "file").mkdir()
    (tmp_path / "file/base").write_text("")
    for out, said in (
        (step, "is the checkpoint, or lies in it"),
        (step / "export", "is the checkpoint, or lies in it"),
        (tmp_path / "mine", "base is there, and no export wrote it"),
        (tmp_path / "file", "base is there, and no export wrote it"),
    ):
        assert export([str(step), str(out)]) == 2
        assert re.search(said, capsys.readouterr().err)
    assert (tmp_path / "mine/base/thesis.txt").exists() and (step / "base/model/.metadata").exists()
    out = tmp_path / "out"
    assert export([str(step), str(out)]) == 0
    (out / "base").rename(tmp_path / "elsewhere")
    for _ in range(2):  # the link goes, what it led to stays
        shutil.rmtree(out / "base", ignore_errors=True)
        (out / "base").symlink_to(tmp_path / "elsewhere")
        assert export([str(step), str(out)]) == 0
        assert not (out / "base").is_symlink() and not list(out.glob(".*"))
    assert (tmp_path / "elsewhere/model.safetensors").exists()


def test_verify_compares_tokens_ends_and_loading(run, tmp_path, capsys, monkeypatch):
    from joint_train.weights import run_files

    step = run / "run/checkpoints/step_00000001"
    with monkeypatch.context() as patch:  # as it was: the source's files, whatever the run was trained with
        patch.setattr(run_files, "_write_tokenizer", lambda *args: None)
        patch.setattr(run_files, "_write_end_tokens", lambda *args: None)
        assert export([str(step), str(tmp_path / "out"), "--verify"]) == 1
    said = capsys.readouterr().err
    assert "base: there is no chat template" in said and "drafter: there is no tokenizer" in said
    assert f"base: generation doesn't end with {starter.TURN_END}" in said
    config = run / "run/export/drafter/config.json"
    whole = config.read_text()
    values = json.loads(whole)
    values["text_config"]["intermediate_size"] += 1
    try:
        config.write_text(json.dumps(values))
        assert export([str(run / "run/export"), "--verify"]) == 1
        assert "drafter isn't what transformers expects" in capsys.readouterr().err
    finally:
        config.write_text(whole)


def test_a_second_run_begins_from_the_firsts_export(run, tmp_path, caplog):
    pair = run / "run/export"
    overrides = ["+experiment=starter", f"pair={pair}", f"output_dir={tmp_path}/run", f"data.cache_dir={run}/cache"]
    data = [f"data.{split}=[{{path: {run}/pair/{split}.jsonl}}]" for split in ("train", "val")]
    run_ranks(train, 1, [*overrides, *data, *SMALL], str(tmp_path / "log"))
    assert "export: " not in (tmp_path / "log").read_text()  # nothing differs
    for part in ("base", "drafter"):
        ours, theirs = tmp_path / "run/export" / part, pair / part
        for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "preprocessor_config.json"):
            if (theirs / name).exists():
                assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
        assert "a folder" in (ours / "README.md").read_text()
