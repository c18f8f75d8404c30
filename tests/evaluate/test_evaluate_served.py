"""A running server measured: against servers that know what they did, and the command that starts a real one."""

import json
import random
import re
import shlex
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from data_helpers import make_tokenizer
from pairs import build_pair, make_pair
from test_data_masks import GEMMA4
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from joint_train.data import engine_client
from joint_train.evaluate.__main__ import main
from joint_train.evaluate.engines import VLLM, EngineError, LlamaCpp, Request, SGLang
from joint_train.evaluate.prompts import Prompt, load_prompts
from joint_train.evaluate.serving import why_text_only

K = 3


class Server(ThreadingHTTPServer):
    """Drafts K tokens at a time and accepts a number that the prompt decides; counts as vLLM, SGLang or llama.cpp do.

    An answer of ``max_tokens`` tokens takes one forward for the first and a verification for each further piece. The
    last one is cut short by the limit, as servers do: its accepted drafts past the limit are counted, and thrown away.
    llama.cpp drafts no more than fit, and doesn't count a forward without drafts.
    """

    daemon_threads = True

    def __init__(self, engine: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine, self.lock = engine, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens, self.drafts, self.accepted = 7, 5, [4, 2, 1]  # of somebody who was there before
        self.others_tokens = 0  # which somebody else gets during each request
        self.requests, self.busy, self.most_busy = [], 0, 0
        self.delay, self.hidden, self.status, self.rendered = 0.0, (), 200, []
        self.fails: list[int] = []  # statuses of the next answers
        self.models, self.nonsense = {"data": [{"id": "served-name", "root": "/nowhere/base"}]}, None
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def steps(self, prompt: list[int], most: int) -> list[tuple[int, int]]:
        """(accepted drafts, tokens settled) of each verification."""
        generator, left, steps = random.Random(str(prompt)), most - 1, []
        while left:
            accepted = generator.randint(0, K)
            if self.engine == "llamacpp":
                accepted = min(accepted, left - 1)
            steps.append((accepted, min(left, accepted + 1)))
            left -= steps[-1][1]
        return steps

    def answer(self, prompt: list[int], most: int) -> list[tuple[int, int]]:
        with self.lock:
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        time.sleep(self.delay)
        steps = self.steps(prompt, most)
        with self.lock:
            self.busy -= 1
            self.tokens += most + self.others_tokens
            self.drafts += len(steps)
            if self.engine == "llamacpp":  # one token left: nothing to draft
                self.drafts -= sum(settled for _, settled in steps[:-1]) == most - 2
            for k in range(K):
                self.accepted[k] += sum(accepted > k for accepted, _ in steps)
        return steps

    def metrics(self) -> str:
        name = {"vllm": "vllm:generation_tokens"}.get(self.engine, "llamacpp:tokens_predicted")
        lines = [f"# TYPE {name} counter", f'{name}_total{{engine="0"}} {self.tokens}.0']
        prefix = name.partition(":")[0]
        name = f"{prefix}:num_requests_running"
        lines += [f"# TYPE {name} gauge", f'{name}{{engine="0"}} {self.busy}']
        name = f"{prefix}:spec_decode_num_drafts"
        lines += [f"# TYPE {name} counter", f'{name}_total{{engine="0"}} {self.drafts - 2}']
        lines += [f'{name}_total{{engine="1"}} 2', f'{name}_created{{engine="0"}} 1.7e9']  # two engines behind it
        name = f"{prefix}:spec_decode_num_accepted_tokens_per_pos"
        lines += [f"# TYPE {name} counter"]
        lines += [f'{name}_total{{engine="0",position="{k}"}} {count}' for k, count in enumerate(self.accepted)]
        return "\n".join(line for line in lines if not any(word in line for word in self.hidden)) + "\n"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def reply(self, body, status: int = 200) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        server = self.server
        if self.path == "/v1/models":
            self.reply(server.models)
        elif self.path == "/metrics" and server.engine != "sglang":
            self.reply(server.metrics())
        elif self.path == "/server_info" and server.engine == "sglang":
            self.reply({} if server.hidden else {"speculative_num_steps": K})
        else:
            self.reply("Not Found", 404)

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append((self.path, self.headers.get("Authorization"), body))
        if server.status != 200 or server.fails:
            self.reply("out of memory", server.fails.pop() if server.fails else server.status)
        elif server.nonsense is not None:
            self.reply(server.nonsense)
        elif self.path == "/v1/completions" and server.engine == "vllm":
            server.answer(body["prompt"], body["max_tokens"])
            usage = {"completion_tokens": body["max_tokens"]}
            self.reply({"choices": [{"text": f"text of {len(body['prompt'])}"}], "usage": usage})
        elif self.path == "/v1/chat/completions" and server.engine == "vllm":
            server.answer(server.rendered, body["max_completion_tokens"])
            usage, message = {"completion_tokens": body["max_completion_tokens"]}, {"reasoning": "so ", "content": "a"}
            self.reply({"choices": [{"message": message}], "usage": usage, "prompt_token_ids": server.rendered})
        elif self.path == "/completion" and server.engine == "llamacpp":
            server.answer(body["prompt"], body["n_predict"])
            self.reply({"content": f"text of {len(body['prompt'])}", "tokens_predicted": body["n_predict"]})
        elif self.path == "/generate" and server.engine == "sglang":
            most = body["sampling_params"]["max_new_tokens"]
            steps = server.answer(body["input_ids"], most)
            histogram = [sum(accepted == k for accepted, _ in steps) for k in range(K + 1)]
            info = {"completion_tokens": most, "spec_verify_ct": len(steps), "spec_accept_histogram": histogram}
            self.reply({"text": f"text of {len(body['input_ids'])}", "meta_info": info})
        else:
            self.reply("Not Found", 404)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def serve():
    servers = []

    def start(engine: str) -> Server:
        servers.append(Server(engine))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base, drafter = make_pair(folder, "text")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 3, "b": 4, "c": 5}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(base)
    lines = [{"text": "a " * i + "b c", "category": "xy"[i % 2]} for i in range(1, 7)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return base, drafter, folder / "prompts.jsonl"


PROMPTS = [[3] * i + [4, 5] for i in range(1, 7)]
ASKED = [Prompt(ids, "", "") for ids in PROMPTS]


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp"])
def test_the_command_measures_what_the_server_did(engine, serve, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    base, drafter, prompts = folders
    server = serve(engine)
    options = ["--engine", engine, "--url", server.url + "/v1", "--prompts", str(prompts), "--max-new-tokens", "17"]
    assert main([str(base), str(drafter), *options, "--concurrency", "1,4", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())

    alone = [server.steps(prompt, 17) for prompt in PROMPTS]
    flat = [step for steps in alone for step in steps]
    one = found["speculative"][0]
    assert one["num_steps"] == K and one["tokens"] == 6 * 17 and one["verifications"] == len(flat)
    assert one["tokens_per_forward"]["value"] == pytest.approx(6 * 16 / len(flat))
    assert one["tokens_per_forward"]["low"] < 6 * 16 / len(flat) < one["tokens_per_forward"]["high"]
    for k, position in enumerate(one["acceptance"]):
        accepted = sum(a > k for a, _ in flat)
        assert (position["accepted"], position["drafted"]) == (accepted, len(flat))
        assert position["share_if_reached"]["value"] == pytest.approx(accepted / sum(a >= k for a, _ in flat))
    for i, category in enumerate("yx"):
        steps = [step for row in alone[i::2] for step in row]
        assert one["tokens_per_forward_by_category"][category]["value"] == pytest.approx(3 * 16 / len(steps))

    first, second = found["concurrency"]
    several = [server.steps(PROMPTS[i % 6], 17) for i in range(16)]
    assert (first["concurrency"], first["requests"]) == (1, 6)
    assert (second["concurrency"], second["requests"], second["tokens"]) == (4, 16, 16 * 17)
    assert second["tokens_per_forward"] == pytest.approx(16 * 16 / sum(map(len, several)))
    assert [e["text"] for e in found["examples"]] == [f"text of {len(p)}" for p in PROMPTS]

    shown = capsys.readouterr().out
    assert f"{6 * 16 / len(flat):.2f} [" in shown and max(map(len, shown.splitlines()[:-1])) <= 80
    page = (tmp_path / "evaluation.html").read_text()
    assert "Speed" in page and "speed-up" not in page and "token for token" not in page
    assert {key for _, key, _ in server.requests} == {"Bearer secret"}
    _, _, body = server.requests[-1]
    if engine == "vllm":
        assert body["model"] == "served-name" and body["temperature"] == 0 and body["prompt"] in PROMPTS
    elif engine == "llamacpp":
        assert any(step == (0, 1) for steps in alone for step in steps[-1:]), "one of them ends without drafts"
        assert (body["top_k"], body["min_p"], body["temperature"]) == (0, 0, 0) and body["prompt"] in PROMPTS
    else:
        assert body["sampling_params"]["temperature"] == 0 and body["input_ids"] in PROMPTS


def test_prompts_with_pictures_are_chats_for_vllm_and_refused_for_others(serve, folders, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    make = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4").Gemma4ImageProcessorPil
    tokenizer = make_tokenizer(GEMMA4)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image>", "<image|>"]})
    make(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70).save_pretrained(tmp_path)
    for name, token in (("image", "<|image|>"), ("boi", "<|image>"), ("eoi", "<image|>")):
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    tokenizer.name_or_path = str(tmp_path)
    image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + '{"prompt": "who?"}\n')
    monkeypatch.setattr("joint_train.evaluate.served.read_tokenizer", lambda folder: tokenizer)

    def measure(engine: str) -> int:
        server.requests.clear()
        options = ["--prompts", str(tmp_path / "p.jsonl"), "--max-new-tokens", "9", "--concurrency", "1"]
        return main(["--engine", engine, "--url", server.url, *options, "--out", str(tmp_path / "out")])

    server = serve("vllm")
    shown, said = load_prompts(str(tmp_path / "p.jsonl"), tokenizer)
    assert shown.ids.count(tokenizer.image_token_id) > 9 and said.chat is None
    server.rendered = shown.ids
    assert measure("vllm") == 0
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert [e["text"] for e in found["examples"]] == ["so a", f"text of {len(said.ids)}"]
    steps = [server.steps(prompt.ids, 9) for prompt in (shown, said)]
    assert found["speculative"][0]["verifications"] == sum(map(len, steps))
    path, _, body = server.requests[-2]
    assert path == "/v1/chat/completions" and [m["role"] for m in body["messages"]] == ["user"]
    picture, text = body["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,") and text["text"] == "what?"
    server.rendered = [token for token in shown.ids if token != shown.ids[-1]]
    assert measure("vllm") == 2
    server = serve("llamacpp")
    assert measure("llamacpp") == 2 and not any(path == "/completion" for path, _, _ in server.requests)


def test_requests_are_made_so_many_at_a_time(serve):
    server = serve("vllm")
    server.delay = 0.05
    engine = VLLM(server.url)
    for count in (1, 3):
        server.most_busy = 0
        phase = engine.run(ASKED, Request(5), count)
        assert server.most_busy == count
        assert phase.seconds >= 0.05 * 6 / count
    assert phase.tokens == 30 and phase.settled == 24


@pytest.mark.parametrize("nonsense", ["a page", [1], {"choices": [{"text": "a"}]}, {"choices": [], "usage": None}])
def test_a_server_that_answers_in_another_form_is_an_error(serve, nonsense):
    for engine, client in (("vllm", VLLM), ("sglang", SGLang), ("llamacpp", LlamaCpp)):
        server = serve(engine)
        measured = client(server.url)
        server.nonsense = nonsense
        with pytest.raises(EngineError, match=f"answers otherwise than {engine} does"):
            measured.run(ASKED[:2], Request(5), 2)
    server.models = nonsense
    with pytest.raises(EngineError, match="answers otherwise than vllm does"):
        VLLM(server.url)


def test_an_answer_of_one_token_has_no_verification(serve):
    for engine, client in (("vllm", VLLM), ("sglang", SGLang), ("llamacpp", LlamaCpp)):
        phase = client(serve(engine).url).run(ASKED[:1], Request(1), 1)
        assert (phase.tokens, phase.settled, phase.verifications, phase.accepted) == (1, 0, 0, [0] * K)


def test_a_server_that_others_use_is_not_measured(serve, monkeypatch):
    monkeypatch.setattr("joint_train.evaluate.engines.COUNTED_WITHIN", 0.2)
    server = serve("vllm")
    engine = VLLM(server.url)
    for others in (3, -1):  # more than was received, and less
        server.others_tokens = others
        with pytest.raises(EngineError, match=f"counted {5 + others} generated tokens while 5 were received"):
            engine.run(ASKED[:1], Request(5), 1)


def test_counters_that_come_late_are_waited_for(serve):
    server = serve("vllm")
    engine = VLLM(server.url)
    server.others_tokens = -5

    def later() -> None:
        time.sleep(0.3)
        server.tokens += 5

    threading.Thread(target=later, daemon=True).start()
    assert engine.run(ASKED[:1], Request(5), 1).tokens == 5


def test_what_is_wrong_with_a_server_is_said(serve, monkeypatch, caplog):
    server = serve("vllm")
    server.hidden = ("spec_decode",)
    with pytest.raises(EngineError, match="serves served-name without a drafter"):
        VLLM(server.url)
    server.hidden = ("generation_tokens",)
    with pytest.raises(EngineError, match="isn't a vLLM server, or one with --disable-log-stats"):
        VLLM(server.url)
    with pytest.raises(EngineError, match="HTTP 404: Not Found"):
        SGLang(server.url)
    server = serve("sglang")
    with pytest.raises(EngineError, match="HTTP 404"):
        VLLM(server.url)
    with pytest.raises(EngineError, match="isn't a llama.cpp server"):
        LlamaCpp(serve("vllm").url)
    drafting = serve("llamacpp")
    drafting.accepted, drafting.tokens, drafting.hidden = [0] * K, 0, ("per_pos",)
    with pytest.raises(EngineError, match="has drafted nothing: start it with -md and --spec-type draft-mtp"):
        LlamaCpp(drafting.url)
    engine = SGLang(server.url)
    with monkeypatch.context() as patched:
        patched.setattr(engine_client.time, "sleep", lambda seconds: None)
        server.status = 500
        with pytest.raises(EngineError, match=r"POST .*/generate: HTTP 500 .4 times.: out of memory"):
            engine.run(ASKED[:1], Request(4), 1)
        server.status, server.requests, server.fails = 200, [], [429, 500, 503]
        assert engine.run(ASKED[:1], Request(4), 1).tokens == 4 and len(server.requests) == 4
        assert "HTTP 429; asked again in 4 s, which the measured times include" in caplog.text
        server.fails = [400]
        with pytest.raises(EngineError, match=r"POST .*/generate: HTTP 400: out of memory"):
            engine.run(ASKED[:1], Request(4), 1)
    server.status, server.delay = 200, 5
    engine = SGLang(server.url, timeout=0.2)
    started = time.monotonic()
    with pytest.raises(EngineError, match="no answer within --timeout=0.2 s"):
        engine.run(ASKED[:2], Request(4), 2)
    assert time.monotonic() - started < 3
    server.hidden = ("speculative_num_steps",)
    with pytest.raises(EngineError, match="without a drafter"):
        SGLang(server.url)


def test_the_command_says_what_is_wrong(serve, folders, tmp_path, capsys, monkeypatch):
    base, drafter, prompts = map(str, folders)
    (tmp_path / "run/export/drafter").mkdir(parents=True)
    assert main([str(tmp_path / "run/export")]) == 2
    assert f"there is no folder {tmp_path}/run/export/base" in capsys.readouterr().err  # both were found
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    for arguments, message in (
        (["--url", url], "--url needs --engine"),
        (["--engine", "vllm"], "give the base and its drafter"),
        ([base, "--engine", "vllm", "--url", url], "give the base and its drafter"),
        ([str(tmp_path / "run")], f"a folder with both, such as this run's {tmp_path}/run/export."),
        ([], "give the base and its drafter"),
        (["--engine", "vllm", "--url", url, "--num-steps", "4", "--dtype", "float32"], "--num-steps, --dtype: the ser"),
        ([base, drafter, "--engine", "vllm", "--serving", "engine"], "--serving: the server decides"),
        (["--engine", "vllm", "--url", url], "Is the server running?"),
        ([drafter, base, "--engine", "vllm"], "Are base and drafter swapped?"),
    ):
        assert main([*arguments, "--out", str(tmp_path)]) == 2, arguments
        assert message in capsys.readouterr().err, arguments
    server = serve("vllm")
    assert main(["--engine", "vllm", "--url", server.url, "--prompts", prompts]) == 2
    assert re.search("no tokenizer at /nowhere/base.*: give BASE and DRAFTER", capsys.readouterr().err)
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.delitem(sys.modules, "joint_train.evaluate.engines")
    monkeypatch.delitem(sys.modules, "joint_train.evaluate.served")
    assert main([base, drafter, "--engine", "vllm"]) == 2
    assert "pip install 'joint-train[serving]'" in capsys.readouterr().err


def test_the_printed_command_serves_this_pair(folders, tmp_path, capsys):
    def command(*arguments: str) -> list[str]:
        assert main(list(arguments)) == 0
        return shlex.split(capsys.readouterr().out)

    base, drafter, _ = map(str, folders)
    words = command(base, drafter, "--engine", "vllm", "--num-steps", "3")
    assert words[:3] == ["vllm", "serve", base] and len(words) == 5
    spec = json.loads(words[words.index("--speculative-config") + 1])
    assert spec == {"method": "mtp", "model": drafter, "num_speculative_tokens": 3}
    words = command(base, drafter, "--engine", "vllm", "--num-steps", "3", "--temperature", "0.7")
    assert json.loads(words[4]) == spec | {"draft_sample_method": "probabilistic"}
    assert main([base, drafter, "--engine", "vllm"]) == 0
    shown = capsys.readouterr()
    assert "draft_sample_method" not in shown.out and '"draft_sample_method": "probabilistic"' in shown.err
    words = command(base, drafter, "--engine", "sglang", "--dtype", "float32")
    assert words[:4] == ["sglang", "serve", "--model-path", base]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert options == {
        "--speculative-algorithm": "NEXTN",
        "--speculative-draft-model-path": drafter,
        "--speculative-num-steps": "4",
        "--speculative-num-draft-tokens": "5",
        "--speculative-eagle-topk": "1",
        "--dtype": "float32",
    }

    assert main([base, drafter, "--engine", "llamacpp", "--num-steps", "3", "--dtype", "float32"]) == 0
    *convert, serve = map(shlex.split, capsys.readouterr().out.splitlines())
    for folder, file, words in zip((base, drafter), ("base.gguf", "drafter.gguf"), convert, strict=True):
        assert words == ["python", "convert_hf_to_gguf.py", folder, "--outfile", file, "--outtype", "f32"]
    assert serve[:5] == ["llama-server", "-m", "base.gguf", "-md", "drafter.gguf"]
    assert serve[serve.index("--spec-draft-n-max") + 1] == "3" and "--metrics" in serve

    # The drafter's own number of drafts; towers without a processor; a configuration that only has room for towers.
    base, drafter = make_pair(tmp_path / "31b", "31b")
    (drafter / "generation_config.json").write_text('{"num_assistant_tokens": 6}')
    words = command(str(base), str(drafter), "--engine", "vllm")
    assert json.loads(words[4])["num_speculative_tokens"] == 6
    assert json.loads(words[words.index("--limit-mm-per-prompt") + 1]) == {"image": 0, "audio": 0, "video": 0}
    assert main([str(base), str(drafter), "--engine", "vllm"]) == 0
    assert "turns pictures and sound off" in capsys.readouterr().err and not why_text_only("sglang", base)
    (base / "processor_config.json").write_text("{}")
    assert not why_text_only("vllm", base)
    assert "--limit-mm-per-prompt" not in command(str(base), str(drafter), "--engine", "vllm")
    base, drafter = map(str, make_pair(tmp_path / "e2b", "e2b"))
    text_only = {"architectures": ["Gemma4ForCausalLM"]}
    words = command(base, drafter, "--engine", "vllm")
    assert json.loads(words[words.index("--hf-overrides") + 1]) == text_only
    words = command(base, drafter, "--engine", "sglang")
    assert json.loads(words[words.index("--json-model-override-args") + 1]) == text_only


def test_offline_and_served_counts_have_one_definition():
    """The formula of a served phase, on what transformers' generation settled: the same tokens per forward."""
    from joint_train.evaluate.decoding import decode, tokens_per_forward
    from joint_train.evaluate.engines import Answer, Phase

    base, drafter = build_pair("text")
    decoded = [decode(base, drafter, prompt, K, 12, ignore_eos=True, engine=True) for prompt in PROMPTS[:2]]
    answers = [Answer("", len(d.ids), d.seconds) for d in decoded]
    phase = Phase(answers, 1.0, sum(len(d.settled) for d in decoded))
    assert phase.settled / phase.verifications == tokens_per_forward(decoded)
