"""Every command of every page: it is parsed by the module that it names, and its configuration is composed.

Commands that need GPUs, a cluster, weights or minutes aren't run to their end: what they are given is checked as they
check it themselves. What runs in seconds is run by the tests of its module."""

import argparse
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
import tomllib

import pytest
from documented import PAGES, ROOT, alternatives, commands

from joint_train import cli, config
from launch import submit

PAIR = ["model.base=b", "model.drafter=d", "data.train=x"]


class Parsed(Exception):
    """What an argument parser has made of a command, which isn't run."""


def parse_only(monkeypatch) -> None:
    """From here on the first parser that is asked raises what it found."""
    inside: list[str] = []

    def patched(name):
        original = getattr(argparse.ArgumentParser, name)

        def parse(self, *args, **kwargs):
            inside.append(name)
            try:
                found = original(self, *args, **kwargs)
            finally:
                inside.pop()
            if inside:
                return found
            raise Parsed(found)

        return parse

    for name in ("parse_args", "parse_known_args", "parse_known_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, patched(name))


def compose(overrides: list[str], ranks: int | None = None) -> None:
    """A configuration as the main job composes it; an example that names no pair or data gets some."""
    if any(word.startswith("+experiment=starter") for word in overrides):
        overrides = ["pair=p", *overrides]
    known = [word for word in PAIR if not any(f"{word.partition('=')[0]}=" in other for other in overrides)]
    if any(re.match(r"\+recipe=|model=", word) for word in overrides):
        known = [word for word in known if not word.startswith("model.")]
    config.load([*known, *overrides], ranks, ranks)


def check(words: list[str], monkeypatch) -> None:
    program, *words = words
    if program == "make":
        target = next((word for word in words if "=" not in word), "install")
        done = subprocess.run(["make", "-n", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), done.stderr
        return
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in words:
            if found := re.search(r"\[(.*)\]", word):
                assert set(found[1].split(",")) <= set(extras), word
        return
    if program == "joint-train":
        module, before, _ = cli.COMMANDS[words[0]]
        words = [*before, *words[1:]]
    elif "-m" in words:
        ranks = next((int(word) for word in words[: words.index("-m")] if word.isdigit()), None)
        module, words = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        if module == "torch.distributed.run":  # of a container
            module, words = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    else:
        assert program == "launch/local.sh" or not words
        return
    if "--help" in words or "-h" in words:
        assert importlib.util.find_spec(module)
    elif not words:  # it is only named
        assert importlib.util.find_spec(module)
    elif module == "joint_train":
        if not {"--version", "--cfg"} & set(words):
            compose(words, ranks if program == "torchrun" else None)
    elif module == "launch.submit":
        if "--" in words:
            at = words.index("--") + 1
            given = [word for word in PAIR if not any(word.split("=")[0] in w or "model=" in w for w in words[at:])]
            given += [] if any("data.train" in word for word in words[at:]) else ["data.train=x"]
            assert submit.main(["--dry-run", *words[:at], *given, *words[at:]]) == 0
    else:
        named = len(words) == 1 and words[0].isalpha() and words[0].islower()  # a command of the module, without more
        with monkeypatch.context() as patch, pytest.raises(SystemExit if named else Parsed) as parsed:
            patch.setattr(sys, "argv", [module, *words, *["--help"] * named])
            parse_only(patch)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        if named:
            assert parsed.value.code in (0, None)
            return
        found = parsed.value.args[0]
        namespace, rest = found if isinstance(found, tuple) else (found, [])
        overrides = [*getattr(namespace, "overrides", []), *rest]
        if overrides and module == "joint_train.plan":
            compose(overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_the_commands_of_a_page_are_taken_by_what_they_name(page, monkeypatch, tmp_path, capsys):
    for name, text in re.findall(r"```yaml\n# (\S+\.yaml)\n(.*?)```", page.read_text(), re.S):
        (tmp_path / name).write_text(text)  # a file that the page shows
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USER", "me")
    for command in dict.fromkeys(commands(page)):
        for words in alternatives(shlex.split(command)):
            try:
                check(words, monkeypatch)
            except (SystemExit, Exception) as error:
                output = capsys.readouterr()
                pytest.fail(f"{page.name}: {command}\n{type(error).__name__}: {error}\n{output.err[-600:]}")


def test_most_pages_have_commands():
    found = {page.name: list(commands(page)) for page in PAGES}
    assert sum(map(len, found.values())) > 70 and sum(map(bool, found.values())) > 18
