"""Trained pairs served by vLLM on CPU, in fp32: its text is transformers', and each of its steps settles as many tokens
as ``python -m joint_train.evaluate --serving engine`` says.

`make test-vllm` runs it. All pairs are trained and exported by this project, so it also shows that what was trained is
what is served: a drafter that saw something else in serving than in training would accept nothing.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import transformers
from pairs import make_pair
from trained_pairs import GROWN, NEW, SHAPES, K, job, prompts, train

from joint_train.evaluate.decoding import decode, tokens_per_forward
from joint_train.evaluate.served import serve_command
from joint_train.starter import build as starter_pair

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PYTHON = os.environ.get("VLLM_PYTHON", "")
HERE = Path(__file__).parent
TRAINED = (*SHAPES, *GROWN, *NEW)
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16}


# Pairs to serve


@pytest.fixture(scope="session")
def starter(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Exports of two stages: a run on the starter pair, and a run that began with the first one's export."""
    folder = tmp_path_factory.mktemp("starter")
    subprocess.run([sys.executable, "-m", "joint_train.starter", folder / "pair"], check=True, timeout=300)
    job(f"pair={folder}/pair", f"output_dir={folder}/one", "max_steps=60")
    first = folder / "one/export"
    job(
        f"pair={folder}/pair", f"output_dir={folder}/two", "max_steps=20",
        f"model.base={first}/base", f"model.drafter={first}/drafter",
    )  # fmt: skip
    return {"starter": (first / "base", first / "drafter"), "second stage": stage_two(folder)}


def stage_two(folder: Path) -> tuple[Path, Path]:
    return folder / "two/export/base", folder / "two/export/drafter"


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, starter) -> dict[str, tuple[Path, Path]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pairs")
    return starter | {name: train(name, folder / name) for name in TRAINED}


def prompts_of(name: str, base: Path) -> list[list[int]]:
    """Eight prompts, shorter and longer than the sliding window."""
    if name in TRAINED:
        return prompts(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    lines = (base.parents[2] / "pair/val.jsonl").read_text().splitlines()[:8]
    chats = [json.loads(line)["messages"][:1] for line in lines]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats]


# vLLM, in one process for all pairs


def options_of(command: str) -> dict:
    """The options of a `vllm serve` command, as ``vllm.LLM`` takes them."""
    words = shlex.split(command)
    assert words[:2] == ["vllm", "serve"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    return {"model": words[2]} | {k.removeprefix("--").replace("-", "_"): json.loads(v) for k, v in options.items()}


def by_vllm(jobs: dict, folder: Path) -> dict:
    """What vLLM makes of jobs, see ``engine.py``; by their names."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with open(folder / "log", "w") as log:
        subprocess.run(
            [PYTHON, HERE / "engine.py", folder / "jobs.json", folder / "results.json"],
            env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            stdout=log, stderr=subprocess.STDOUT, timeout=600,
        )  # fmt: skip
    assert (folder / "results.json").exists(), (folder / "log").read_text()[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def served(pairs, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("vllm")
    jobs = {
        name: {
            "options": options_of(serve_command("vllm", base, drafter, K, None)) | OPTIONS,
            "prompts": prompts_of(name, base),
            "max_tokens": 48,
            "ignore_eos": False,
        }
        for name, (base, drafter) in pairs.items()
    }
    return by_vllm(jobs, folder)


def load(folder: Path):
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["starter", "second stage", *TRAINED])
def test_text_and_steps_are_those_of_evaluate(name, pairs, served):
    found = served[name]
    assert "error" not in found, found["error"]
    base, drafter = map(load, pairs[name])
    prompts = prompts_of(name, pairs[name][0])
    plain = [decode(base, None, prompt, K, 48).ids for prompt in prompts]
    as_engine = [decode(base, drafter, prompt, K, 48, engine=True) for prompt in prompts]
    assert [[t for step in steps for t in step] for steps in found["steps"]] == plain

    settled = [[len(step) for step in steps[1:]] for steps in found["steps"]]  # the first step is the prompt's
    assert settled == [d.settled for d in as_engine]
    formula = (found["generation_tokens"] - len(prompts)) / found["spec_decode_num_drafts"]
    assert formula == pytest.approx(tokens_per_forward(as_engine), abs=1e-12)
    lengths = {length for steps in settled for length in steps[:-1]}
    print(f"{name}: {formula:.3f} tokens per base forward in {sum(map(len, settled))} verifications")
    if name in GROWN:
        assert any(token >= 256 for text in plain for token in text)
    if name in SHAPES:  # it isn't equal for want of anything to tell apart
        assert len(lengths) >= 2 and 1.2 < formula < 4.9


# A server, measured by the command

# `vllm …`: its command line asks for the metadata of a package "vllm", which is called vllm-cpu here.
SERVE = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


@contextlib.contextmanager
def serving(pair: list[str], log: Path) -> Iterator[str]:
    """`vllm serve` of a pair, by the command that `evaluate --engine vllm` prints for it; its address."""
    arguments = ["-m", "joint_train.evaluate", *pair, "--engine", "vllm", "--num-steps", str(K), "--dtype", "float32"]
    printed = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, timeout=120)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-c", SERVE, *shlex.split(printed.stdout)[1:]]
    command += ["--port", str(port), "--host", "127.0.0.1", "--max-model-len", "512", "--enforce-eager"]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
    try:
        while True:
            try:
                if httpx.get(f"{url}/health", timeout=2).is_success:
                    break
            except httpx.HTTPError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def server(starter, tmp_path_factory):
    """`vllm serve` of the second stage."""
    with serving(list(map(str, starter["second stage"])), tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def test_a_running_server_has_evaluates_acceptance_and_text(server, starter, tmp_path):
    from joint_train.evaluate.__main__ import main

    shared = ["--prompts", "starter", "--limit", "12", "--max-new-tokens", "48"]
    pair = list(map(str, starter["second stage"]))
    options = ["--engine", "vllm", "--url", server, "--concurrency", "1,4,16", "--out", str(tmp_path / "served")]
    assert main([*options, *shared]) == 0  # the tokenizer is that of the folder that the server names
    options = ["--num-steps", str(K), "--serving", "engine", "--dtype", "float32", "--out", str(tmp_path / "offline")]
    assert main([*pair, *options, *shared]) == 0
    served, offline = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("served", "offline"))
    one, other = served["speculative"][0], offline["speculative"][0]
    assert one["num_steps"] == K
    assert (one["tokens"], one["verifications"]) == (other["tokens"], other["verifications"])
    assert one["tokens_per_forward"] == pytest.approx(other["tokens_per_forward"])
    assert [e["text"] for e in served["examples"]] == [e["text"] for e in offline["examples"]]
    for row in served["concurrency"]:
        assert row["tokens_per_second"] > 0
        assert row["tokens_per_forward"] == pytest.approx(one["tokens_per_forward"]["value"], rel=0.1)
    assert [row["concurrency"] for row in served["concurrency"]] == [1, 4, 16]
    assert re.search("vllm at .* with K = 4 drafts", (tmp_path / "served/evaluation.html").read_text())


# A server that answers prompts


@pytest.fixture(scope="session")
def lively(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A pair with random weights, which says something else to each prompt; and a file of prompts."""
    folder = tmp_path_factory.mktemp("lively")
    starter_pair(folder / "starter")
    sizes = {"vocab_size": 2048, "vocab_size_per_layer_input": 2048, "head_dim": 32, "global_head_dim": 64}
    pair = make_pair(folder, "text", drafter_overrides={"use_ordered_embeddings": False}, **sizes)
    for part in pair:
        transformers.AutoTokenizer.from_pretrained(folder / "starter/base").save_pretrained(part)
    return *pair, folder / "starter/val.jsonl"


@pytest.fixture(scope="session")
def answering(lively, tmp_path_factory):
    with serving(list(map(str, lively[:2])), tmp_path_factory.mktemp("answering") / "log") as url:
        yield url


def test_its_answers_to_a_dataset_are_the_local_ones_token_for_token(answering, lively, tmp_path, monkeypatch):
    """Some answers have an end and others don't; the engine is asked 8 at a time, and writes the same file."""
    from joint_train.data.engine import Engine
    from joint_train.data.regenerate import Base, Sampling, regenerate
    from joint_train.data.thinking import prompt_ids

    tokenizer, base = transformers.AutoTokenizer.from_pretrained(lively[0]), load(lively[0])
    lines = lively[2].read_text().splitlines()[:16]
    examples = [{"messages": json.loads(line)["messages"][:1]} for line in lines]
    base.generation_config.eos_token_id, written = None, []
    for example in examples:
        prompt = prompt_ids(tokenizer, example["messages"])
        out = base.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, pad_token_id=0)
        written.append(out[0, len(prompt) :].tolist())
    assert len({tuple(row) for row in written}) > 12
    ends = [1, *{row[10 + i] for i, row in enumerate(written[::2])}]
    expected = [row[: min([i + 1 for i, token in enumerate(row) if token in ends], default=32)] for row in written]
    base.generation_config.eos_token_id = ends

    counts = regenerate(examples, Base(base, tokenizer, Sampling(32), 4), tmp_path / "local.jsonl")
    received, post = {}, Engine._post

    def recording(self, path, body):
        answer = post(self, path, body)
        received[body["seed"]] = answer["choices"][0]["token_ids"]
        return answer

    monkeypatch.setattr(Engine, "_post", recording)
    engine = Engine(answering, tokenizer, Sampling(32), name=base.name_or_path, ends=ends, concurrency=8)
    found = regenerate(examples, engine, tmp_path / "served.jsonl")
    assert (tmp_path / "served.jsonl").read_text() == (tmp_path / "local.jsonl").read_text()
    assert [received[i] for i in range(len(examples))] == expected
    assert found["tokens"] == counts["tokens"] == sum(map(len, expected))
    assert 0 < found["unfinished"] == counts["unfinished"] < len(examples) and not found["refused"]


def test_the_benchmark_of_both_ways(answering, lively, tmp_path):
    from benchmarks.regenerate import main

    words = [
        str(lively[0]),
        "--url",
        answering,
        "--data",
        str(lively[2]),
        "--limit",
        "32",
        "--max-new-tokens",
        "64",
        "--concurrency",
        "1,16",
    ]
    assert main([*words, "--results", str(tmp_path / "found.json")]) == 0
    local, one, many = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert local["tokens"] == one["tokens"] == many["tokens"] and many["equal"] == 1
    assert many["seconds"] < one["seconds"]
