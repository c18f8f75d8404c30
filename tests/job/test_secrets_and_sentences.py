"""Secrets stay interpolations wherever a run writes; what can't be written is a sentence with its path and advice."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from joint_train.errors import WriteError
from joint_train.files import naming, replace
from joint_train.train.tracking import JsonLines

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_aSecretThatNobodyMaySee"
SMALL = [
    "data.max_length=48", "data.micro_batch_size=1", "data.num_workers=0", "drafter.num_steps=2", "eval.every=0",
    "eval.batches=1", "eval.prompts=0", "max_steps=1", "checkpoint.every=1",
]  # fmt: skip


def job(folder, *overrides, **environment):
    command = [sys.executable, "-m", "joint_train", "+experiment=starter", *SMALL, *overrides]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def test_a_secret_of_the_environment_is_in_no_file_and_no_log(starter_dir, tmp_path):
    tokenizer = tmp_path / "tokenizer"  # its chat template reads the option that holds the secret
    shutil.copytree(starter_dir / "base", tokenizer, ignore=shutil.ignore_patterns("*.safetensors"))
    template = (tokenizer / "chat_template.jinja").read_text()
    (tokenizer / "chat_template.jinja").write_text("{%- if key %}{% endif -%}" + template)
    overrides = [
        f"pair={starter_dir}", "output_dir=run", "tracking.wandb=offline", "tracking.name=${oc.env:A_NAME}",
        f"data.tokenizer={tokenizer}", "data.cache_dir=cache",
        "data.chat_template_kwargs={key: '${oc.env:A_TOKEN}'}", "model.export.at_end=false",
    ]  # fmt: skip
    done = job(tmp_path, *overrides, A_TOKEN=SECRET, A_NAME="by-its-name")
    assert done.returncode == 0, done.stderr[-2000:]
    assert SECRET not in done.stdout + done.stderr
    files = {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert [name for name, data in files.items() if SECRET.encode() in data] == []
    logged = [data for name, data in files.items() if name.endswith(".wandb")]
    assert logged and all(b"by-its-name" in data for data in logged)  # wandb's file was looked into
    for name in ("run/config.yaml", "run/checkpoints/step_00000001/config.json"):
        assert b"${oc.env:A_TOKEN}" in files[name]


def test_a_job_script_has_the_interpolation(tmp_path, monkeypatch, capsys):
    from launch import submit

    monkeypatch.setenv("A_TOKEN", SECRET)
    data = 'data.train=[{path: "x.jsonl"}]'
    overrides = ["model.base=/a", "model.drafter=/b", data, "tracking.name=${oc.env:A_TOKEN}", f"output_dir={tmp_path}"]
    assert submit.main(["gpus_per_node=1", "--dry-run", "--", *overrides]) == 0
    said = capsys.readouterr()
    assert "tracking.name=${oc.env:A_TOKEN}" in said.out and SECRET not in said.out + said.err


def test_what_cannot_be_written_is_a_sentence(tmp_path):
    if os.geteuid() == 0 and not os.path.exists("/dev/full"):
        pytest.skip("nothing here refuses root")
    with pytest.raises(WriteError, match="/dev/full can't be written: No space left on device. Free space there, or"):
        with naming(Path("/dev/full"), "output_dir"), open("/dev/full", "w") as file:
            file.write("x" * 100_000)
    for number, advice in (
        (errno.ENOSPC, "Free space"),
        (errno.EDQUOT, "Free space"),
        (errno.EROFS, "Make it writable"),
    ):
        words = f"{tmp_path} can't be written: .*{advice}.*set data.cache_dir to"
        with pytest.raises(WriteError, match=words) as found:
            with naming(tmp_path, "data.cache_dir"):
                raise OSError(number, os.strerror(number))
        assert found.value.errno == number
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file/.*x.* can't be written: Not a directory"):
        replace(tmp_path / "file/x", "text")


def test_a_full_disk_under_the_metrics_and_bytes_that_are_no_text(tmp_path, monkeypatch):
    records = JsonLines(tmp_path / "metrics.jsonl", 0)
    records.file = open("/dev/full", "a")
    with pytest.raises(WriteError, match="metrics.jsonl can't be written: No space left.*set output_dir to"):
        records.log(1, {"loss": 1.0})
    raw = b'{"step": 1}\n{"step": 2, "x": "\xff\xfe"}\n\x00\x80\n' + b"[" * 100_000 + b'\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_bytes(raw)
    JsonLines(tmp_path / "metrics.jsonl", 3).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 3}\n'
    dropped = (tmp_path / "metrics.dropped.jsonl").read_bytes()
    assert b'{"step": 2, "x": "\xff\xfe"}\n' in dropped and b"\x00\x80\n" in dropped
    replace(tmp_path / "config.yaml", "a")
    assert not list(tmp_path.glob(".*"))


def test_a_cache_that_cannot_be_made_names_the_key(starter_dir, tmp_path):
    (tmp_path / "home").write_text("no folder")
    done = job(tmp_path, f"pair={starter_dir}", "output_dir=run", f"data.cache_dir={tmp_path}/home/cache",
               "tracking.wandb=disabled")  # fmt: skip
    assert done.returncode not in (0, 85) and "Traceback" not in done.stderr
    assert f"{tmp_path}/home/cache" in done.stderr and "can't be written: Not a directory" in done.stderr
