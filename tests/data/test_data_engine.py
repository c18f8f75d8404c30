"""Answers from an engine: a server of OpenAI's API whose model is the tiny base, asked as vLLM and as SGLang are."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from data_helpers import TURNS, chat, make_tokenizer, numbered, write_jsonl
from pairs import build_pair

from joint_train.data import DataError, engine, engine_client
from joint_train.data import __main__ as command
from joint_train.data.engine import Engine
from joint_train.data.regenerate import Base, Sampling, data_url, regenerate
from joint_train.data.thinking import prompt_ids

TOKENIZER = make_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<turn|>")
COUNT = 10
PNG = b"\x89PNG\r\n\x1a\nnot really"


class Server(ThreadingHTTPServer):
    """Continues prompts greedily with the base, as vLLM (``ids``: answers say their tokens) or as SGLang."""

    daemon_threads = True

    def __init__(self, base) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.base, self.url, self.ids = base, f"http://127.0.0.1:{self.server_port}", True
        self.requests, self.refused, self.fails, self.lock = [], {}, [], threading.Lock()
        self.most, self.models, self.rendered, self.busy, self.most_busy = 512, ["tiny"], None, 0, 0
        self.nonsense = None  # what everything is answered with
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def complete(self, prompt: list[int], body: dict) -> dict:
        ids, reason = list(prompt), "length"
        for _ in range(body.get("max_tokens") or body["max_completion_tokens"]):
            with torch.no_grad():
                ids.append(int(self.base(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in body["stop_token_ids"]:
                reason = "stop"
                break
        new = ids[len(prompt) :]
        choice = {"finish_reason": reason, "text": TOKENIZER.decode(new)}
        return choice | ({"token_ids": new, "stop_reason": None} if self.ids else {"matched_stop": new[-1]})


class Handler(BaseHTTPRequestHandler):
    server: Server

    def reply(self, body, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        models = [
            {"id": name, "root": "/models/tiny", "max_model_len": self.server.most} if isinstance(name, str) else name
            for name in self.server.models
        ]
        self.reply({"data": models}) if self.path == "/v1/models" else self.reply({}, 404)

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, body))
            if server.fails:
                return self.reply({"error": {"message": "wait"}}, server.fails.pop())
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        prompt = server.rendered or body.get("prompt")
        text = TOKENIZER.decode(prompt)
        found = next((status for word, status in server.refused.items() if word in text), None)
        choice = server.complete(prompt, body) if found is None else {}
        with server.lock:
            server.busy -= 1
        if server.nonsense is not None:
            self.reply(server.nonsense)
        elif found is None:
            if "messages" in body:
                choice["message"] = {"content": choice.pop("text")}
            answer = {"choices": [choice], "usage": {"completion_tokens": 7}, "prompt_token_ids": prompt}
            self.reply(answer)
        else:
            self.reply({"error": {"message": f"no {found}"}}, found)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def base():
    model, _ = build_pair("e2b", vocab_size=400, vocab_size_per_layer_input=400)
    return model


EXAMPLES = [chat(f"{example['messages'][0]['content']}{'?' * i}") for i, example in enumerate(numbered(7))]


@pytest.fixture(scope="module")
def local(base, tmp_path_factory):
    """The base's end tokens, and what the base in this process answers: some answers have an end."""
    base.generation_config.eos_token_id = None
    written = []
    for example in EXAMPLES:
        prompt = prompt_ids(TOKENIZER, example["messages"])
        out = base.generate(torch.tensor([prompt]), max_new_tokens=COUNT, do_sample=False, pad_token_id=0)
        written.append(out[0, len(prompt) :].tolist())
    base.generation_config.eos_token_id = ends = [END, written[0][6], written[3][3]]
    path = tmp_path_factory.mktemp("local") / "out.jsonl"
    regenerate(EXAMPLES, Base(base, TOKENIZER, Sampling(COUNT), 3), path)
    assert 2 <= path.read_text().count("\n") < len(EXAMPLES)
    return ends, path.read_text()


@pytest.fixture
def server(base):
    served = Server(base)
    yield served
    served.shutdown()
    served.server_close()


def connect(server, ends, concurrency=3, **options) -> Engine:
    sampling = Sampling(**{"max_new_tokens": COUNT, **options.pop("sampling", {})})
    return Engine(server.url + "/v1", TOKENIZER, sampling, name="tiny", ends=ends, concurrency=concurrency, **options)


@pytest.mark.parametrize("ids", [True, False], ids=["vllm", "sglang"])
def test_an_engines_answers_are_the_local_ones_in_the_same_order(server, local, tmp_path, ids):
    server.ids, (ends, expected) = ids, local
    counts = regenerate(EXAMPLES, connect(server, ends), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == expected
    kept = expected.count("\n")
    assert (counts["answered"], counts["unfinished"], counts["refused"], counts["missing"]) == (7, 7 - kept, {}, 0)
    assert counts["tokens"] > kept and counts["seconds"] > 0
    assert 1 < server.most_busy <= 3
    for path, body in server.requests:
        assert path == "/v1/completions" and body["temperature"] == 0 and body["stop_token_ids"] == ends


def test_sampling_thinking_and_tools_reach_the_engine_as_they_are_trained(server, local, tmp_path):
    template = TURNS.replace(
        "{{- bos_token -}}", "{{- bos_token -}}{{ tools | tojson if tools }}{{ 'T' if enable_thinking }}"
    )
    tokenizer = make_tokenizer(template)
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
    example = {**chat("a"), "tools": tools, "chat_template_kwargs": {"enable_thinking": True}}
    sampling = Sampling(COUNT, temperature=0.7, top_k=64, top_p=0.95, seed=5)
    asked = Engine(server.url, tokenizer, sampling, name="tiny", ends=local[0], concurrency=2)
    with pytest.raises(DataError, match="ended within|refused"):  # what the tiny base says here doesn't matter
        regenerate([example, chat("b")], asked, tmp_path / "out.jsonl")
        raise DataError("refused")
    first, second = sorted((body for _, body in server.requests), key=lambda body: body["seed"])
    assert [first[key] for key in ("temperature", "top_k", "top_p", "seed")] == [0.7, 64, 0.95, 5]
    assert second["seed"] == 6, "a prompt's seed doesn't depend on how many are asked at a time"
    text = TOKENIZER.decode(first["prompt"])
    assert text.startswith('<bos>[{"type": "function"') and "]T<|turn>user\na<turn|>" in text
    assert text.endswith("<|turn>model\n")


def test_it_goes_on_where_the_engine_went_away(server, local, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_client.time, "sleep", lambda seconds: None)
    ends, expected = local
    output = tmp_path / "out.jsonl"
    asked = connect(server, ends, concurrency=1)
    server.fails = [503] * 3  # gets through
    answer = asked._answer

    def vanishing(index, *rest):
        if index == 4:
            asked.client.close()
            asked.client = engine.httpx.Client(base_url="http://127.0.0.1:9")
        return answer(index, *rest)

    monkeypatch.setattr(asked, "_answer", vanishing)
    with pytest.raises(DataError, match="can't be reached.*The answers so far are kept: the same command goes on"):
        regenerate(EXAMPLES, asked, output)
    assert not output.exists()
    assert len(server.requests) == 3 + 4
    counts = regenerate(EXAMPLES, connect(server, ends), output)
    assert counts["answered"] == 3 and output.read_text() == expected
    assert len(server.requests) == 3 + 4 + 3


def test_refusals_are_counted_by_their_reason_and_asked_again(server, local, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_client.time, "sleep", lambda seconds: None)
    ends, expected = local
    rows = [json.loads(line) for line in expected.splitlines()]
    one, other = rows[0]["messages"][0]["content"], rows[1]["messages"][0]["content"]
    server.refused = {f"user\n{one}<": 400, f"user\n{other}<": 500}  # the second fails, while others get answers
    output = tmp_path / "out.jsonl"
    counts = regenerate(EXAMPLES, connect(server, ends), output, world_size=2, rank=0)
    counts = regenerate(EXAMPLES, connect(server, ends), output, world_size=2, rank=1)
    assert counts["refused"] == {"HTTP 400: no 400": 1, "HTTP 500: no 500 (7 times)": 1}
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows[2:]
    # A run that isn't over asks them again.
    output = tmp_path / "again.jsonl"
    regenerate(
        EXAMPLES,
        connect(server, ends),
        output,
        world_size=8,
        rank=EXAMPLES.index({"messages": rows[0]["messages"][:1]}),
    )
    server.refused, before = {}, len(server.requests)
    counts = regenerate(EXAMPLES, connect(server, ends), output)
    assert counts["answered"] == len(server.requests) - before == 7
    assert counts["refused"] == {} and output.read_text() == expected
    # Where nobody is answered, nothing is written.
    server.most = 3
    with pytest.raises(
        DataError, match="refused all of 7 prompts, the first with: the prompt doesn't fit the engine's 3"
    ):
        regenerate(EXAMPLES, connect(server, ends), tmp_path / "none.jsonl")
    server.most, server.fails = 512, [401]
    with pytest.raises(DataError, match="HTTP 401: wait"):
        regenerate(EXAMPLES, connect(server, ends, concurrency=1), tmp_path / "none.jsonl")
    suppressed = {int(token) for row in rows for token in TOKENIZER.encode(row["messages"][1]["content"])}
    counts = regenerate(
        EXAMPLES, connect(server, ends, suppressed=suppressed - {END}), tmp_path / "s.jsonl", world_size=8
    )
    assert all("which suppress_tokens of the base rules out" in reason for reason in counts["refused"])


@pytest.mark.parametrize("nonsense", ["a page", [1], {"error": "busy"}, {"choices": []}])
def test_answers_of_another_form_are_refusals(server, local, tmp_path, nonsense):
    server.nonsense = nonsense
    with pytest.raises(DataError, match="the engine refused all of 7 prompts, the first with: HTTP 200"):
        regenerate(EXAMPLES, connect(server, local[0]), tmp_path / "out.jsonl")
    server.models = [{"error": 1}]
    with pytest.raises(DataError, match="answers no list of models"):
        connect(server, local[0])


def test_prompts_with_pictures_go_as_chats_and_are_checked(server, local, tmp_path, monkeypatch):
    tokenizer = make_tokenizer(
        TURNS.replace(
            "message['content'] | trim + '<turn|>' -}}\n    {%- endif",
            "(message['content'] if message['content'] is string else "
            "'<|image|>' * (message['content'] | length - 1) + message['content'][-1]['text']) "
            "+ '<turn|>' -}}\n    {%- endif",
        )
    )
    for name, token in (("image", "<|image|>"), ("boi", "<|tool>"), ("eoi", "<tool|>")):
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    (tmp_path / "a.png").write_bytes(PNG)
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    example = {"messages": [{"role": "user", "content": content}], "images": [str(tmp_path / "a.png")]}
    again = {**example, "images": [data_url(PNG)]}
    rendered = "<bos><|turn>user\n<|tool><|image|><|image|><|image|><tool|>what?<turn|>\n<|turn>model\n"
    server.rendered = TOKENIZER.encode(rendered, add_special_tokens=False)
    asked = Engine(server.url, tokenizer, Sampling(COUNT), name="tiny", ends=list(range(400)), concurrency=2)
    regenerate([example, again], asked, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [example["images"], again["images"]]
    assert [row["messages"][0] for row in rows] == example["messages"] * 2
    for path, body in server.requests:
        assert path == "/v1/chat/completions" and "prompt" not in body
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        assert url == "data:image/png;base64," + base64.b64encode(PNG).decode()
    two = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}]
    two = {"messages": [{"role": "user", "content": two}], "images": example["images"] * 2}
    shown = "<|tool><|image|><|image|><|image|><tool|>"
    server.rendered = TOKENIZER.encode(rendered.replace(shown, shown * 2), add_special_tokens=False)
    regenerate([two], asked, tmp_path / "two.jsonl")
    assert (tmp_path / "two.jsonl").exists()
    server.rendered = TOKENIZER.encode(rendered.replace("what?", "who?"), add_special_tokens=False)
    with pytest.raises(
        DataError, match=r"by its own chat template, and from token \d+ it isn't training's: .*who.*what"
    ):
        regenerate([example], asked, tmp_path / "other.jsonl")


def test_the_command(server, base, local, tmp_path, capsys):
    ends, expected = local
    for part in (base, TOKENIZER):
        part.save_pretrained(tmp_path / "base")
    path = write_jsonl(tmp_path / "a.jsonl", EXAMPLES)
    words = ["regenerate", f"{tmp_path}/out.jsonl", "--url", server.url, "--max-new-tokens", str(COUNT)]
    words += [f"model.base={tmp_path}/base", f"data.train=[{{path: {path}}}]"]
    server.models = ["tiny", "lora"]
    assert command.main(words) == 2
    assert f"{server.url} serves tiny, lora: name the one that is to answer with --model" in capsys.readouterr().err
    assert command.main([*words, "--model", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "answers with tiny (from /models/tiny)" in out and "7 of 7 prompts answered now (" in out
    asked = {tuple(body["stop_token_ids"]) for _, body in server.requests}
    assert asked == {tuple(dict.fromkeys([*ends, END, TOKENIZER.eos_token_id]))}, "the base's ends and training's"
    with pytest.raises(SystemExit, match="2"):
        command.main([*words, "--concurrency", "0"])
