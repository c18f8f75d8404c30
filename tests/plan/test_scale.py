"""The plan against torch's own FSDP2 code at released sizes, on fake tensors and a fake process group."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from joint_train.plan.machine import Machine

ROOT = Path(__file__).resolve().parents[2]
UNITS = {
    "layers": "layers",
    "none": "per-layer embeddings",  # no unit of FSDP2: what is exchanged outside of one
    "Gemma4ForConditionalGeneration": "base root",
    "Gemma4AssistantForCausalLM": "drafter",
}


pytestmark = pytest.mark.skipif(
    not hasattr(dist, "all_gather_single"), reason="the collectives of torch 2.13 are played"
)


def measured(model: str, ranks: int, length: int, *overrides: str) -> dict:
    """`benchmarks.scale` in a process of its own: it replaces parts of torch."""
    command = [sys.executable, "-m", "benchmarks.scale", "--one", "--models", model, "--ranks", str(ranks)]
    command += ["--lengths", str(length), "--", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def compare(found: dict) -> None:
    assert found["planned"] == pytest.approx(found["peak"], rel=0.03)
    planned = {
        f"{kind} {unit}": size
        for kind in ("all-gather", "reduce-scatter", "all-to-all")
        for unit, size in found["planned communication"][kind].items()
    }
    units = {}
    for name, size in found["units"].items():
        kind, _, unit = name.partition(" ")
        if kind != "all-reduce" and size:
            units[f"{kind} {UNITS[unit]}"] = size
    assert units == planned
    # No byte is gathered or reduced more often than it must be, but for padding.
    for kind in ("all-gather", "reduce-scatter"):
        assert found[kind] <= 1.03 * found[f"least {kind}"]
    replicas, shards = (int(n) for n in found["mesh"].split(" x "))
    if replicas > 1:
        assert sum(found["planned communication"]["all-reduce"].values()) == pytest.approx(
            found["all-reduce"], rel=0.001
        )  # the loss's counts and norms are all-reduced too


def test_e4b_on_two_meshes():
    compare(measured("gemma4_e4b", 8, 2048))
    compare(measured("gemma4_e4b", 128, 2048, "optim.grad_accum=2"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [8, 64, 512])
@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("model", ["gemma4_31b", "gemma4_26b_a4b", "gemma4_e4b"])
def test_every_size(model, ranks, length, accumulate):
    compare(measured(model, ranks, length, f"optim.grad_accum={accumulate}"))


@pytest.mark.slow
def test_experts_over_more_ranks_than_there_are_experts():
    """128 experts over 256 ranks: cut along another dimension, they are gathered once, not twice as padding."""
    compare(measured("gemma4_26b_a4b", 256, 2048, "parallel.dp_shard=256"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", [("optim.name=adamw_bf16",), ("parallel.cpu_offload=optimizer",)], ids=lambda setting: setting[0]
)
def test_31b_in_full_at_32k_fits_on_eight_gpus_of_80_gb(setting):
    """With the inputs of what is recomputed on the host; with AdamW's moments in fp32 on the GPU it doesn't fit."""
    found = measured("gemma4_31b", 8, 32768, "activation_checkpointing.offload=true", *setting)
    compare(found)
    assert found["peak"] <= Machine().usable


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gemma4_31b", "gemma4_26b_a4b", "gemma4_e4b"])
def test_a_base_in_codes(model):
    compare(measured(model, 8, 2048, "lora.r=16", "model.quantization=nf4"))
