"""Results as data: what a command writes, the tables that the pages make of it, and two of them compared."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import compare, results

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(results.FOLDER.glob("*.json"))
COLUMNS = {"kind": ("loss", ""), "length": ("tokens", ".2f"), "change": ("change", "+.1%"), "time": ("time", ".1f s")}
ROWS = [
    {"kind": "kl", "length": {"mean": 3.1, "sd": 0.1}, "change": {"value": 0.1234, "low": 0.1, "high": 0.2}, "time": 2},
    {"kind": "ce", "length": 2.0, "change": {"value": 0.05, "low": None, "high": None}, "time": None},
    {"kind": "tv", "length": "over 9 GiB", "change": {"value": None, "low": None, "high": None}},
]


def test_a_table_shows_spreads_intervals_units_and_gaps():
    assert results.table({"columns": COLUMNS, "rows": ROWS}).splitlines() == [
        "| loss | tokens | change | time |",
        "| --- | --- | --- | --- |",
        "| kl | 3.10 ± 0.10 | +12.3% [+10.0%, +20.0%] | 2.0 s |",
        "| ce | 2.00 | +5.0% |  |",
        "| tv | over 9 GiB | – |  |",
    ]


def written(folder: Path, name: str, rows: list[dict], monkeypatch, capsys) -> Path:
    monkeypatch.setattr(sys, "argv", ["x", "DIR", "--results", str(folder / name), "--seeds", "0"])
    results.finish(results.record("loss_sweep", COLUMNS, rows), folder / name)
    capsys.readouterr()
    return folder / name


def test_a_result_says_where_it_comes_from_and_compares(tmp_path, monkeypatch, capsys):
    old = written(tmp_path, "old.json", ROWS, monkeypatch, capsys)
    changed = [
        {**ROWS[0], "length": {"mean": 6.2, "sd": 0.3}},
        {**ROWS[1], "length": 1.0},
        {"kind": "new", "length": 1},
    ]
    new = written(tmp_path, "new.json", changed, monkeypatch, capsys)
    result = json.loads(new.read_text())
    assert result["command"] == "python -m benchmarks.loss_sweep DIR --seeds 0"
    assert result["date"] and result["machine"] and {"torch", "transformers", "python"} <= set(result["versions"])
    assert compare.main([str(old), str(new)]) == 0
    said = capsys.readouterr().out
    assert "| kl | tokens | 3.1 | 6.2 | 2.000 |" in said and "| ce | tokens | 2 | 1 | 0.500 |" in said
    assert "\n| new |" not in said and "| tv |" not in said


def test_results_that_cant_be_compared_are_an_error(tmp_path, monkeypatch, capsys):
    old = written(tmp_path, "old.json", ROWS[:1], monkeypatch, capsys)
    other = written(tmp_path, "other.json", ROWS[1:2], monkeypatch, capsys)
    assert compare.main([str(old), str(other)]) == 2 and "no row in common" in capsys.readouterr().err
    other.write_text(old.read_text().replace('"loss_sweep"', '"pairing"'))
    assert compare.main([str(old), str(other)]) == 2 and "different benchmarks" in capsys.readouterr().err


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_kept_result_is_whole_and_on_a_page(file):
    result = results.read(Path(file.stem))
    assert result["command"] and result["date"] and result["machine"] and len(result["versions"]["commit"]) >= 40
    assert all(set(row) & set(result["columns"]) for row in result["rows"]) and results.table(result)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = f"{{{{ results {file.stem}"
    assert any(named in page.read_text() for page in pages) or file.stem == "shift"


def test_the_readmes_table_is_the_kept_result():
    """GitHub shows the README as it is, so its table is text."""
    assert results.table(results.read(Path("shift"))).splitlines()[2:] == [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith(("| before", "| base fine", "| both"))
    ]
