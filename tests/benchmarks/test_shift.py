"""The second half of `make train`: what fine-tuning does to a drafter that stays as it was."""

import json
import shutil
from pathlib import Path

from browser import BROWSER, browse

from benchmarks import shift
from joint_train.config import load


def test_the_table_and_the_page(starter_dir, tmp_path, capsys):
    """Untrained pairs: the stale pair is the new base with the old drafter, and the page is in one piece."""
    for run in ("run", "detached", "shifted"):
        for part in ("base", "drafter"):
            shutil.copytree(starter_dir / part, tmp_path / run / "export" / part)
        (tmp_path / run / "config.yaml").write_text("optim: {lr: 0.004}\n")
        lines = [
            {"step": step, "time": step, "base_loss": 8.0 / step, "drafter_loss": 1.0 / step} for step in (1, 2, 3)
        ]
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert shift.main([str(tmp_path), "data"]) == 0
    assert len((tmp_path / "code" / "train.jsonl").read_text().splitlines()) > 1000
    assert shift.main([str(tmp_path), "report", "--prompts", "3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"report: {tmp_path / 'report.html'}"
    rows = {line.split("  ")[0]: line.split() for line in said[-6:-2]}
    assert list(rows) == [
        "before fine-tuning",
        "base fine-tuned, drafter as it was (stale)",
        "both fine-tuned, base_grad_scale=0 (detached)",
        "both fine-tuned, base_grad_scale=0.1 (joint)",
    ]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 5 and "Go on with" in page
    if BROWSER:
        done = browse((tmp_path / "report.html").as_uri(), tmp_path / "profile", 1280, "--dump-dom")
        assert "CONSOLE" not in done.stderr


def test_the_settings_of_the_two_runs():
    cfg = load(["+experiment=starter_shift", "pair=OUT/run/export"])
    assert cfg.drafter.base_grad_scale == 0.1 and cfg.optim.clip == "separate"
    assert "drafter.base_grad_scale=0 output_dir=$(OUT)/detached" in Path("Makefile").read_text()
    assert cfg.model.base == "OUT/run/export/base" and cfg.data.train[0].path == "OUT/run/export/../../code/train.jsonl"
    assert cfg.eval.prompts == 0
