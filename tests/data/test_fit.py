"""Tokens beyond a table, rows beyond the positions and a missing tokenizer: found before weights are loaded."""

import pytest
from configs import compose
from data_helpers import TURNS, chat, make_config, make_tokenizer, write_jsonl
from pairs import base_config, build_pair, drafter_config, make_pair

from joint_train.data.fit import check_fit, check_ids
from joint_train.data.regenerate import Sampling, answer_batch
from joint_train.data.tokenizer import end_token_ids, load_tokenizer, read_tokenizer
from joint_train.errors import ConfigError, DataError

TOKENIZER = make_tokenizer()
SIZE = len(TOKENIZER)


def grown():
    """A tokenizer with a token that was added to it and not to the base."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert len(tokenizer) == SIZE + 1
    return tokenizer


def configs(vocab_size=SIZE, **more):
    base = base_config("e2b", vocab_size=vocab_size, **{"vocab_size_per_layer_input": vocab_size, **more})
    return base, drafter_config(base)


def settings(tmp_path, *rows, **data):
    path = write_jsonl(tmp_path / "rows.jsonl", list(rows))
    return make_config(tmp_path, [path], **data), path


def test_a_token_beyond_the_tables_is_found_in_the_data(tmp_path, caplog):
    cfg, path = settings(tmp_path, chat("a", "b"), chat("see <new>", "c"))
    check_fit(cfg, TOKENIZER, *configs())
    with pytest.raises(
        DataError, match=f"{path}:2 has '<new>' \\({SIZE}\\).*1 tokens beyond the base's vocab_size={SIZE}"
    ):
        check_fit(cfg, grown(), *configs())
    check_fit(cfg, grown(), *configs(SIZE + 1))
    with pytest.raises(DataError, match=f"beyond the base's vocab_size_per_layer_input={SIZE}"):
        check_fit(cfg, grown(), *configs(SIZE + 1, vocab_size_per_layer_input=SIZE))
    assert "are beyond" not in caplog.text
    (tmp_path / "without").mkdir()
    cfg, _ = settings(tmp_path / "without", chat("a", "b"))
    check_fit(cfg, grown(), *configs())  # nothing uses it
    assert "1 tokens of the tokenizer are beyond" in caplog.text and "'<new>'" in caplog.text


def test_documents_beyond_the_positions_are_found(tmp_path):
    long = chat("q", "word " * 40)
    cfg, path = settings(tmp_path, chat("a", "b"), long, max_length=512)
    check_fit(cfg, TOKENIZER, *configs(max_position_embeddings=512))
    with pytest.raises(
        DataError, match=f"{path}:2 has .* tokens, .*the base's 64 positions.*Set data.max_length=64; or"
    ):
        check_fit(cfg, TOKENIZER, *configs(max_position_embeddings=64))
    cfg.data.max_length = 64
    check_fit(cfg, TOKENIZER, *configs(max_position_embeddings=64))
    cfg, _ = settings(tmp_path, chat("a", "b"), max_length=512)
    check_fit(cfg, TOKENIZER, *configs(max_position_embeddings=64))  # packed rows of short documents


def test_only_where_it_can_matter_the_data_are_read(tmp_path):
    cfg = make_config(tmp_path, [str(tmp_path / "nothing.jsonl")])
    check_fit(cfg, TOKENIZER, *configs())
    with pytest.raises(DataError, match="no file"):
        check_fit(cfg, grown(), *configs())


def test_prompts_with_tokens_beyond_the_table_are_refused():
    base, _ = build_pair("e2b", vocab_size=SIZE, vocab_size_per_layer_input=SIZE)
    tokenizer = grown()
    with pytest.raises(ConfigError, match=f"a prompt has the token '<new>' .* vocab_size.* is {SIZE}"):
        answer_batch([chat("a <new>")], base, tokenizer, Sampling(2))
    check_ids([[SIZE - 1], []], tokenizer, base.config)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    base, _ = make_pair(tmp_path, "e2b")
    cfg = compose({"model.base": str(base)})
    with pytest.raises(ConfigError, match=rf"model.base={base} has no tokenizer .*tokenizer.json.*set data.tokenizer"):
        load_tokenizer(cfg)
    cfg.data.tokenizer = str(tmp_path)
    with pytest.raises(ConfigError, match=rf"data.tokenizer={tmp_path} has no tokenizer .*give a folder"):
        load_tokenizer(cfg)
    TOKENIZER.save_pretrained(base)
    assert len(read_tokenizer(base)) == SIZE
    (base / "tokenizer_config.json").unlink()  # read all the same, and the template's <bos> would be left out
    with pytest.raises(ConfigError, match="no tokenizer_config.json, .* its chat template writes bos_token"):
        read_tokenizer(base)
    (base / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ConfigError, match="tokenizer.json: this is a Git LFS pointer"):
        read_tokenizer(base)
    cfg.data.tokenizer = None
    (base / "config.json").write_text('{"model_type": "gem')
    with pytest.raises(ConfigError, match="no model configuration at .*config.json"):
        load_tokenizer(cfg)


def test_a_run_says_so_before_it_loads_weights(tmp_path, starter_dir, monkeypatch):
    from ranks import run_ranks

    overrides = [f"model.base={make_pair(tmp_path, 'e2b')[0]}", f"model.drafter={tmp_path}/drafter"]
    data = [
        f"data.train=[{{path: {starter_dir}/val.jsonl, limit: 8}}]",
        f"output_dir={tmp_path}/run",
        "data.num_workers=0",
    ]
    with pytest.raises(Exception, match="model.base=.* has no tokenizer"):
        run_ranks(begin, 1, [*overrides, *data])
    with pytest.raises(Exception, match="tokens beyond the base's vocab_size=256"):
        run_ranks(begin, 1, [*overrides, *data, f"data.tokenizer={starter_dir}/base", f"data.cache_dir={tmp_path}/c"])
    assert not (tmp_path / "run").exists()


def begin(rank, overrides):
    from joint_train.config import load
    from joint_train.train import trainer

    trainer.load_pair = None  # weights would be loaded here
    trainer.run(load(overrides))


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (TURNS, ["<turn|>", "<eos>"]),
        (TURNS.replace("<turn|>", "<|im_end|>"), ["<|im_end|>", "<eos>"]),
        (TURNS.replace("<turn|>", ""), ["<eos>"]),  # closes nothing
        (None, ["<eos>"]),
        ("{{ raise_exception('no') }}", ["<eos>"]),
    ],
)
def test_the_tokens_that_end_an_answer(template, ends):
    tokenizer = make_tokenizer(template)
    assert tokenizer.convert_ids_to_tokens(end_token_ids(tokenizer)) == ends
