"""The tokenised cache: what it is keyed by, what is read again at a start, and damage."""

import builtins
import itertools
import json
import os
import shutil

import numpy as np
import pytest
from data_helpers import make_config, make_tokenizer, numbered, write_jsonl

from joint_train.data import build_loader, cache, digests, images
from joint_train.data.cache import FILES, META

TOKENIZER = make_tokenizer()


def rows(cfg, count=30) -> list[list[int]]:
    loader = build_loader(cfg, TOKENIZER, "train", 0, 1)
    return [batch["input_ids"].tolist() for batch in itertools.islice(loader, count)]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "flipped": flip,
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [META, "tokens.bin", "flags.bin", "documents.npy", "pictures.npy"])
def test_what_is_damaged_is_made_again(tmp_path, caplog, name, how):
    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", numbered(40))])
    expected = rows(cfg)
    (folder,) = [path.parent for path in (tmp_path / "cache").glob(f"*/{META}")]
    assert all((folder / file).exists() for file in FILES)
    DAMAGES[how](folder / name)
    assert rows(cfg) == expected
    assert f"{folder} is damaged" in caplog.text and name in caplog.text
    caplog.clear()
    assert rows(cfg) == expected and "damaged" not in caplog.text
    assert not list((tmp_path / "cache").glob("*tmp*"))


@pytest.mark.parametrize("odd", [lambda path: path.write_text(""), lambda path: path.symlink_to("nowhere")])
def test_what_is_no_folder_makes_way(tmp_path, caplog, odd):
    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", numbered(40))])
    expected = rows(cfg)
    (folder,) = [path.parent for path in (tmp_path / "cache").glob(f"*/{META}")]
    shutil.rmtree(folder)
    odd(folder)
    assert rows(cfg) == expected and f"{folder} is damaged" in caplog.text
    assert not list((tmp_path / "cache").glob("*tmp*"))


def test_a_damaged_block_of_a_stream_is_made_again(tmp_path, caplog):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "stream").mkdir()
    datasets.Dataset.from_list(numbered(60)).to_parquet(tmp_path / "stream" / "train.parquet")
    cfg = make_config(tmp_path, [{"path": str(tmp_path / "stream"), "streaming": True}])
    expected = rows(cfg)
    (block,) = (tmp_path / "cache").glob("*.stream/*/tokens.bin")
    flip(block)
    (block.parent.parent / "total.json").write_text("")
    assert rows(cfg) == expected and "is damaged" in caplog.text


def test_files_are_read_once_until_they_change(tmp_path, monkeypatch):
    """Not at every start, and not by every rank: by size, inode and times, which no change leaves as they are."""
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 0.0)
    path = tmp_path / "a.jsonl"
    cfg = make_config(tmp_path, [write_jsonl(path, numbered(40))])
    read = []
    monkeypatch.setattr(
        digests,
        "open",
        lambda name, *more: read.append(os.path.basename(name)) or builtins.open(name, *more),
        raising=False,
    )
    first = rows(cfg)
    assert read == ["a.jsonl"], "what was written here isn't read again either"
    assert rows(cfg) == first and read == ["a.jsonl"]
    # The same size, and the time of change put back: the content counts.
    before = path.stat()
    path.write_text(path.read_text().replace("n0;", "m0;"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert rows(cfg) != first and read == ["a.jsonl", "a.jsonl"]
    # Without a change of the content nothing is tokenised again.
    os.utime(path)
    rows(cfg)
    assert len(list((tmp_path / "cache").glob(f"*/{META}"))) == 2
    assert read == ["a.jsonl"] * 3


def test_a_file_that_was_just_changed_is_not_taken_for_known(tmp_path):
    """Two changes within the granularity of a file system's clock look like one."""
    path, notes = tmp_path / "a", tmp_path / "cache"
    path.write_text("one")
    first = digests.digest(path, notes)
    state = os.stat(path)
    path.write_text("two")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digests.digest(path, notes) != first
    assert not list(notes.glob("digests/*.json"))


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    (tmp_path / "file").write_text("")
    assert digests.digest(path, tmp_path / "file") == digests.digest(path, tmp_path / "cache")


def test_documents_are_mapped(tmp_path):
    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", numbered(40))])
    cached = cache.tokenised(cfg.data.train[0], cfg.data, TOKENIZER, 0, 60)
    for array in (cached.documents, cached._tokens):
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        assert isinstance(owner, np.memmap) or not owner.flags.owndata


# Pictures that are files: the rows are the same, the pictures are those of the folder.


def keys_of(folder, cfg) -> set[str]:
    cfg.data.train[0].path = str(folder / "a.jsonl")
    cached = cache.tokenised(cfg.data.train[0], cfg.data, TOKENIZER, 0, 60)
    return {cached.picture(index) for index in range(len(cached.pictures))}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders with the same rows and other pictures; a picture has a soft token for each byte of its file."""
    monkeypatch.setattr(TOKENIZER, "image_token_id", TOKENIZER.convert_tokens_to_ids("<|image|>"), raising=False)
    for name in ("boi_token_id", "eoi_token_id"):
        monkeypatch.setattr(TOKENIZER, name, TOKENIZER.convert_tokens_to_ids("<|channel>"), raising=False)
    template = TOKENIZER.chat_template
    shown = "message['content'] | trim"
    parts = "(message['content'] if message['content'] is string else '<|image|>look')"
    monkeypatch.setattr(TOKENIZER, "chat_template", template.replace(shown, parts))
    monkeypatch.setattr(
        images, "pixels", lambda path, folder: {"num_soft_tokens_per_image": np.array(os.path.getsize(path))}
    )
    content = [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "look"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]}
    for name, size in (("one", 3), ("two", 5)):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", [row] * 4)
        (tmp_path / name / "cat.png").write_bytes(b"x" * size)
    return tmp_path, make_config(tmp_path, [str(tmp_path / "one" / "a.jsonl")])


def soft_tokens(folder, cfg) -> set[int]:
    cfg.data.train[0].path = str(folder / "a.jsonl")
    return set(cache.tokenised(cfg.data.train[0], cfg.data, TOKENIZER, 0, 60).pictures["tokens"].tolist())


def test_the_same_rows_in_another_folder_have_its_pictures(folders):
    root, cfg = folders
    for _ in range(2):
        for name, size in (("one", 3), ("two", 5)):
            assert keys_of(root / name, cfg) == {str(root / name / "cat.png")}
            assert soft_tokens(root / name, cfg) == {size}
    assert len(list((root / "cache").glob(f"*/{META}"))) == 2


def test_a_picture_that_changed_is_looked_at_again(folders):
    root, cfg = folders
    assert soft_tokens(root / "one", cfg) == {3}
    (root / "one" / "cat.png").write_bytes(b"x" * 7)
    assert soft_tokens(root / "one", cfg) == {7}


def test_a_moved_folder_works_and_its_position_holds(folders):
    root, cfg = folders
    before = build_loader(cfg, TOKENIZER, "train", 0, 1)
    shutil.move(root / "one", root / "three")
    assert soft_tokens(root / "three", cfg) == {3} and keys_of(root / "three", cfg) == {str(root / "three" / "cat.png")}
    cfg.data.train[0].path = str(root / "three" / "a.jsonl")
    build_loader(cfg, TOKENIZER, "train", 0, 1, position=json.loads(json.dumps(before.position)))
