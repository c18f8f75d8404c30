"""An export pushed to the hub: the real client against a small stand-in of the hub's HTTP API on loopback."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from checkpoint_run import config

from joint_train.config import ConfigError, validate


class Hub(BaseHTTPRequestHandler):
    """Repositories are dictionaries of files; weights come as LFS objects, everything in one commit."""

    protocol_version = "HTTP/1.1"
    repositories: dict
    visibility: dict
    objects: dict
    refuse: list  # paths that are answered with 500, each once

    def answer(self, body=None, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        files = self.repositories["/".join(parts[2:4])]
        if "tree" in parts:
            self.answer([{"type": "file", "path": f, "size": len(d), "oid": "0" * 40} for f, d in files.items()])
        else:
            siblings = [{"rfilename": name} for name in files]
            self.answer({"id": "/".join(parts[2:4]), "sha": "0" * 40, "siblings": siblings})

    def do_PUT(self):
        self.objects[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0]
        assert self.headers["Authorization"] == "Bearer hf_secret"
        if wanted := [part for part in self.refuse if part in path]:
            self.refuse.remove(wanted[0])
            return self.answer({"error": "down"}, 501)
        parts = path.strip("/").split("/")
        if path.endswith("/repos/create"):
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {})
            self.visibility[name] = asked.get("private", asked.get("visibility"))
            self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        elif "preupload" in parts:
            files = json.loads(body)["files"]
            mode = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
            self.answer({"files": [{"path": f, "uploadMode": m, "shouldIgnore": False} for f, m in mode.items()]})
        elif path.endswith("/objects/batch"):
            url = f"http://{self.headers['Host']}/lfs/"
            self.answer({
                "objects": [
                    {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": url + o["oid"]}}}
                    for o in json.loads(body)["objects"]
                ]
            })  # fmt: skip
        elif "commit" in parts:
            repository = "/".join(parts[2:4])
            files = self.repositories[repository]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            url = f"http://{self.headers['Host']}/{repository}/commit/{'0' * 40}"
            self.answer({"commitUrl": url, "commitOid": "0" * 40})

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    Hub.repositories, Hub.visibility, Hub.objects, Hub.refuse = {}, {}, {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


SCRIPT = """
import logging, pathlib, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from joint_train.weights import hub
hub.PAUSE_SECONDS = 0.01
hub.Push(pathlib.Path(sys.argv[1]), "me/pair", private=True).finish(float(sys.argv[2]))
"""


def push(endpoint, folder, seconds=60):
    """In a process of its own: the client reads its endpoint when it is imported."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
    env = {name: value for name, value in env.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(seconds)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_an_export_is_pushed_as_two_private_repositories(hub, tmp_path):
    files = {}
    for part in ("base", "drafter"):
        (tmp_path / part).mkdir()
        files[part] = {"config.json": f'{{"part": "{part}"}}'.encode(), "model.safetensors": part.encode() * 999}
        for name, data in files[part].items():
            (tmp_path / part / name).write_bytes(data)
    Hub.repositories["me/pair-base"] = {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    Hub.refuse += ["commit", "create"]  # one failure each: tried again
    said = push(hub, tmp_path)
    assert "pushed" in said and "/me/pair-base and" in said and "/me/pair-drafter" in said
    assert Hub.repositories == {
        "me/pair-base": files["base"] | {"notes.txt": b"mine"},
        "me/pair-drafter": files["drafter"],
    }
    assert Hub.visibility.keys() == Hub.repositories.keys()
    assert all(value in (True, "private") for value in Hub.visibility.values())
    assert {hashlib.sha256(data).hexdigest() for data in Hub.objects.values()} == set(Hub.objects)

    (tmp_path / "drafter_last").mkdir()
    (tmp_path / "drafter_last" / "config.json").write_bytes(b"{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(b"{}")
    push(hub, tmp_path)
    assert Hub.repositories["me/pair-adapter"] == {"adapter_config.json": b"{}"}

    Hub.refuse += ["create"] * 3
    said = push(hub, tmp_path)
    assert "the export was not pushed" in said and f"`hf upload me/pair-base {tmp_path}/base`" in said
    assert f"`hf upload me/pair-adapter {tmp_path}/adapter`" in said
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == files["base"]["model.safetensors"]


def test_a_push_that_cannot_work_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)

    def refused(**overrides):
        with pytest.raises(ConfigError) as error:
            config({"data.train": [{"path": "x.jsonl"}], "model.export.push_to_hub": "me/pair", **overrides})
        return str(error.value)

    assert "hf auth login" in refused()
    assert "at_end" in refused(**{"model.export.at_end": False})
    assert "repository id" in refused(**{"model.export.push_to_hub": "a/b/c"})
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    assert "checkpoint.upload_wait_seconds" in refused(**{"parallel.timeout_seconds": 100})
    validate(config({"data.train": [{"path": "x.jsonl"}], "model.export.push_to_hub": "me/pair"}), 1)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    assert "HF_HUB_OFFLINE" in refused()
