"""benchmarks.quantised: its rounding, and one start pair from end to end without training."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import quantised


@pytest.mark.parametrize(("form", "levels"), [("int4", 16), ("int3", 8), ("nf4", 16)])
def test_a_group_has_so_many_values(form, levels):
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    rounded = quantised.FORMS[form](weight)
    group = 64 if form == "nf4" else quantised.GROUP
    assert max(len(part.unique()) for part in rounded.unflatten(-1, (-1, group)).flatten(0, 1)) <= levels
    assert 0 < (rounded - weight).norm() / weight.norm() < (0.3 if form == "int3" else 0.15)


def test_a_start_pair_is_measured_on_each_base(starter_dir, tmp_path, monkeypatch):
    made = []

    def untrained(output, pair, *overrides, **options):
        made.append((output.name, overrides))
        for part in ("base", "drafter"):
            if not (output / "export" / part).exists():
                shutil.copytree(starter_dir / part, output / "export" / part)
        return output

    monkeypatch.setattr(quantised, "train", untrained)
    monkeypatch.setattr(quantised, "starter_pair", lambda folder, seed, timeout: starter_dir)
    arguments = [str(tmp_path), "--starts", "0", "--forms", "bf16", "int3", "--prompts", "3", "--max-new-tokens", "8"]
    assert quantised.main([*arguments, "--results", str(tmp_path / "found.json")]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["base"] for row in rows] == ["bf16", "int3"] and rows[0]["error"] == 0 < rows[1]["error"]
    for row in rows:
        for suffix in ("", "_decoded"):  # one drafter under each name
            values = [row[f"{drafter}{suffix}"]["value"] for drafter in quantised.DRAFTERS]
            assert len(set(values)) == 1 and 1 <= values[0] <= 5
        assert row["gain"]["value"] == row["gain_decoded"]["value"] == 0
    settings = dict(made)
    assert set(settings) == {"start", "bf16", "int3"}
    assert "freeze.base=true" in settings["int3"] and f"model.base={tmp_path}/start_0/bases/int3" in settings["int3"]
    a, b = (
        load_file(folder / "model.safetensors") for folder in (starter_dir / "base", tmp_path / "start_0/bases/int3")
    )
    changed = {name for name in a if not torch.equal(a[name].float(), b[name])}
    assert any("q_proj" in name for name in changed) and not any("norm" in n or "embed_tokens." in n for n in changed)
