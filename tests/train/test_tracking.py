"""metrics.jsonl, wandb, TensorBoard and the console."""

import io
import json
import logging
import math
import re
import subprocess
import sys
import types

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from joint_train import command, files
from joint_train.config import ConfigError, load, with_overrides
from joint_train.train import trackers, tracking
from joint_train.train.tracking import ConsoleLines, JsonLines, Tracker

STEP = {"base_loss": 5.25, "drafter_loss": 6.5, "tokens_per_second": 12345.6, "bad_steps": 0}


def config(tmp_path, *overrides: str):
    defaults = ["tracking.wandb=disabled", "model.base=b", "model.drafter=d", f"output_dir={tmp_path / 'run'}"]
    return load([*defaults, "data.train=[{path: unused}]", *overrides])


def records(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def steps(tmp_path) -> list[int]:
    return [record["step"] for record in records(tmp_path)]


# metrics.jsonl


def test_one_object_a_step_and_only_rank_0_writes(tmp_path):
    for rank in (1, 0):
        tracker = Tracker(config(tmp_path), rank)
        tracker.log(1, STEP)
        tracker.log(2, {"base_loss": float("nan"), "drafter_loss": float("inf")})
        tracker.close()
        assert (tmp_path / "run").exists() == (rank == 0)
    first, second = records(tmp_path)
    assert {"step": 1, **STEP}.items() <= first.items()
    assert (second["base_loss"], second["drafter_loss"]) == (None, None)  # JSON has no NaN
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").model.base == "b"


@pytest.mark.parametrize("resumed", [3, 5, 7])
def test_a_resumed_run_has_every_step_once(tmp_path, resumed):
    tracker = Tracker(config(tmp_path), 0)
    for step in range(8):
        tracker.log(step, {**STEP, "run": 1})
    tracker.close()
    tracker = Tracker(config(tmp_path), 0, resumed)
    for step in range(resumed + 1, 11):
        tracker.log(step, {**STEP, "run": 2})
    tracker.close()
    assert steps(tmp_path) == list(range(11))
    assert [r["run"] for r in records(tmp_path)] == [1] * (resumed + 1) + [2] * (10 - resumed)
    dropped = tmp_path / "run" / "metrics.dropped.jsonl"
    kept = [json.loads(line)["step"] for line in dropped.read_text().splitlines()] if dropped.exists() else []
    assert kept == list(range(resumed + 1, 8))


def test_a_line_torn_by_a_crash_is_taken_away(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a"')
    JsonLines(path, 2).close()
    assert path.read_text() == '{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n'


def test_a_step_that_is_there_twice_is_kept_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 1, "a": 2}\n{"step": 2, "a": 2}\n')
    JsonLines(path, 2).close()
    assert path.read_text() == '{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n'
    assert path.with_suffix(".dropped.jsonl").read_text() == '{"step": 1, "a": 2}\n'


def test_a_fresh_run_in_an_old_folder_starts_anew_and_loses_nothing(tmp_path):
    for _ in range(2):
        tracker = Tracker(config(tmp_path), 0)
        tracker.log(0, STEP)
        tracker.log(1, STEP)
        tracker.close()
    assert steps(tmp_path) == [0, 1]
    assert len((tmp_path / "run" / "metrics.dropped.jsonl").read_text().splitlines()) == 2


def test_a_crash_while_the_file_is_cut_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"step": step}) + "\n" for step in range(5))
    path.write_text(text)

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(path, 2)
    assert path.read_text() == text


def test_records_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    tracker = Tracker(config(tmp_path), 0)
    tracker.log(1, STEP)
    assert steps(tmp_path) == [1]  # the file is still open
    tracker.close()
    tracker.close()


# wandb


class FakeRun:
    offline, dir, name = True, "/runs/wandb/offline-run-1/files", "run"

    def __init__(self):
        self.artifacts = []
        self.logged, self.defined, self.finished = [], {}, False

    def define_metric(self, name, step_metric=None):
        self.defined[name] = step_metric

    def log(self, values):
        self.logged.append(values)

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A wandb that remembers how it was used."""
    fake = types.SimpleNamespace(
        inits=[], runs=[], Settings=lambda **kw: kw, Table=lambda columns, data: (columns, data),
        Artifact=lambda name, type: types.SimpleNamespace(name=name, type=type, add_dir=lambda folder: None),
    )  # fmt: skip

    def init(**kwargs):
        fake.inits.append(kwargs)
        fake.runs.append(FakeRun())
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    monkeypatch.setenv("HOME", "/nonexistent")
    return fake


def test_wandb_goes_on_under_the_same_id_after_a_requeue(tmp_path, wandb):
    for step in (0, 4):
        tracker = Tracker(config(tmp_path, "tracking.wandb=auto"), 0, step)
        tracker.log(step + 1, STEP)
        tracker.examples(step + 1, [{"prompt": "p", "text": "t"}])
        tracker.close()
    first, second = wandb.inits
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert (first["mode"], first["name"]) == ("offline", "run")
    assert first["config"]["drafter"]["pairing"] == "serving" and "torch" in first["config"]["versions"]
    assert wandb.runs[1].logged == [{"step": 5, **STEP}, {"step": 5, "examples": (["prompt", "text"], [["p", "t"]])}]
    assert wandb.runs[1].finished
    assert wandb.runs[1].defined == {"step": None, "*": "step"}  # wandb's own counter can't go back
    tracker = Tracker(config(tmp_path, "tracking.wandb=auto"), 0)
    tracker.log(1, STEP)
    assert wandb.inits[2]["id"] != first["id"]  # a fresh run is another run


@pytest.mark.parametrize("method", ["init", "log"])
def test_a_wandb_that_fails_is_turned_off_and_the_run_goes_on(tmp_path, wandb, monkeypatch, caplog, method):
    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(wandb if method == "init" else FakeRun, method, fail)
    tracker = Tracker(config(tmp_path, "tracking.wandb=online"), 0)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            tracker.log(step, STEP)
        tracker.examples(3, [{"prompt": "p"}])
        tracker.finish(STEP, STEP)
        tracker.close()
    assert [r.getMessage() for r in caplog.records].count(
        "wandb failed and is off for the rest of the run: ConnectionError: no network"
    ) == 1
    assert steps(tmp_path) == [1, 2, 3]


def test_a_wandb_that_never_finishes_is_left_behind(tmp_path, wandb, monkeypatch, caplog):
    import threading

    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(FakeRun, "finish", lambda self: threading.Event().wait(30))
    tracker = Tracker(config(tmp_path, "tracking.wandb=online"), 0)
    tracker.log(1, STEP)
    with caplog.at_level(logging.WARNING):
        tracker.close()
    assert "wandb sync" in caplog.text


def test_wandb_is_online_only_with_a_key(monkeypatch, tmp_path, wandb):
    assert trackers.wandb_mode("auto") == "offline"
    assert trackers.wandb_mode("online") == "online"
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert trackers.wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert trackers.wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert trackers.wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert trackers.wandb_mode("auto") == "disabled"


def test_wandb_says_how_to_upload_and_takes_the_export_where_asked(tmp_path, wandb, caplog):
    caplog.set_level(logging.INFO)
    for part in ("base", "drafter"):
        (tmp_path / "export" / part).mkdir(parents=True)
        (tmp_path / "export" / part / "config.json").touch()
    for wanted in (False, True):
        overrides = ("tracking.wandb=auto", f"tracking.log_export={str(wanted).lower()}")
        tracker = Tracker(config(tmp_path, *overrides), 0)
        tracker.log(1, STEP)
        tracker.exported(tmp_path / "export")
        names = [(artifact.name, artifact.type) for artifact in wandb.runs[-1].artifacts]
        assert names == ([("run-base", "model"), ("run-drafter", "model")] if wanted else [])
    assert "wandb is offline; to upload the run later: wandb sync /runs/wandb/offline-run-1" in caplog.text
    with pytest.raises(ConfigError, match="no key of wandb here"):
        trackers.check_wandb(config(tmp_path, "tracking.wandb=online").tracking, 0)
    trackers.check_wandb(config(tmp_path, "tracking.wandb=offline").tracking, 0)


@pytest.mark.parametrize("resumed, kept", [(0, []), (4, [0, 4])])
def test_generated_texts_are_in_a_file_each_step_once(tmp_path, resumed, kept):
    tracker = Tracker(config(tmp_path), 0)
    file = tmp_path / "run" / "generations.jsonl"
    assert not file.exists()
    for step in (0, 4, 8):
        tracker.examples(step, [{"prompt": "p", "text": "größer", "tokens_per_forward": 1.5}])
    tracker.close()
    tracker = Tracker(config(tmp_path), 0, resumed)
    tracker.examples(9, [{"prompt": "q"}])
    tracker.close()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["step"] for record in found] == [*kept, 9] and found[-1]["examples"] == [{"prompt": "q"}]
    assert len((tmp_path / "run" / "generations.dropped.jsonl").read_text().splitlines()) == 3 - len(kept)


def test_wandb_isnt_imported_where_it_is_off(tmp_path):
    code = f"""
import sys
from joint_train.config import load, with_overrides
from joint_train.train.tracking import Tracker
pair = ["model.base=x", "model.drafter=x", "data.train=[{{path: x}}]"]
cfg = load([*pair, "output_dir={tmp_path / "run"}", "tracking.wandb=disabled"])
tracker = Tracker(cfg, 0)
tracker.log(1, {{"base_loss": 1.0}})
tracker.close()
print(sorted({{"wandb", "torch", "tensorboard"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_real_offline_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (0, 1):
        tracker = Tracker(config(tmp_path, "tracking.wandb=auto"), 0, step)
        tracker.log(step + 1, STEP)
        tracker.examples(step + 1, [{"prompt": "p", "text": "t"}])
        tracker.close()
    run_id = (tmp_path / "run" / "wandb" / "run_id").read_text().strip()
    files = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2 and all(file.stat().st_size > 0 for file in files)


# TensorBoard


def test_tensorboard_without_its_package_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        Tracker(with_overrides(config(tmp_path), {"tracking.tensorboard": True}), 0)


def test_tensorboard_gets_scalars_and_texts(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append(("open", purge_step))

        def __getattr__(self, name):
            return lambda *args: calls.append((name, *args))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    tracker = Tracker(with_overrides(config(tmp_path), {"tracking.tensorboard": True}), 0, 4)
    tracker.log(5, {"base_loss": 1.5})
    tracker.examples(5, [{"prompt": "p"}])
    tracker.close()
    assert calls == [
        ("open", 5), ("add_scalar", "base_loss", 1.5, 5), ("add_text", "examples/0", "**prompt**\n\np", 5), ("close",)
    ]  # fmt: skip


# the console


def lines(cfg, terminal: bool = False, first: int = 0) -> tuple[ConsoleLines, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=terminal, soft_wrap=not terminal, highlight=False)
    return ConsoleLines(cfg, first, console=console), out


def test_a_log_has_plain_lines_with_what_matters(tmp_path):
    more = ("lora.r=4", "optim.drafter_ema=0.9", "model.export.drafter_last=true")
    console, out = lines(config(tmp_path, "max_steps=100000", *more))
    console.log(0, {"val/base_loss": 8.34, "val/drafter_loss": 8.1, "val/tokens_per_forward": 1.0})
    console.log(99_998, STEP)
    console.printed = -math.inf
    rates = {"lr": 1e-5, "drafter_lr": 1e-4, "grad_norm": 1.234, "epoch": 1.43}
    console.log(99_999, {**STEP, **rates, "tokens_per_second": 98_765_432.0, "bad_steps": 12})
    console.log(100_000, {"base_loss": 123.456, "drafter_loss": 234.567, "tokens_per_second": 1.0})
    console.finish({"val/base_loss": 8.34}, {"val/base_loss": 2.5})
    text = out.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines() if "Hugging Face" not in line and " of 100000" not in line)
    assert "\x1b" not in text
    numbers = r"base 5\.250  drafter 6\.500  lr 1\.0e-5, 1\.0e-4  grad 1\.23  98\.8M tok/s  0:00 left  bad 12"
    assert re.search(rf"^\d\d-\d\d \d\d:\d\d:\d\d  step 99999 of 100000, epoch 1\.4  {numbers}$", text, re.M)
    assert "step 0: validation  base 8.340  drafter 8.100  1.00 tokens/forward" in text
    assert re.search(r"base loss +8\.340 +2\.500", text)
    for part in ("base", "drafter", "drafter_last", "adapter"):
        assert f"Hugging Face {part}: {tmp_path / 'run' / 'export' / part}\n" in text


def test_a_log_says_a_beginning_epoch_and_the_drafters_rate_alone(tmp_path):
    for epoch, shown in ((0.0023, "0.002"), (0.0, "0.0"), (1.43, "1.4")):
        console, out = lines(config(tmp_path, "max_steps=460"))
        console.log(120, {**STEP, "epoch": epoch, "lr": 0.0, "drafter_lr": 2e-4})
        assert f"  step 120 of 460, epoch {shown}  base 5.250" in out.getvalue() and "  lr 2.0e-4  " in out.getvalue()


def test_a_log_isnt_flooded_but_gets_its_last_step(tmp_path):
    console, out = lines(config(tmp_path, "max_steps=100"))
    for step in range(1, 101):
        console.log(step, STEP)
    assert [line.split()[3:6] for line in out.getvalue().splitlines()] == [["1", "of", "100"], ["100", "of", "100"]]


def test_a_jump_of_the_loss_is_said_at_once(tmp_path):
    console, out = lines(config(tmp_path, "max_steps=100"))
    for step in range(1, 10):
        console.log(step, {**STEP, "loss_spike": float(step == 7)})
    assert [line for line in out.getvalue().splitlines() if "jumped" in line] == [
        "step 7: the loss jumped; see metrics.jsonl"
    ]


def test_what_cannot_be_measured_is_a_dash_and_explained_once(tmp_path):
    nan = math.nan
    measured = {f"agreement_{k}": 0.5 for k in range(2)} | {"accepted_length_expected": 1.5, "base_accuracy": 0.5}
    for rounds, said in (
        (2, "every round"),
        (1, "round 1: its loss is the mean over the others"),
        (0, "nothing to measure it by"),
    ):
        console, out = lines(config(tmp_path, "max_steps=2"))
        short = {**measured, **{f"agreement_{k}": nan for k in range(rounds, 2)}, "accepted_length_expected": nan}
        record = {**STEP, "drafter_loss": 6.5 if rounds else nan, **short}
        for step in (1, 2):
            console.log(step, record | {f"val/{name}": value for name, value in record.items()})
        validation = {f"val/{name}": value for name, value in record.items()}
        console.finish(
            validation,
            {**validation, **{f"val/{name}": value for name, value in measured.items()}, "val/drafter_loss": 6.0},
        )
        text = out.getvalue()
        assert "nan" not in text and text.count(said) == 2  # of the batches and of the validation data, once each
        assert ("drafter –" in text) == (rounds == 0)
        assert re.search(r"accepted length, expected +– +1\.500", text)
    console, out = lines(config(tmp_path))
    console.log(1, {**STEP, "drafter_loss": nan, **measured})
    assert "drafter nan" in out.getvalue() and "–" not in out.getvalue()  # a loss that diverged is no missing one


def test_a_terminal_gets_a_bar_that_fits(tmp_path):
    console, out = lines(config(tmp_path, "max_steps=2000"), terminal=True)
    console.log(1000, STEP)
    console.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    last = [line for line in re.split(r"[\r\n]+", shown) if line.strip()][-1]
    assert "1000/2000" in last and "base 5.250" in last and "drafter 6.500" in last and "12.3k tok/s" in last
    assert len(last.rstrip()) <= 80 and "…" not in last


def test_log_lines_are_printed_above_the_bar(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    log = logging.Logger("above the bar")
    log.addHandler(command.StderrLines())
    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        console, out = lines(config(tmp_path, "max_steps=2000"), terminal=True)
        log.warning("a checkpoint was passed over")
        console.close()
        log.warning("the end")
        above = stderr.isatty()
        assert ("a checkpoint was passed over\n" in out.getvalue()) == above
        assert stderr.getvalue() == ("" if above else "a checkpoint was passed over\n") + "the end\n"


def test_time_left_comes_from_the_steps_of_this_run(tmp_path, monkeypatch):
    """And not from what came before the first of them: loading, and a first step that compiles and warms up."""
    now = 1000.0
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now)
    console, out = lines(config(tmp_path, "max_steps=100"), first=49)
    console.log(50, STEP)
    assert "left" not in out.getvalue()
    now += 30
    console.log(60, STEP)
    assert "2:00 left" in out.getvalue()  # 10 steps took 30 s; 40 are left


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3675, "1:01:15"), (90000, "1d 01h")]
)
def test_durations(seconds, text):
    assert tracking.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (999.6, "1.0k"), (12345, "12.3k"), (123456, "123k"), (1.2e6, "1.2M")]
)
def test_short_numbers(number, text):
    assert tracking.short_number(number) == text


def test_code_version_names_the_commit_of_this_tree():
    version = files.code_version()
    assert {"joint-train", "torch", "transformers"} <= set(version)
    if "commit" in version:
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", version["commit"])


def test_code_version_tells_an_edited_tree(tmp_path, monkeypatch):
    file = tmp_path / "files.py"
    file.write_text("1\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(files, "__file__", str(file))
    commit = files.code_version()["commit"]
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    file.write_text("2\n")
    assert files.code_version()["commit"] == commit + "+changes"


def test_code_version_isnt_that_of_somebody_elses_repository(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    assert "commit" not in files.code_version()
