"""benchmarks.data: a small size from end to end."""

import json

from benchmarks import compare, data, results


def test_one_size(starter_dir, tmp_path, capsys):
    lines = list(data.generated(300))
    assert lines[:100] == list(data.generated(100)) and len(set(lines)) == 300
    turns = [len(json.loads(line)["messages"]) for line in lines]
    assert set(turns) == {2, 4}

    options = ["--tokenizer", str(starter_dir / "base"), "--max-length", "256", "--sample", "50", "--batches", "3"]
    file = tmp_path / "found.json"
    data.main([str(tmp_path / "work"), "--rows", "300", *options, "--results", str(file)])
    found = json.loads(file.read_text())
    assert results.table(found) in capsys.readouterr().out
    (row,) = found["rows"]
    assert row.keys() == data.COLUMNS.keys() and row["size"] == "300"
    assert (tmp_path / "work/rows_300.jsonl").read_text() == "".join(lines)
    assert 0.1 < results.number(row["tokenising"]) < 20
    assert row["row"] > 1 and row["cache"] > 0 and 0 < row["first_batch"] < 60 and 0 < row["memory"] < 2000
    assert {row[f"{name}_ratio"] for name in ("first_batch", "memory", "row")} == {1}
    assert compare.main([str(file), str(file)]) == 0
