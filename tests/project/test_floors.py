"""The floors of the package: a module imports only from its own floor or from those below, also inside functions."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import joint_train
from joint_train.config import KINDS
from joint_train.pair.divergence import DISTANCES

ROOT = Path(joint_train.__file__).parent
# From the ground up. Modules of one entry stand side by side; a package is one floor, without circles inside.
FLOORS = [
    ["errors", "lazy"],
    ["metrics", "files", "torch_private", "progress"],
    ["command"],
    ["starter"],
    ["config"],
    ["cli"],
    ["pair"],
    ["distributed"],
    ["checkpoint"],
    ["weights"],
    ["drafter"],
    ["plan"],
    ["data"],
    ["evaluate"],
    ["model_card"],
    ["run_export", "train"],
    ["export"],
    ["__main__", "retune"],
    ["loop"],
]
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}
FILES = sorted(file for file in ROOT.rglob("*.py") if file != ROOT / "__init__.py" and "conf" not in file.parts[-2:])
MODULES = {".".join(("joint_train", *file.relative_to(ROOT).with_suffix("").parts)): file for file in FILES}


def imports(module: str, file: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in inside if name in MODULES or f"{name}.__init__" in MODULES}
            names |= submodules if submodules == inside else submodules | {node.module}
    return {known for name in names for known in (name, f"{name}.__init__") if known in MODULES} - {module}


def floor(module: str) -> str:
    return module.split(".")[1]


GRAPH = {module: imports(module, file) for module, file in MODULES.items()}


def test_every_module_has_a_floor():
    assert {floor(module) for module in MODULES} == set(HEIGHT)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_below(module):
    above = {
        name for name in GRAPH[module] if floor(name) != floor(module) and HEIGHT[floor(name)] >= HEIGHT[floor(module)]
    }
    assert not above, f"{module} is on floor {floor(module)} and imports from above: {sorted(above)}"


def test_no_circles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for name in GRAPH[module]:
                visit(name, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_each_module_is_imported_alone():
    """In a process of its own, forked from one that holds the libraries: a circle shows in what is imported first."""
    script = """
import contextlib, importlib, os, sys
modules, ours = sys.argv[1:], {name.split(".")[0] for name in sys.argv[1:]}

def libraries_of(names):
    reads, writes = os.pipe()
    if not (pid := os.fork()):
        try:
            for name in names:
                importlib.import_module(name)
            with open(writes, "w") as pipe:
                pipe.write(" ".join(name for name in sys.modules if name.split(".")[0] not in ours))
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        os._exit(0)
    os.close(writes)
    with open(reads) as pipe:
        found = pipe.read().split()
    os.waitpid(pid, 0)
    return found

for library in libraries_of(modules):
    with contextlib.suppress(Exception):
        importlib.import_module(library)
for module in modules:
    libraries_of([module])
"""
    modules = [module.removesuffix(".__init__") for module in MODULES if not module.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", script, *modules], capture_output=True, text=True, timeout=580)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_configuration_needs_no_torch():
    script = "import sys, joint_train.config, joint_train.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


def test_the_mathematics_touches_no_files_and_no_process_groups():
    for module, file in MODULES.items():
        if floor(module) == "pair":
            text = file.read_text()
            assert not any(word in text for word in ("torch.distributed", "pathlib", "import os", "open(")), module


@pytest.mark.parametrize("folder", ["joint_train", "launch"])
def test_no_file_is_too_long(folder):
    lines = {str(file): len(file.read_text().split("\n")) for file in ROOT.parent.glob(f"{folder}/**/*.py")}
    assert not {file: n for file, n in lines.items() if n > 440}


def test_every_distance_has_a_name_in_the_configuration():
    assert set(KINDS) == {"ce", "ce_argmax", *DISTANCES}


def test_every_target_of_make_does_something():
    text = (ROOT.parent / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split()
    assert targets and not [t for t in targets if not re.search(rf"^{t}:( \S+$|.*\n\t)", text, re.M)]
    for line in (ROOT.parent / ".ci/run").read_text().splitlines():
        assert not line.startswith("make ") or line.split()[1] in targets, line
