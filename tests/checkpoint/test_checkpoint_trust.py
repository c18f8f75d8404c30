"""A checkpoint from a stranger: nothing in it is run, and no path leads out of its folder."""

import json
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from joint_train.checkpoint import layout
from joint_train.checkpoint.reader import Reader, stored_tensors
from joint_train.checkpoint.state import load_tensors
from joint_train.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    saved = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3)}
    dcp.save(saved, storage_writer=dcp.FileSystemWriter(tmp_path / "model"), no_dist=True)
    return tmp_path / "model"


def change(folder, act) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    act(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_what_torch_wrote_is_read(folder):
    assert stored_tensors(folder).keys() == {"a", "b", "c"}
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.tensor(0)}
    load_tensors(Reader(folder), tensors)
    assert tensors["a"].sum() == 15 and tensors["b"].sum() == 2 and tensors["c"] == 3


class Evil:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_a_pickle_that_does_something_is_refused_and_does_nothing(folder, tmp_path):
    change(folder, lambda metadata: setattr(metadata, "planner_data", Evil(tmp_path / "made")))
    with pytest.raises(CheckpointError, match=r"is refused: it names posix\.mkdir, which describes no tensor"):
        Reader(folder).read_metadata()
    assert not (tmp_path / "made").exists()
    pickle.loads((folder / ".metadata").read_bytes())  # what torch itself would have done
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("path", ["../other/__0_0.distcp", "/etc/passwd"])
def test_a_file_outside_the_folder_is_refused(folder, path):
    def lead_out(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = path

    change(folder, lead_out)
    with pytest.raises(CheckpointError, match=f"it names {path}, which is not in the folder"):
        Reader(folder).read_metadata()


def test_other_things_than_tensors_are_refused(folder):
    change(folder, lambda metadata: metadata.state_dict_metadata.update(x=BytesStorageMetadata()))
    with pytest.raises(CheckpointError, match="BytesStorageMetadata|other things than tensors"):
        Reader(folder).read_metadata()


@pytest.mark.parametrize("raw", [b"", b"not a pickle", b"\x80\x04}."])
def test_a_damaged_description_is_a_sentence(folder, raw):
    (folder / ".metadata").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"\.metadata is refused"):
        Reader(folder).read_metadata()


@pytest.mark.parametrize("name", ["../../.bashrc", "/etc/passwd"])
def test_a_manifest_names_only_files_of_its_folder(tmp_path, name):
    manifest = layout.Manifest(1, 1, "", "", {}, {}, {name: [1, "00000000"]})
    (tmp_path / layout.MANIFEST).write_bytes(manifest.to_bytes())
    with pytest.raises(layout.DamagedCheckpoint, match=f"it names {name}, which is not in the folder"):
        layout.read_manifest(tmp_path)
    assert json.loads((tmp_path / layout.MANIFEST).read_text())["files"] == {name: [1, "00000000"]}
