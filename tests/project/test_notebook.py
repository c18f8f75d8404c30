"""The notebook runs from its first cell to its last."""

import json
import time
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"


@pytest.mark.slow  # half a minute of CPU
def test_every_cell_runs(monkeypatch, tmp_path):
    matplotlib.use("agg")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cells, namespace = json.loads(NOTEBOOK.read_text())["cells"], {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            began = time.monotonic()
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, {cell['id']}", "exec"), namespace)
            print(cell["id"], f"{time.monotonic() - began:.1f} s")
    assert namespace["history"][-1][0] < namespace["history"][0][0]
    assert bool((namespace["alone"] == namespace["drafted"]).all())
    assert [record["step"] for record in namespace["records"]] == list(range(13))
