"""Bad input: an error with file and line, or skipped and counted; good lines are all kept; nothing hangs."""

import bz2
import gzip
import json
import lzma
import multiprocessing
import os
import tempfile
import time
import tracemalloc

import filelock
import pytest
from data_helpers import chat, make_config, make_tokenizer, numbered, write_jsonl
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from joint_train.config import SourceConfig
from joint_train.data import DataError, build_loader, cache, cache_key, tokenise
from joint_train.data.json_files import Record, read_lines
from joint_train.data.loader import check_sources
from joint_train.data.readers import read_records
from joint_train.data.sources import parse
from joint_train.data.template import ASSISTANT

TOKENIZER = make_tokenizer()


def source(**options):
    return SourceConfig(**{"path": "x.jsonl", **options})


def parsed(data, **options):
    return parse(Record("x.jsonl", 7, data if isinstance(data, dict) else data.encode()), source(**options))


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "row, options, expected",
    [
        ({"messages": MESSAGES}, {}, {"messages": MESSAGES}),
        ({"chat": MESSAGES}, {"format": "messages", "columns": {"messages": "chat"}}, {"messages": MESSAGES}),
        ({"prompt": "q", "response": "a"}, {}, {"messages": MESSAGES}),
        ({"prompt": "q", "completion": "a"}, {}, {"messages": MESSAGES}),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, {}, {"messages": MESSAGES}),
        (
            {"problem": "q", "solution": "a", "lang": "py"},
            {"format": "prompt_response", "columns": {"prompt": "problem", "response": "solution"}},
            {"messages": MESSAGES},
        ),
        (
            {"system": "s", "prompt": "q", "response": "a"},
            {},
            {"messages": [{"role": "system", "content": "s"}, *MESSAGES]},
        ),
        ({"text": "t"}, {}, {"text": "t"}),
        ({"content": "t"}, {"format": "text", "columns": {"text": "content"}}, {"text": "t"}),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {},
            {"messages": MESSAGES},
        ),
        (
            {"conversations": [{"from": "user", "value": "q"}, {"from": "model", "value": "a"}]},
            {},
            {"messages": MESSAGES},
        ),
        ("\ufeff" + json.dumps({"messages": MESSAGES}), {}, {"messages": MESSAGES}),
        (
            {
                "messages": MESSAGES,
                "tools": '[{"type": "function", "function": {"name": "f"}}]',
                "chat_template_kwargs": {"enable_thinking": True},
            },
            {},
            {
                "messages": MESSAGES,
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "chat_template_kwargs": {"enable_thinking": True},
            },
        ),
        # what Parquet makes of messages with different fields
        ({"messages": [{**MESSAGES[0], "tool_calls": None}, MESSAGES[1]], "tools": None}, {}, {"messages": MESSAGES}),
    ],
)
def test_formats(row, options, expected):
    assert parsed(row, **options) == expected


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"messages": [', "malformed JSON: Expecting value at column 15"),
        ("[1, 2]", "a JSON object is expected, not a list"),
        ("[" * 100_000, "malformed JSON"),
        ('{"messages": []}', "an empty conversation"),
        ('{"messages": "hi"}', "messages is a string, not a list"),
        ('{"messages": [1]}', "message 0 is a number, not an object"),
        ('{"messages": [{"role": "wizard", "content": "x"}]}', "message 0 has the unknown role 'wizard'"),
        ('{"messages": [{"content": "x"}]}', "message 0 has the unknown role None"),
        ('{"messages": [{"role": "user"}]}', "message 0 has no content"),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 0: content is a number"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
        (
            '{"messages": [{"role": "assistant", "content": "x", "reasoning": "\\ud800"}]}',
            "message 0: reasoning has half",
        ),
        ('{"messages": [{"role": "user", "content": [{"text": "x"}]}]}', "a part of its content has no type"),
        ('{"conversations": [{"from": "alien", "value": "x"}]}', "message 0 has the unknown role 'alien'"),
        ('{"foo": "x"}', r"no format fits the fields \['foo'\]: set the source's format to one of"),
        ('{"prompt": "x"}', "no field 'response' or 'completion'"),
        ('{"text": null}', "no field 'text'"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": "{"}', "tools is a string that isn't JSON"),
    ],
)
def test_bad_records_are_named(line, message):
    with pytest.raises(DataError, match=f"x.jsonl:7: .*{message}"):
        parsed(line)


def test_invalid_utf8_is_named():
    with pytest.raises(DataError, match="x.jsonl:7: invalid UTF-8 at byte 2"):
        parse(Record("x.jsonl", 7, b'{"\xff": 1}'), source())


def test_a_100_megabyte_line_is_not_held_in_memory(tmp_path):
    good = (json.dumps(chat("q", "a")) + "\n").encode()
    path = tmp_path / "big.jsonl"
    with open(path, "wb") as stream:
        stream.write(good)
        for _ in range(100):
            stream.write(b"x" * 1_000_000)
        stream.write(b"\n" + good)
    tracemalloc.start()
    records = list(read_lines(str(path), 1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(record.line, record.error is None) for record in records] == [(1, True), (2, False), (3, True)]
    assert "a line of 100,000,001 bytes, longer than data.max_line_bytes=1048576" in records[1].error
    assert peak < 10 << 20


def test_the_longest_line_that_is_allowed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 10 + b"\n" + b"y" * 11 + b"\n" + b"z" * 10)
    assert [record.error is None for record in read_lines(str(path), 10)] == [True, False, True]


@pytest.mark.parametrize("opener, extension", [(gzip.open, "gz"), (bz2.open, "bz2"), (lzma.open, "xz")])
def test_compressed_files(tmp_path, opener, extension):
    path = str(tmp_path / f"a.jsonl.{extension}")
    with opener(path, "wt") as stream:
        stream.write("".join(json.dumps(example) + "\n" for example in numbered(2000)))
    spec = source(path=path)
    assert len([parse(record, spec) for record in read_records(spec, 1 << 20)]) == 2000
    assert [record.line for record in read_records(source(path=path, limit=7), 1 << 20)] == list(range(1, 8))
    with open(path, "r+b") as stream:
        stream.truncate(os.path.getsize(path) * 2 // 3)
    records = list(read_records(spec, 1 << 20))
    assert [record.line for record in records] == list(range(1, len(records) + 1))
    last = records[-1]
    assert [record.error is None for record in records] == [True] * (len(records) - 1) + [False]
    with pytest.raises(DataError, match=rf"a.jsonl.{extension}:{len(records)}: can't be read"):
        parse(last, spec)


GOOD = [(json.dumps(example)).encode() for example in numbered(20)]
KEYS = st.sampled_from("messages conversations prompt response text role content from value tools type".split())
values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
WORDS = st.sampled_from(["user", "assistant", "system", "tool", "human", "wizard", "text", "image", "", "hi"])
messages = st.lists(
    st.dictionaries(KEYS, WORDS | values, max_size=3)
    | st.fixed_dictionaries({"role": WORDS, "content": WORDS | values}),
    max_size=3,
)
records = st.dictionaries(KEYS, values | messages, max_size=3) | st.fixed_dictionaries({"messages": messages})


@st.composite
def bad_lines(draw) -> bytes:
    kind = draw(st.integers(0, 4))
    if kind == 0:
        line = draw(st.binary(max_size=40))
    elif kind == 1:
        line = json.dumps(draw(records)).encode()
    elif kind == 2:  # a good line with a piece cut out or put in
        line = draw(st.sampled_from(GOOD))
        first, last = sorted((draw(st.integers(0, len(line))), draw(st.integers(0, len(line)))))
        line = line[:first] + draw(st.binary(max_size=4)) + line[last:]
    elif kind == 3:
        line = draw(st.sampled_from([b"[", b'{"a":', b'"'])) * draw(st.integers(1, 3000))
    else:
        line = b'{"messages": "' + b"x" * draw(st.integers(900, 5000)) + b'"}'
    return line.replace(b"\n", b"")


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(GOOD) | bad_lines(), min_size=1, max_size=6), st.booleans())
def test_a_thousand_bad_files(lines, ends):
    assume(not lines[0].startswith(b"version https://git-lfs"))  # a pointer to a file, not the file: refused as a whole
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "f.jsonl")
        with open(path, "wb") as stream:
            stream.write(b"\n".join(lines) + (b"\n" if ends else b""))
        kept = set()
        spec = source(path=path)
        for record in read_records(spec, 1000):
            try:
                documents = tokenise.encode_record(record, spec, TOKENIZER)
            except DataError as error:
                assert str(error).startswith(f"{path}:{record.line}: "), error
            else:
                assert all(len(document.tokens) == len(document.flags) for document, _ in documents)
                kept.add(record.line)
        assert kept >= {number for number, line in enumerate(lines, start=1) if line in GOOD}


def bad_file(tmp_path) -> str:
    lines = [json.dumps(example).encode() for example in numbered(300)]
    lines[41] = b"{broken"
    lines[199] = json.dumps({"messages": [{"role": "user", "content": "no answer"}]}).encode()
    lines[250] = b'{"messages": [{"role": "user", "content": "\xff"}]}'
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    return str(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("workers", [0, 2])
def test_raise_stops_with_file_and_line(tmp_path, workers):
    cfg = make_config(tmp_path, [bad_file(tmp_path)], num_workers=workers)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"bad.jsonl:42: malformed JSON") as raised:
        build_loader(cfg, TOKENIZER, "train", 0, 1)
    assert "Traceback" not in str(raised.value), "the sentence alone, also from a worker"
    assert time.monotonic() - began < 30
    assert not list((tmp_path / "cache").glob("*.tmp-*")), "nothing half-made is left"


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_counts_and_reports(tmp_path, workers, caplog):
    path = bad_file(tmp_path)
    cfg = make_config(tmp_path, [path], num_workers=workers, on_error="skip", mixture="epoch")
    loader = build_loader(cfg, TOKENIZER, "train", 0, 1)
    assert "2 bad rows are left out" in caplog.text and "bad.jsonl:42: malformed JSON" in caplog.text
    assert "1 documents without an answer are left out" in caplog.text and "bad.jsonl:200: no target" in caplog.text
    assert len(loader.dataset.sequence.sources[0]) == 297

    cfg.data.on_error = "raise"  # the cache that was made while skipping doesn't hide what is bad
    with pytest.raises(DataError, match="bad.jsonl:42: malformed JSON"):
        build_loader(cfg, TOKENIZER, "train", 0, 1)


def test_a_row_without_a_target_is_an_error(tmp_path):
    lines = [chat("q", "a"), {"messages": [{"role": "user", "content": "q"}]}]
    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", lines)])
    with pytest.raises(DataError, match=r"a.jsonl:2: no target"):
        build_loader(cfg, TOKENIZER, "train", 0, 1)
    cfg.data.train_on = "all"
    build_loader(cfg, TOKENIZER, "train", 0, 1)


def test_a_validation_set_without_a_target_is_a_sentence(tmp_path):
    path = write_jsonl(tmp_path / "val.jsonl", [{"messages": [{"role": "user", "content": "q"}]}] * 3)
    cfg = make_config(tmp_path, [path], [path], on_error="skip")
    with pytest.raises(DataError, match="data source 'val': nothing is left of its 3 examples"):
        build_loader(cfg, TOKENIZER, "val", 0, 1)


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        ("a.jsonl", "no.jsonl", "there is no file at .*/no.jsonl .data source 'no'"),
        ("a.jsonl", "*.jsn", r"no file matches .*/\*.jsn"),
        ("a.jsonl", "a.md", "a.md: its name ends in none of .jsonl"),
        ({"path": "a.jsonl", "weight": -1}, "a.jsonl", "weight=-1.0 isn't positive"),
        ("a.jsonl", {"path": "a.jsonl", "format": "chat"}, "format='chat' is not one of auto"),
    ],
)
def test_what_is_wrong_with_sources_is_told_before_any_is_read(tmp_path, monkeypatch, train, val, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("not read\n")
    (tmp_path / "a.md").write_text("not read\n")
    with pytest.raises(DataError, match=said):
        check_sources(make_config(tmp_path, [train], [val]))


@pytest.mark.parametrize("content", ["", "\n\n", "{broken\n"])
def test_a_source_with_nothing_in_it(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    cfg = make_config(tmp_path, [str(tmp_path / "a.jsonl")], on_error="skip")
    with pytest.raises(DataError, match="1 bad records" if content.strip() else "no usable example in it .it is empty"):
        build_loader(cfg, TOKENIZER, "train", 0, 1)


def test_a_workers_death_is_an_error_not_a_wait(tmp_path, monkeypatch):
    class Deadly:
        chat_template, is_fast, special_tokens_map, name_or_path = "x", False, {}, "deadly"

        def get_vocab(self):
            return {}

        def __len__(self):
            return 0

        def get_chat_template(self, tools=None):
            os._exit(1)

    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", numbered(3))], num_workers=1)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        build_loader(cfg, Deadly(), "train", 0, 1)


def build_in_child(cfg, queue):
    loader = build_loader(cfg, TOKENIZER, "train", 0, 1)
    queue.put(next(iter(loader))["input_ids"].tolist())


def test_concurrent_builders_make_one_cache(tmp_path):
    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", numbered(300))])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=build_in_child, args=(cfg, queue)) for _ in range(4)]
    for child in children:
        child.start()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(timeout=60)
    assert all(result == results[0] for result in results)
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 1
    assert not list((tmp_path / "cache").glob("*.tmp-*"))


def test_a_builder_without_progress_ends_the_wait(tmp_path):
    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", numbered(3))])
    cfg.parallel.timeout_seconds = 2
    key = cache_key.cache_key(cfg.data.train[0], cfg.data, TOKENIZER)
    (tmp_path / "cache").mkdir(exist_ok=True)
    with filelock.FileLock(tmp_path / "cache" / f"{key}.lock"):
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=f"another process holds .*{key}.lock"):
            build_loader(cfg, TOKENIZER, "train", 0, 1)
        assert time.monotonic() - began < 10
    build_loader(cfg, TOKENIZER, "train", 0, 1)


def hold_lock_and_die(path):
    filelock.FileLock(path).acquire()
    os._exit(1)


def test_the_lock_of_a_process_that_died_is_free(tmp_path):
    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", numbered(3))])
    key = cache_key.cache_key(cfg.data.train[0], cfg.data, TOKENIZER)
    root = tmp_path / "cache"
    (root / f"{key}.tmp-host-1").mkdir(parents=True)
    child = multiprocessing.get_context("fork").Process(target=hold_lock_and_die, args=(root / f"{key}.lock",))
    child.start()
    child.join(timeout=30)
    began = time.monotonic()
    build_loader(cfg, TOKENIZER, "train", 0, 1)
    assert time.monotonic() - began < 10
    assert not (root / f"{key}.tmp-host-1").exists()


@pytest.mark.parametrize(
    "change",
    "content format limit columns ignore chat_template_kwargs max_line_bytes transformers tokenizers template "
    "vocabulary special processor".split(),
)
def test_the_cache_is_keyed_by_what_it_depends_on(tmp_path, monkeypatch, change):
    path = tmp_path / "a.jsonl"
    spec = source(path=write_jsonl(path, numbered(3)))
    data = make_config(tmp_path, [str(path)]).data
    TOKENIZER("padded", padding="max_length", max_length=9)  # a call's settings aren't the tokenizer's
    tokenizer = make_tokenizer()
    tokenizer.name_or_path = str(tmp_path)
    before = cache_key.cache_key(spec, data, TOKENIZER)
    assert cache_key.cache_key(spec, data, tokenizer) == before
    if change == "content":
        path.write_text(path.read_text().replace("n0", "m0"))
    elif change == "max_line_bytes":
        data.max_line_bytes -= 1
    elif change in ("transformers", "tokenizers"):
        monkeypatch.setattr(getattr(cache_key, change), "__version__", "0")
    elif change == "template":
        tokenizer.chat_template = "{{ messages[0].content }}"
    elif change == "vocabulary":
        tokenizer.add_tokens("n0;")
    elif change == "special":
        tokenizer.bos_token = "<eos>"
    elif change == "processor":
        (tmp_path / "preprocessor_config.json").write_text("{}")
    else:
        options = {"enable_thinking": True}
        values = {"format": "messages", "limit": 2, "columns": {"messages": "chat"}, "ignore": ["context"]}
        values["chat_template_kwargs"] = options
        setattr(spec, change, values[change])
    after = cache_key.cache_key(spec, data, tokenizer)
    assert after != before
    path.rename(tmp_path / "moved.jsonl")
    spec.path = str(tmp_path / "moved.jsonl")
    assert cache_key.cache_key(spec, data, tokenizer) == after, "not by where it lies"


def test_cached_tokens_are_the_templates(tmp_path):
    examples = numbered(150)
    for part, (first, last) in {"a": (0, 70), "b": (70, 150)}.items():
        write_jsonl(tmp_path / f"{part}.jsonl", examples[first:last])
    cfg = make_config(tmp_path, [f"{tmp_path}/*.jsonl"], num_workers=2)
    cached = cache.tokenised(cfg.data.train[0], cfg.data, TOKENIZER, 2, 60)
    for index, example in enumerate(examples):
        encoded = TOKENIZER.apply_chat_template(
            example["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        tokens, flags = cached.read(index, 0, int(cached.documents["length"][index]))
        assert tokens.tolist() == encoded["input_ids"]
        assert (flags & ASSISTANT).tolist() == encoded["assistant_masks"]
        assert cached.where(index) == f"{tmp_path}/" + (
            f"a.jsonl:{index + 1}" if index < 70 else f"b.jsonl:{index - 69}"
        )
