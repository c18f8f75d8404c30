"""The command `joint-train`: every command is a module, and answers `--help` quickly."""

import argparse
import os
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from joint_train import cli, command, progress
from joint_train.checkpoint.__main__ import main as checkpoints
from joint_train.errors import WriteError

ROOT = Path(__file__).parents[2]


def run(*words: str) -> tuple[subprocess.CompletedProcess, float]:
    """The command as the installed script starts it, and the CPU seconds that it took."""
    code = "import sys; sys.argv[0] = 'joint-train'; from joint_train.cli import main; main()"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_commands_are_modules_that_python_starts():
    for module, _, _ in cli.COMMANDS.values():
        assert find_spec(module), module
    done, seconds = run("--help")
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in cli.COMMANDS)
    assert seconds < 0.5
    assert run("--version")[0].stdout.startswith("joint-train ")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_takes_little_cpu(name):
    done, seconds = run(name, "--help")
    assert done.returncode == 0 and done.stdout.strip() and "Traceback" not in done.stderr, done.stderr
    assert seconds < 1.5  # 0.5 on a quiet machine; with torch and transformers it is above 3
    assert "torch" not in done.stderr


def test_an_unknown_command_and_a_mistake_behind_a_known_one():
    done, _ = run("evalute")
    assert done.returncode == 2 and "there is no command evalute. Did you mean evaluate?" in done.stderr
    done, _ = run("train", "optim.lrr=1")
    assert done.returncode == 2 and done.stderr.startswith("joint_train: optim.lrr is not a key.")


@pytest.mark.parametrize(
    "typed, expected",
    [
        ("joint-train evalu", ["evaluate"]),
        ("joint-train train optim.l", ["optim.lr="]),
        ("joint-train train model=gemma4_e", ["gemma4_e2b", "gemma4_e4b"]),
        ("joint-train plan +recipe=gemma4_31b_full_8", ["gemma4_31b_full_8gpu"]),
    ],
)
def test_completion_of_commands_keys_and_prepared_settings(typed, expected):
    asked = f"COMP_LINE='{typed}' COMP_POINT={len(typed)}\n_joint_train\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    script = f"{cli.completion()}\n{asked}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


def test_torchao_is_imported_only_where_it_is_asked_for():
    code = (
        "import sys; from joint_train.command import start, let_torchao_in\n"
        "start('x', lambda: __import__('transformers.modeling_utils') and None)\n"
        "assert sys.modules['torchao'] is None; let_torchao_in(); import torchao.optim.quant_utils"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


def test_numbers_of_options_are_checked_where_they_are_read():
    assert command.positive("12") == 12 and command.above_zero("0.5") == 0.5
    for read, texts in (
        (command.positive, ["0", "-3", "1.5", "x"]),
        (command.from_zero, ["-1", "1.5", "x"]),
        (command.above_zero, ["0", "-3", "nan", "inf", "x"]),
        (command.not_negative, ["-3", "nan", "inf", "x"]),
        (command.share, ["-0.1", "1.1", "nan", "x"]),
    ):
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a (whole )?number"):
                read(text)


def test_a_mistake_in_the_options_is_one_line_by_the_name_that_was_typed(capsys, monkeypatch):
    def said(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            checkpoints(list(words))
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert said("prune", "x", "--keep-last", "-1") == (
        "python -m joint_train.checkpoint prune: argument --keep-last: '-1' is not a whole number from 0. --help lists "
        "what it takes.\n"
    )
    monkeypatch.setattr(command.Parser, "started_as", "joint-train checkpoint")
    assert said("ls") == "joint-train checkpoint ls: the following are required: dir. --help lists what it takes.\n"
    assert said("lss").startswith("joint-train checkpoint: argument command: there is no such choice: 'lss' (choose")


def test_an_error_of_the_system_names_the_file_and_the_reason(tmp_path, capsys):
    assert command.start("x", lambda: (tmp_path / "no").read_bytes()) == 2
    assert capsys.readouterr().err == f"x: {tmp_path}/no: No such file or directory\n"
    assert command.sentence(WriteError("a can't be written")) == "a can't be written"


def test_long_work_logs_how_far_it_is_and_quick_work_nothing(caplog, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    caplog.set_level("INFO")
    assert list(progress.tracked("reading x", "abcdefg")) == list("abcdefg")
    assert caplog.messages == [f"reading x: {n} of 7 tensors, {4 * n} s" for n in (3, 6, 7)]
    caplog.clear()
    one_more = progress.counted("plans made")
    for _ in range(4):
        one_more()
    assert caplog.messages == ["plans made: 3 in 12 s"]
    caplog.clear()
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    assert list(progress.tracked("reading x", range(9))) == list(range(9)) and not caplog.messages
