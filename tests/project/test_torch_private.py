"""Private parts of torch: all of them are there, and only one module names them."""

import ast
import re
from pathlib import Path

import pytest
import torch

import joint_train
from joint_train import torch_private

ROOT = Path(joint_train.__file__).parent
# What objects of torch have beside that, and what its public ways to extend it say to read or to override.
OF_OBJECTS = {
    "_version",  # of a tensor: how often it was written
    "_cdata",  # of a storage: which one it is
    "_schema", "_overloadpacket",  # of an operation under a TorchDispatchMode
    "_buffers",  # of a module
}  # fmt: skip
OF_OTHERS = {
    "_exit", "_replace",  # Python's
    "_gradient_checkpointing_func",
    "_attn_implementation", "_name_or_path", "_is_hf_initialized", "_keys_to_ignore_on_load_unexpected",
    "_get_candidate_generator",  # of a model or configuration of transformers
    "_fingerprint",  # of a data set
    "_get_full_key",  # of a node of OmegaConf
}  # fmt: skip


@pytest.mark.parametrize("path", torch_private.PRIVATE)
def test_this_torch_has_it(path):
    torch_private.find(path)


def test_one_that_torch_has_moved_is_named(monkeypatch):
    for path in ("torch.optim._gone.newton", "torch.optim.Gone", "torch.nn.Module.gone"):
        monkeypatch.setitem(torch_private.PRIVATE, path, "optim.name=muon stops")
        with pytest.raises(
            ImportError, match=rf"^torch {re.escape(torch.__version__)} has no {path}: optim.name=muon s"
        ):
            torch_private.find(path)


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(text: str) -> list[str]:
    """What a module names of torch that is private: imports, names inside of what it imports, and of other objects."""
    tree, found = ast.parse(text), []
    modules = {"torch": "torch"}  # names in the module, by what they stand for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    modules[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    found += [alias.name] if any(map(private, alias.name.split("."))) else []
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                modules[alias.asname or alias.name] = path
                found += [path] if any(map(private, path.split("."))) else []
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and private(node.attr)]
    own = {node.attr for node in attributes if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"}
    for node in attributes:
        names = ast.unparse(node).split(".")
        if names[0] in modules:
            path = ".".join([modules[names[0]], *names[1:]])
            if path.rpartition(".")[2] not in OF_OBJECTS:
                found.append(path)
        elif re.fullmatch(r"\w+\(.*\)|\w+", names[0]) and names[0] not in ("self", "cls", "super()"):
            if node.attr not in OF_OBJECTS | OF_OTHERS | own:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "text, expected",
    [
        ("from torch.optim._muon import Muon", ["torch.optim._muon.Muon"]),
        ("from torch.serialization import _get_layout as layout", ["torch.serialization._get_layout"]),
        ("import torch._dynamo", ["torch._dynamo"]),
        ("import torch\ntorch._foreach_norm([])", ["torch._foreach_norm"]),
        ("import torch.distributed as dist\ndist.c10d._get(1)", ["torch.distributed.c10d._get"]),
        ("from torch.distributed.checkpoint import filesystem\nfilesystem._Info", [
            "torch.distributed.checkpoint.filesystem._Info"
        ]),
        ("def f(root):\n    root._get_fsdp_state()", ["root._get_fsdp_state"]),
        ("import torch\ntorch.__version__\nself._own = torch.ones(1)._version", []),
    ],
)  # fmt: skip
def test_private_names_are_found(text, expected):
    assert private_names(text) == expected


def test_no_other_module_names_one():
    named = {}
    for file in ROOT.rglob("*.py"):
        if file.name != "torch_private.py" and "conf" not in file.parts:
            text = file.read_text()
            if found := [name for name in private_names(text) if "chat_template_utils" not in name]:
                named[str(file.relative_to(ROOT))] = found
    # The drafter's own cache of its routing, set where a plan is made.
    assert named == {"plan/step.py": ["model._token_centroid"]}


def test_every_part_is_used():
    text = Path(torch_private.__file__).read_text()
    uses = set(re.findall(r'find\("([\w.]+)"\)', text)) | set(re.findall(r'^        "(torch[\w.]+)",$', text, re.M))
    overridden = {"torch.distributed.checkpoint.FileSystemReader._slice_file"}
    assert uses | overridden == torch_private.PRIVATE.keys()
    assert "def _slice_file(" in (ROOT / "checkpoint/reader.py").read_text()
