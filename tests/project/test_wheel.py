"""The wheel in an environment of its own, in another folder: it has all that the commands need."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # it builds a wheel, and trains
def test_the_wheel_plans_and_trains_in_another_folder(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [str(word) for word in command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout + done.stderr

    run(sys.executable, "-m", "venv", "venv")
    python, command = tmp_path / "venv" / "bin" / "python", tmp_path / "venv" / "bin" / "joint-train"
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "wheels", ROOT)
    (wheel,) = (tmp_path / "wheels").glob("joint_train-*.whl")
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    # The other packages are borrowed; .pth files of a folder that one names aren't read, so this checkout isn't there.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    borrowed = {sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))}
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    assert str(tmp_path) in run(python, "-c", "import joint_train; print(joint_train.__file__)")
    assert run(command, "--version").startswith("joint-train ")
    assert "It fits" in run(command, "plan", "+recipe=gemma4_e2b_lora_1gpu", "--gpus", "1")
    assert "+recipe" in run(command, "train", "--help")
    run(command, "starter", "pair")
    said = run(
        command, "train", "+experiment=starter", "pair=pair", "output_dir=run", "max_steps=2", "data.max_length=64",
        "eval.batches=1", "eval.max_new_tokens=8", "tracking.wandb=disabled",
    )  # fmt: skip
    assert ": training pair/base" in said and "torchao" not in said and "Warning" not in said
    assert {path.name for path in (tmp_path / "run" / "export").iterdir()} >= {"base", "drafter"}
    run(command, "evaluate", "compare", "run", "--json")
    assert "kind: JobSet" in run(
        command, "submit", "--to", "kubernetes", "--dry-run", "image=i", "pvc=a", "--", "+recipe=gemma4_e2b_lora_8gpu",
        "data.train=/data/x.jsonl", "output_dir=/data/run",
    )  # fmt: skip
