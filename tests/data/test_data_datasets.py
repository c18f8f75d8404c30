"""Parquet and Hugging Face datasets, whole and streamed; without the packages, an error that says what to install."""

import collections
import itertools
import sys

import pytest
import torch
from data_helpers import chat, make_config, make_tokenizer, numbered, write_jsonl

from joint_train.data import DataError, build_loader, loader_position
from joint_train.data.readers import open_dataset

datasets = pytest.importorskip("datasets")
TOKENIZER = make_tokenizer()


@pytest.fixture(autouse=True)
def local_only(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def take(loader, count):
    return [batch["input_ids"] for batch in itertools.islice(iter(loader), count)]


def reference_rows(tmp_path, examples, count, **options):
    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "reference.jsonl", examples)], **options)
    return take(build_loader(cfg, TOKENIZER, "train", 0, 1), count)


@pytest.mark.parametrize("kind", ["parquet", "folder", "saved", "saved dict", "limited stream"])
def test_whole_datasets_give_the_rows_of_the_same_jsonl(tmp_path, kind):
    examples = numbered(100)
    made = datasets.Dataset.from_list(examples)
    source = {"path": str(tmp_path / "set")}
    if kind == "parquet":
        source["path"] = str(tmp_path / "set-*.parquet")
        made.select(range(60)).to_parquet(tmp_path / "set-0.parquet")
        made.select(range(60, 100)).to_parquet(tmp_path / "set-1.parquet")
    elif kind == "saved":
        made.save_to_disk(tmp_path / "set")
    elif kind == "saved dict":
        datasets.DatasetDict(train=made).save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        made.to_parquet(tmp_path / "set" / "train.parquet")
        if kind == "limited stream":
            source |= {"streaming": True, "limit": 100}
    cfg = make_config(tmp_path, [source])
    rows = take(build_loader(cfg, TOKENIZER, "train", 0, 1), 40)
    assert torch.equal(torch.cat(rows), torch.cat(reference_rows(tmp_path, examples, 40)))


def test_columns_and_split(tmp_path):
    made = datasets.Dataset.from_list([{"problem": f"n{i};", "solution": "x", "lang": "py"} for i in range(9)])
    datasets.DatasetDict(test=made).save_to_disk(tmp_path / "set")
    source = {
        "path": str(tmp_path / "set"),
        "split": "test",
        "format": "prompt_response",
        "columns": {"prompt": "problem", "response": "solution"},
    }
    loader = build_loader(make_config(tmp_path, [source]), TOKENIZER, "train", 0, 1)
    text = TOKENIZER.decode(take(loader, 1)[0][0])
    assert "user\nn" in text and "model\nx<turn|>" in text


@pytest.mark.parametrize("package, path", [("pyarrow", "set.parquet"), ("datasets", "some/dataset")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, path):
    (tmp_path / "set.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    cfg = make_config(tmp_path, [str(tmp_path / path) if path.endswith("parquet") else path])
    with pytest.raises(DataError, match=rf"needs the {package} package: pip install 'joint-train\[data\]'"):
        build_loader(cfg, TOKENIZER, "train", 0, 1)


def test_a_dataset_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="data source nobody/nothing: there is no file .* can't be opened as a dataset"):
        build_loader(make_config(tmp_path, ["nobody/nothing"]), TOKENIZER, "train", 0, 1)


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "set.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="set.parquet:1: can't be read"):
        build_loader(make_config(tmp_path, [str(tmp_path / "set.parquet")]), TOKENIZER, "train", 0, 1)


def test_a_dataset_that_changed_is_tokenised_again(tmp_path):
    for prefix in "ab":
        datasets.Dataset.from_list(numbered(5, prefix)).save_to_disk(tmp_path / prefix)
        (tmp_path / "set").unlink(missing_ok=True)
        (tmp_path / "set").symlink_to(tmp_path / prefix)
        loader = build_loader(make_config(tmp_path, [str(tmp_path / "set")]), TOKENIZER, "train", 0, 1)
        assert f"user\n{prefix}" in TOKENIZER.decode(take(loader, 1)[0][0])


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_bad_row_is_named(tmp_path, kind):
    made = datasets.Dataset.from_list([*numbered(2), {"messages": [{"role": "wizard", "content": "x"}]}])
    path = str(tmp_path / "set.parquet" if kind == "parquet" else tmp_path / "set")
    made.to_parquet(path) if kind == "parquet" else made.save_to_disk(path)
    with pytest.raises(DataError, match=rf"{path}:3: message 0 has the unknown role 'wizard'"):
        build_loader(make_config(tmp_path, [path]), TOKENIZER, "train", 0, 1)


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """A source of 100 streamed examples in three files, read in blocks of 32."""
    monkeypatch.setattr("joint_train.data.streams.BLOCK", 32)
    monkeypatch.setattr("joint_train.data.rows.BLOCK", 50)
    (tmp_path / "stream").mkdir()
    for number, part in enumerate((range(0, 40), range(40, 90), range(90, 100))):
        made = datasets.Dataset.from_list([numbered(100)[index] for index in part])
        made.to_parquet(tmp_path / "stream" / f"train-{number}.parquet")
    return {"path": str(tmp_path / "stream"), "streaming": True}


def test_a_stream_repeats_each_example_evenly(tmp_path, stream):
    loader = build_loader(make_config(tmp_path, [stream], packing=False), TOKENIZER, "train", 0, 1)
    texts = [TOKENIZER.decode(row[0]) for row in take(loader, 300)]
    names = [text.split("user\n")[1].split(";")[0] for text in texts]
    assert collections.Counter(names) == {f"n{i}": 3 for i in range(100)}
    assert names[:100] != [f"n{i}" for i in range(100)], "shuffled"
    assert names[:50] != names[100:150], "each time in another order"
    blocks = [[int(name[1:]) - first for name in names[first : first + 32]] for first in (0, 32)]
    assert blocks[0] != blocks[1], "each block in an order of its own"


def test_an_unshuffled_stream_is_the_jsonl_in_order(tmp_path, stream):
    rows = take(build_loader(make_config(tmp_path, [stream], shuffle=False), TOKENIZER, "train", 0, 1), 30)
    assert torch.equal(torch.cat(rows), torch.cat(reference_rows(tmp_path, numbered(100), 30, shuffle=False)))


def test_a_stream_resumes_to_the_sample_on_other_ranks_and_workers(tmp_path, stream):
    other = {"path": write_jsonl(tmp_path / "b.jsonl", numbered(9, "b")), "weight": 0.5}
    cfg = make_config(tmp_path, [stream, other])
    reference = take(build_loader(cfg, TOKENIZER, "train", 0, 1), 60)

    got, position = [], None
    # Four workers share three files.
    for number, (size, workers, steps) in enumerate([(2, 1, 5), (1, 4, 7), (4, 0, 8), (3, 2, 3)]):
        cfg.data.num_workers = workers
        cfg.data.cache_dir = str(tmp_path / f"cache{number}")  # another machine: nothing is tokenised there yet
        loaders = [build_loader(cfg, TOKENIZER, "train", rank, size, position=position) for rank in range(size)]
        for batches in itertools.islice(zip(*loaders, strict=True), steps):
            got += [batch["input_ids"] for batch in batches]
        assert len({str(loader_position(loader)) for loader in loaders}) == 1
        position = loader_position(loaders[0])
    assert torch.equal(torch.cat(got), torch.cat(reference)[: len(got)])


def test_a_stream_resumes_in_a_later_pass_on_another_machine(tmp_path, stream):
    """Its first block there lies beyond the stream's end, which nobody has seen there yet."""
    cfg = make_config(tmp_path, [stream], packing=False)
    loader = build_loader(cfg, TOKENIZER, "train", 0, 1)
    batches = iter(loader)
    for _ in range(250):
        next(batches)
    position = loader_position(loader)
    expected = [next(batches)["input_ids"] for _ in range(60)]
    cfg.data.cache_dir = str(tmp_path / "elsewhere")
    resumed = take(build_loader(cfg, TOKENIZER, "train", 0, 1, position=position), 60)
    assert all(map(torch.equal, resumed, expected))


def test_a_streams_bad_records(tmp_path, stream):
    made = datasets.Dataset.from_list([chat("q", "a"), {"messages": [{"role": "wizard", "content": "x"}]}] * 20)
    made.to_parquet(tmp_path / "stream" / "train-1.parquet")
    cfg = make_config(tmp_path, [stream])
    with pytest.raises(DataError, match=r"stream:42: message 0 has the unknown role 'wizard'"):
        take(build_loader(cfg, TOKENIZER, "train", 0, 1), 90)
    cfg.data.on_error = "skip"
    take(build_loader(cfg, TOKENIZER, "train", 0, 1), 90)


@pytest.mark.parametrize("split, options", [("val", {}), ("train", {"mixture": "epoch"})])
def test_a_stream_has_no_epoch(tmp_path, stream, split, options):
    with pytest.raises(DataError, match="a stream's length isn't known"):
        build_loader(make_config(tmp_path, [stream], [stream], **options), TOKENIZER, split, 0, 1)


def test_the_stream_itself_is_what_the_blocks_hold(tmp_path, stream):
    from joint_train.config import SourceConfig

    rows = list(open_dataset(SourceConfig(**stream)))
    assert [row["messages"] for row in rows] == [example["messages"] for example in numbered(100)]


def test_what_only_a_part_would_be_read_of_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_arrays([["Q"], ["A"], ["B"]], names=["prompt", "response", "response"])
    pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="twice.parquet:1: two columns are called 'response'"):
        build_loader(make_config(tmp_path, [str(tmp_path / "twice.parquet")]), TOKENIZER, "train", 0, 1)
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set/a.jsonl", numbered(2))
    (tmp_path / "set/about.json").write_text("{}")
    datasets.Dataset.from_list(numbered(3)).to_parquet(tmp_path / "set/b.parquet")
    with pytest.raises(
        DataError, match=r"files of several kinds \(.jsonl, .parquet\), of which only one would be read"
    ):
        build_loader(make_config(tmp_path, [str(tmp_path / "set")]), TOKENIZER, "train", 0, 1)
