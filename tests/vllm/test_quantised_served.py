"""A base in compressed-tensors int4, served by vLLM on CPU with a drafter that was trained on it: its text and its
steps are those of the folder as joint_train reads it. vLLM's kernel computes in bfloat16, and near ties may differ."""

import shutil

import pytest
import torch
from quantised_folders import quantise
from test_served import OPTIONS, by_vllm, options_of
from trained_pairs import K, prompts, texts, train

from joint_train import Gemma4WithDrafter
from joint_train.evaluate.decoding import decode, tokens_per_forward
from joint_train.evaluate.served import serve_command
from joint_train.weights.loading import load_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]


def tuned(base, drafter, out):
    """The drafter, trained on the quantised base; the export has nothing else."""
    model = Gemma4WithDrafter.from_pretrained(
        base, drafter, drafter_num_steps=K, quantization="as_saved", freeze_base_for_drafter=True
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        ids = texts("31b", 16, 40, generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    assert [folder.name for folder in out.iterdir()] == ["drafter"]
    return out / "drafter"


def test_an_int4_base_and_its_drafter(tmp_path):
    torch.set_num_threads(1)
    exported, drafter = train("31b", tmp_path)
    base = shutil.copytree(exported, tmp_path / "int4", ignore=shutil.ignore_patterns("joint_train_export.json"))
    quantise(base, "int4")
    drafter = tuned(base, drafter, tmp_path / "tuned")
    asked = prompts("31b")
    options = options_of(serve_command("vllm", base, drafter, K, None)) | OPTIONS | {"dtype": "bfloat16"}
    jobs = {"int4": {"options": options, "prompts": asked, "max_tokens": 48, "ignore_eos": False}}
    found = by_vllm(jobs, tmp_path)["int4"]
    assert "error" not in found, found["error"]
    models = [load_model(folder, torch.bfloat16) for folder in (base, drafter)]
    ours = [decode(*models, prompt, K, 48, engine=True) for prompt in asked]
    theirs = [[token for step in steps for token in step] for steps in found["steps"]]
    equal = [a == b.ids for a, b in zip(theirs, ours, strict=True)]
    formula = (found["generation_tokens"] - len(asked)) / found["spec_decode_num_drafts"]
    expected = tokens_per_forward(ours)
    print(f"{sum(equal)} of {len(equal)} texts, {formula:.3f} tokens per base forward, ours {expected:.3f}")
    assert sum(equal) >= len(equal) - 2
    assert formula == pytest.approx(expected, rel=0.05) and 1.2 < formula < 4.9
