"""Rows and batches: what is in them, in which order, on any number of ranks and workers."""

import collections
import itertools
import json

import numpy as np
import pytest
import torch
from data_helpers import chat, make_config, make_tokenizer, numbered, write_jsonl

from joint_train.config import SourceConfig
from joint_train.data import DataError, build_loader, cache_key, loader_position
from joint_train.data.order import hash64, permutation
from joint_train.data.packing import fullest
from joint_train.data.rows import Walk


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def documents(batch, tokenizer) -> list[str]:
    """The text of every document of a batch, in order."""
    texts = []
    for ids, numbers in zip(batch["input_ids"], batch["document_ids"], strict=True):
        for number in range(1, int(numbers.max()) + 1):
            texts.append(tokenizer.decode(ids[numbers == number]))
    return texts


def name(text: str) -> str:
    """Which numbered example a document is."""
    return text.split("user\n")[1].split(";")[0]


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def test_a_batch_is_what_the_contract_says(tmp_path, tokenizer):
    """Against rows put together by hand from the tokenizer's own masks."""
    examples = [chat("one", "uno", "two", "dos"), chat("three", "tres")]
    cfg = make_config(
        tmp_path, [write_jsonl(tmp_path / "a.jsonl", examples)], mixture="epoch", shuffle=False, max_length=96
    )
    batch = next(iter(build_loader(cfg, tokenizer, "train", 0, 1)))

    ids, labels, positions, numbers = [], [], [], []
    for number, example in enumerate(examples, start=1):
        encoded = tokenizer.apply_chat_template(
            example["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids += encoded["input_ids"]
        labels += [i if m else -100 for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)]
        positions += range(len(encoded["input_ids"]))
        numbers += [number] * len(encoded["input_ids"])
    pad = 96 - len(ids)
    assert pad > 0
    expected = {
        "input_ids": ids + [0] * pad,
        "labels": labels + [-100] * pad,
        "position_ids": positions + [0] * pad,
        "document_ids": numbers + [0] * pad,
        "source": [0] * len(ids) + [-1] * pad,
    }
    assert batch.keys() == expected.keys()
    for key, values in expected.items():
        assert batch[key].dtype == torch.int64
        assert batch[key].tolist() == [values], key
    supervised = tokenizer.decode([label for label in labels if label != -100])
    assert supervised == "uno<turn|>dos<turn|>tres<turn|>"


def test_the_fullest_choice_is_that_of_all_choices():
    random = np.random.default_rng(0)
    for _ in range(200):
        lengths, space = random.integers(1, 30, random.integers(1, 9)).tolist(), int(random.integers(0, 90))
        chosen = fullest(lengths, space)
        sums = {sum(some) for n in range(len(lengths) + 1) for some in itertools.combinations(lengths, n)}
        assert chosen == sorted(set(chosen))
        assert sum(lengths[i] for i in chosen) == max(total for total in sums if total <= space)
    assert fullest([3, 2, 4, 5, 1], 9) == [0, 1, 2], "of the first that will do"


def test_the_order_is_a_fixed_function_of_the_seed():
    """Frozen values: a change of library or code that moved the data of a running job would show here."""
    assert sorted(permutation(1000, 5, 1)) == list(range(1000))
    assert permutation(8, 0, 3, 0, 0).tolist() == [3, 2, 5, 7, 1, 0, 6, 4]
    assert not np.array_equal(permutation(1000, 5, 1), permutation(1000, 5, 2))
    uniform = hash64(np.arange(100_000), 7) / 2.0**64
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(np.mean(uniform < 0.1) - 0.1) < 0.01


def epoch_rows(cfg, tokenizer, size, workers, rows):
    """The first ``rows`` global rows as ``size`` ranks with ``workers`` workers each see them, in global order."""
    cfg.data.num_workers = workers
    per_rank = [
        take(build_loader(cfg, tokenizer, "train", rank, size), -(-rows // (size * cfg.data.micro_batch_size)))
        for rank in range(size)
    ]
    batches = [batch for step in zip(*per_rank, strict=True) for batch in step]
    return torch.cat([batch["input_ids"] for batch in batches])[:rows]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_example_once_an_epoch(tmp_path, tokenizer, size, workers):
    paths = [
        write_jsonl(tmp_path / "a.jsonl", numbered(50, "a")),
        write_jsonl(tmp_path / "b.jsonl", numbered(30, "b")),
    ]
    cfg = make_config(tmp_path, paths, mixture="epoch", micro_batch_size=2)
    cfg.epochs = 2
    sequence = build_loader(cfg, tokenizer, "train", 0, 1).sequence
    rows = epoch_rows(cfg, tokenizer, size, workers, sequence.count_rows())
    names = [text.split(";")[0] for row in rows for text in tokenizer.decode(row).split("user\n")[1:]]
    for epoch in (names[:80], names[80:]):
        assert sorted(epoch) == sorted([f"a{i}" for i in range(50)] + [f"b{i}" for i in range(30)])
    assert names[:80] != names[80:], "each epoch has its own order"
    assert torch.equal(rows, epoch_rows(cfg, tokenizer, 1, 0, len(rows)))


@pytest.mark.parametrize("mixture", ["epoch", "endless"])
def test_resume_on_another_number_of_ranks_and_workers(tmp_path, tokenizer, mixture):
    paths = [write_jsonl(tmp_path / "a.jsonl", numbered(60, "a")), write_jsonl(tmp_path / "b.jsonl", numbered(9, "b"))]
    cfg = make_config(tmp_path, paths, mixture=mixture, micro_batch_size=1)
    cfg.max_steps = 1000
    reference = torch.cat([b["input_ids"] for b in take(build_loader(cfg, tokenizer, "train", 0, 1), 96)])

    got, position = [], None
    for size, workers, micro_batch, steps in [(2, 1, 1, 3), (4, 0, 2, 2), (1, 2, 3, 5), (4, 1, 1, 4), (2, 0, 4, 4)]:
        cfg.data.num_workers, cfg.data.micro_batch_size = workers, micro_batch
        loaders = [build_loader(cfg, tokenizer, "train", rank, size, position=position) for rank in range(size)]
        iterators = [iter(loader) for loader in loaders]
        for _ in range(steps):
            got += [next(iterator)["input_ids"] for iterator in iterators]
        positions = [loader_position(loader) for loader in loaders]
        assert all(other == positions[0] for other in positions), "the same on every rank"
        position = positions[0]
        assert position["rows"] == sum(map(len, got))
    assert torch.equal(torch.cat(got), reference[: position["rows"]])


def test_the_loaders_own_state_resumes_it_too(tmp_path, tokenizer):
    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", numbered(60))], num_workers=1)
    loader = build_loader(cfg, tokenizer, "train", 0, 1)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state, following = loader.state_dict(), [next(batches)["input_ids"] for _ in range(3)]
    again = build_loader(cfg, tokenizer, "train", 0, 1)
    again.load_state_dict(state)
    resumed = [batch["input_ids"] for batch in take(again, 3)]
    assert torch.equal(torch.cat(following), torch.cat(resumed))
    assert loader_position(again) == loader_position(loader)


@pytest.mark.parametrize(
    "change, why",
    [
        ("seed", "other data: seed was 0 and is now 1. To"),
        ("content", "other data: the files of source 'a' have other contents, or its format"),
        ("weight", "other data: the weight of source 'a' was 1 and is now 2. To"),
        ("train_on", "other data: data.train_on was assistant and is now all. To"),
        ("packing", "other data: data.packing was True and is now False. To"),
        ("max_length", "other data: data.max_length was 64 and is now 128. To"),
        ("shuffle", "other data: data.shuffle was True and is now False. To"),
        ("name", "other data: source 'a' is gone; source 'b' is new. To"),
        ("template", "other data: the tokenizer, its chat template or its image processor is another one. To"),
        ("old", "other data: the order of the rows changed with this version of joint-train. To"),
    ],
)
def test_a_position_of_other_data_is_refused_with_the_reason(tmp_path, change, why):
    tokenizer = make_tokenizer()
    cfg = make_config(tmp_path, [{"path": write_jsonl(tmp_path / "a.jsonl", numbered(20))}])
    position = loader_position(build_loader(cfg, tokenizer, "train", 0, 1))
    build_loader(cfg, tokenizer, "train", 0, 1, position=position)
    if change in ("seed", "old"):
        cfg.seed = 1
        if change == "old":
            del position["made_of"]
    elif change in ("content", "name"):
        write_jsonl(tmp_path / "a.jsonl", numbered(21))
        if change == "name":
            cfg.data.train[0].path = write_jsonl(tmp_path / "b.jsonl", numbered(21))
    elif change == "weight":
        cfg.data.train[0].weight = 2.0
    elif change == "template":
        tokenizer.chat_template += "."
    else:
        others = {"train_on": "all", "packing": False, "max_length": 128, "shuffle": False}
        setattr(cfg.data, change, others[change])
    with pytest.raises(DataError) as refusal:
        build_loader(cfg, tokenizer, "train", 0, 1, position=json.loads(json.dumps(position)))
    assert why in str(refusal.value)


def test_what_changes_no_token_changes_no_position(tmp_path, monkeypatch):
    """Another version or template that makes the same tokens: the data go on where they were."""
    tokenizer = make_tokenizer()
    cfg = make_config(tmp_path, [{"path": write_jsonl(tmp_path / "a.jsonl", numbered(20))}])
    position = loader_position(build_loader(cfg, tokenizer, "train", 0, 1))
    tokenizer.chat_template += "{# a comment #}"
    monkeypatch.setattr("joint_train.data.cache_key.VERSION", cache_key.VERSION + 1)
    build_loader(cfg, tokenizer, "train", 0, 1, position=json.loads(json.dumps(position)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_restored_state_holds_for_one_pass(tmp_path, tokenizer, workers):
    val = write_jsonl(tmp_path / "v.jsonl", numbered(45, "v"))
    cfg = make_config(tmp_path, [], [val], micro_batch_size=2, num_workers=workers)
    loader = build_loader(cfg, tokenizer, "val", 0, 1)
    batches = iter(loader)
    first, state = next(batches)["input_ids"], loader.state_dict()
    rest = [batch["input_ids"] for batch in batches]
    again = build_loader(cfg, tokenizer, "val", 0, 1)
    again.load_state_dict(state)
    for expected in (rest, [first, *rest], [first, *rest]):
        assert torch.equal(torch.cat([batch["input_ids"] for batch in again]), torch.cat(expected))


def test_every_token_knows_its_source(tmp_path, tokenizer):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", numbered(20, name)) for name in "ab"]
    loader = build_loader(make_config(tmp_path, paths, mixture="epoch"), tokenizer, "train", 0, 1)
    for batch in take(loader, 3):
        spans = [
            batch["source"][batch["document_ids"] == number] for number in range(1, batch["document_ids"].max() + 1)
        ]
        names = [name(text) for text in documents(batch, tokenizer)]
        assert [set(span.tolist()) for span in spans] == [{"ab".index(text[0])} for text in names]
        assert (batch["source"][batch["document_ids"] == 0] == -1).all()


def test_an_endless_mixture_keeps_its_weights_and_repeats_each_source_evenly(tmp_path, tokenizer):
    sources = [
        {"path": write_jsonl(tmp_path / "a.jsonl", numbered(100, "a")), "weight": 4.0},
        {"path": write_jsonl(tmp_path / "b.jsonl", numbered(40, "b")), "weight": 1.0},
    ]
    cfg = make_config(tmp_path, sources, packing=False)
    loader = build_loader(cfg, tokenizer, "train", 0, 1)
    assert loader.source_names == ["a", "b"]
    seen = collections.Counter(name(documents(batch, tokenizer)[0]) for batch in take(loader, 1024))
    assert abs(sum(count for key, count in seen.items() if key.startswith("a")) - 0.8 * 1024) <= 2
    for prefix in "ab":
        counts = [count for key, count in seen.items() if key.startswith(prefix)]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_validation_is_one_pass_with_as_many_batches_on_every_rank(tmp_path, tokenizer, size):
    val = write_jsonl(tmp_path / "v.jsonl", numbered(45, "v"))
    cfg = make_config(tmp_path, [], [val], micro_batch_size=2)
    names, counts, first = [], set(), []
    for rank in range(size):
        loader = build_loader(cfg, tokenizer, "val", rank, size)
        batches = list(loader)
        counts.add(len(batches))
        first.append(batches[0]["input_ids"])
        for batch in batches:
            names += [name(text) for text in documents(batch, tokenizer)]
            empty = (batch["document_ids"] == 0).all(1)
            assert (batch["labels"][empty] == -100).all()
        assert len(list(loader)) == len(batches), "a second pass is the same"
    assert len(counts) == 1
    assert sorted(names) == sorted(f"v{i}" for i in range(45)), "disjoint, and nothing is left out"
    cfg.seed = 1
    assert torch.equal(next(iter(build_loader(cfg, tokenizer, "val", 0, size)))["input_ids"], first[0])


def test_without_packing_a_row_is_a_document(tmp_path, tokenizer):
    cfg = make_config(
        tmp_path, [write_jsonl(tmp_path / "a.jsonl", numbered(30))], packing=False, max_length=256, micro_batch_size=3
    )
    for batch in take(build_loader(cfg, tokenizer, "train", 0, 1), 10):
        assert batch["document_ids"].max() == 1 and batch["input_ids"].shape[1] in (64, 128)


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_overlong_documents(tmp_path, tokenizer, overlong):
    examples = [chat("n0;", "y" * 150), chat("n1;", "z"), chat("n2;" + "q" * 100, "lost when cut")]
    path = write_jsonl(tmp_path / "a.jsonl", examples)
    cfg = make_config(tmp_path, [path], overlong=overlong, mixture="epoch", shuffle=False)
    loader = build_loader(cfg, tokenizer, "train", 0, 1)
    rows = [loader.sequence.row(row, 64) for row in Walk(loader.sequence)]
    trained = [tokenizer.decode(ids[labels != -100]) for ids, labels in ((r["input_ids"], r["labels"]) for r in rows)]
    everything = "".join(trained)
    if overlong == "drop":
        assert everything == "z<turn|>"
    elif overlong == "truncate":
        assert "lost" not in everything and "z<turn|>" in everything
        assert 0 < everything.count("y") < 150
    else:
        assert everything.count("y") == 150 and "lost when cut<turn|>" in everything


def test_train_on(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("q1", "a1", "q2", "a2")])
    texts = {}
    for train_on in ("assistant", "last_assistant", "all"):
        cfg = make_config(tmp_path, [path], train_on=train_on)
        batch = next(iter(build_loader(cfg, tokenizer, "train", 0, 1)))
        texts[train_on] = tokenizer.decode(batch["labels"][(batch["labels"] != -100) & (batch["document_ids"] == 1)])
    assert texts["assistant"] == "a1<turn|>a2<turn|>"
    assert texts["last_assistant"] == "a2<turn|>"
    assert texts["all"] == tokenizer.apply_chat_template(chat("q1", "a1", "q2", "a2")["messages"], tokenize=False)
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 1, "one cache serves all three"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"overlong": "cut"}, "data.overlong='cut' is not one of truncate, split, drop"),
        ({"train_on": "user"}, "data.train_on"),
        ({"mixture": "weighted"}, "data.mixture"),
        ({"on_error": "ignore"}, "data.on_error"),
        ({"train": []}, "data.train has no source"),
        ({"train": [{"path": "/nowhere/x.jsonl"}]}, "no file at /nowhere/x.jsonl"),
        ({"train": [{"path": "x*.jsonl"}]}, "no file matches"),
        ({"train": [{"path": "a.jsonl", "format": "orca"}]}, "format='orca' is not one of"),
        ({"train": [{"path": "a.jsonl", "weight": 0.0}]}, "isn't positive"),
        ({"train": [{"path": "a.jsonl", "weight": 0.8}], "mixture": "epoch"}, "no effect with data.mixture=epoch"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, tokenizer, change, message):
    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", numbered(3))])
    for key, value in change.items():
        setattr(cfg.data, key, [SourceConfig(**source) for source in value] if key == "train" else value)
    with pytest.raises(DataError, match=message.replace("[", r"\[").replace("*", r"\*")):
        build_loader(cfg, tokenizer, "train", 0, 1)
