"""``python -m joint_train.loop``: the order of its rounds, also after interruptions, and what it asks an engine."""

import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from data_helpers import chat, write_jsonl

from joint_train import loop
from joint_train.config import load


class Interrupted(Exception):
    pass


@pytest.fixture
def started(monkeypatch):
    """The commands that would be started, as (kind, base that answers, answers, last step); one may be interrupted.

    The main job's train from whatever step the run is at, and leave an export that names its step.
    """
    calls = []
    state = {"step": 0, "interrupt": None, "commands": []}

    def run(command, may_say_no=False):
        words = command[command.index("-m") + 1 :]
        given = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("--"))
        paths = [Path(path.strip("'")) for path in re.findall(r"path: ([^,}]+)", given["data.train"])]
        if state["interrupt"] == len(calls):
            state["interrupt"] = None
            raise Interrupted
        state["commands"].append(words)
        if words[0] == "joint_train.data":
            assert words[1] == "regenerate"
            base = Path(given.get("model.base", f"{given['pair']}/base").strip("'"))
            assert (base / "config.json").exists()
            by = (base / "step").read_text() if (base / "step").exists() else "start"
            Path(words[2]).write_text(json.dumps({"by": by}) + "\n")
            calls.append(("answer", by, len(paths[0].read_text().splitlines()), "--url" in words))
        else:
            answers, *originals = paths
            assert [path.name for path in originals] in ([], ["data.jsonl"])
            answers = json.loads(answers.read_text())
            last, steps = int(given["stop_after"]), int(given["max_steps"])
            calls.append(("train", answers["by"], state["step"], last, steps))
            state["step"] = last
            for part in ("base", "drafter"):
                folder = Path(given["output_dir"].strip("'")) / "export" / part
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "config.json").write_text("{}")
                (folder / "step").write_text(str(last))
        return 0

    monkeypatch.setattr(loop, "run", run)
    return calls, state


@pytest.fixture
def words(starter_dir, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [chat(f"q{i}", "a") for i in range(10)])
    return [
        "--data", data, "--rounds", "3", "--steps", "5", "--out", str(tmp_path / "out"), "--nproc-per-node", "1",
        "+experiment=starter", f"pair={starter_dir}",
    ]  # fmt: skip


ROUNDS = [
    ("answer", "start", 3, False), ("train", "start", 0, 5, 15), ("answer", "5", 3, False), ("train", "5", 5, 10, 15),
    ("answer", "10", 3, False), ("train", "10", 10, 15, 15),
]  # fmt: skip


def test_each_round_trains_on_what_the_base_says_by_then(started, words, tmp_path, capsys):
    calls, state = started
    assert loop.main([*words, "seed=5", "--original", "0.5"]) == 0
    assert calls == ROUNDS
    trained = [load(command[1:]) for command in state["commands"] if command[0] == "joint_train"]
    assert [cfg.seed for cfg in trained] == [5, 6, 7], "each round has its own first originals"
    *_, answering, training = state["commands"]
    cfg = load([word for word in answering[3:] if "=" in word], check=False)
    assert cfg.model.base == f"{tmp_path}/out/export/base" and cfg.model.adapter is None
    cfg = load(training[1:])  # as the job composes it
    assert [source.weight for source in cfg.data.train] == [1.0, 0.5] and cfg.data.train_on == "last_assistant"
    assert cfg.model.base == words[-1].removeprefix("pair=") + "/base", "it is one run"
    files = [(tmp_path / f"out/rounds/{number}/prompts.jsonl").read_text().splitlines() for number in range(3)]
    asked = [row for rows in files for row in rows]
    assert len(asked) == len(set(asked)) == 9 and asked != sorted(asked)
    assert os.path.realpath(tmp_path / "out/served/base") == str(tmp_path / "out/export/base")
    assert loop.main(words) == 0 and calls == ROUNDS, "done is done"
    assert loop.main([*words, "--prompts", "4"]) == 2
    assert "was made from other data, or for other rounds" in capsys.readouterr().err


@pytest.mark.parametrize("interrupt", [1, 2, 5])
def test_it_goes_on_wherever_it_was_interrupted(started, words, interrupt):
    calls, state = started
    state["interrupt"] = interrupt
    with pytest.raises(Interrupted):
        loop.main(words)
    assert loop.main(words) == 0 and calls == ROUNDS


def test_a_round_that_was_trained_and_not_noted_is_trained_no_further(started, words, tmp_path):
    calls, _ = started
    assert loop.main(words) == 0
    (tmp_path / "out/rounds/2/DONE").unlink()
    assert loop.main(words) == 0
    assert calls[len(ROUNDS) :] == [("train", "10", 15, 15, 15)]  # which only exports again


class Engine(BaseHTTPRequestHandler):
    asked: list[str] = []
    asleep = False

    def do_GET(self) -> None:
        self.answer({"is_sleeping": Engine.asleep})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        Engine.asked.append(self.path + body)
        Engine.asleep = self.path.startswith("/sleep") or (Engine.asleep and "kv_cache" not in self.path)
        self.answer({})

    def answer(self, body) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


def test_engines_are_reloaded_before_they_answer(started, words, starter_dir, tmp_path, capsys):
    calls, _ = started
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    engine = ["--url", f"http://127.0.0.1:{server.server_port}"]
    words[words.index("3")] = "2"
    assert loop.main([*words, *engine]) == 2
    assert "--url needs --reload" in capsys.readouterr().err
    noted = tmp_path / "noted"
    command = f"realpath {{base}} {{drafter}} >>{noted}; echo {{round}} >>{noted}"
    assert loop.main([*words, *engine, "--reload", command]) == 0
    assert noted.read_text().splitlines() == [
        f"{starter_dir}/base", f"{starter_dir}/drafter", "0",
        f"{tmp_path}/out/export/base", f"{tmp_path}/out/export/drafter", "1",
    ]  # fmt: skip
    assert [call[-1] for call in calls if call[0] == "answer"] == [True, True]
    words[words.index("--out") + 1] = f"{tmp_path}/other"
    assert loop.main([*words, "--original", "0.5", *engine, "--reload", "vllm", "--release", "vllm"]) == 0
    reload = '/collective_rpc{"method": "reload_weights"}'
    awake, asleep = [reload, "/reset_prefix_cache"], ["/wake_up?tags=weights", reload, "/wake_up?tags=kv_cache"]
    assert Engine.asked == [*awake, "/sleep?level=2", *asleep, "/reset_prefix_cache", "/sleep?level=2"]
    words[words.index("--out") + 1] = f"{tmp_path}/third"
    assert loop.main([*words, *engine, "--reload", "exit 3"]) == 2
    assert "--reload ended with 3: exit 3" in capsys.readouterr().err
    server.shutdown()
    assert loop.main([*words, "--url", "http://127.0.0.1:9", "--reload", "true", "--wait", "0.1"]) == 2
    assert "doesn't answer after 0 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["max_steps=3"], "max_steps=3: the loop sets that itself"),
        (["--prompts", "11"], "10 different examples are too few for 3 rounds of 11"),
        (["--reload", "true"], "give its --url"),
    ],
)
def test_what_cannot_work_is_refused(started, words, more, message, capsys):
    assert loop.main([*words, *more]) == 2
    assert message in capsys.readouterr().err and not started[0]


@pytest.mark.slow
def test_on_the_starter_pair(starter_dir, tmp_path):
    """All of it, as users start it."""
    prompts = "".join((starter_dir / "train.jsonl").read_text().splitlines(keepends=True)[:8])
    (tmp_path / "prompts.jsonl").write_text(prompts)
    small = [
        "data.max_length=96", "data.micro_batch_size=1", "data.num_workers=0", "eval.every=0", "eval.batches=1",
        "eval.prompts=0", "tracking.wandb=disabled", "optim.warmup_steps=2", "precision.compute=float32",
    ]  # fmt: skip
    words = [
        "--data", f"{tmp_path}/prompts.jsonl", "--rounds", "2", "--steps", "3", "--out", f"{tmp_path}/out",
        "--temperature", "3", "--max-new-tokens", "512", "--nproc-per-node", "1",
    ]  # fmt: skip
    assert loop.main([*words, "+experiment=starter", f"pair={starter_dir}", *small]) == 0
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(7))
    assert (tmp_path / "out/rounds/1/answers.jsonl").read_text() != (
        tmp_path / "out/rounds/0/answers.jsonl"
    ).read_text()
