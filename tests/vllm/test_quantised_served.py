"""A base in compressed-tensors int4, served by vLLM on CPU with a drafter that was trained on it: its text and its
steps are those of the folder as joint_train reads it. vLLM's kernel computes in two bytes: float16 has few ties."""

import itertools
import shutil

import pytest
import torch
from quantised_folders import quantise
from test_served import OPTIONS, by_vllm, options_of
from trained_pairs import K, prompts, texts, train

from joint_train import Gemma4WithDrafter
from joint_train.evaluate.decoding import Decoded, decode, tokens_per_forward
from joint_train.evaluate.served import serve_command
from joint_train.weights import unpack
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


def differences(theirs: list[list[list[int]]], ours: list[Decoded], base, asked: list[list[int]]) -> list[str]:
    """Where vLLM's steps aren't ours. Behind a tie two texts may go apart: they are compared up to there.

    Args:
        base: in float32.
    """
    found = []
    for prompt, steps, decoded in zip(asked, theirs, ours, strict=True):
        text, settled = [token for step in steps for token in step], [len(step) for step in steps[1:]]
        pairs = list(zip(text, decoded.ids, strict=False))
        first = next((i for i, (their, our) in enumerate(pairs) if their != our), None)
        if first is None:
            found += [f"{settled} instead of {decoded.settled}"] * (settled != decoded.settled)
            continue
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([prompt + text[:first]])).logits[0, -1]
        near = 2 * torch.finfo(torch.float16).eps * float(logits.abs().max())
        if float((logits[list(pairs[first])] - logits.max()).abs().max()) > near:
            found.append(f"token {first} is {text[first]} instead of {decoded.ids[first]}")
        ends = [list(itertools.accumulate(counts, initial=1)) for counts in (settled, decoded.settled)]
        until = [[end for end in of_one if end <= first] for of_one in ends]
        found += [f"steps end at {until[0]} instead of {until[1]}"] * (until[0] != until[1])
    return found


def swap_nibbles(monkeypatch) -> None:
    read = unpack.Bits.__getitem__
    monkeypatch.setattr(
        unpack.Bits, "__getitem__", lambda self, part: read(self, part).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    )


def cast_scales(monkeypatch) -> None:
    read = unpack.Grid.__getitem__
    monkeypatch.setattr(unpack.Grid, "__getitem__", lambda self, part: read(self, part).to(torch.float8_e5m2).float())


def test_an_int4_base_and_its_drafter(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    exported, drafter = train("31b", tmp_path)
    base = shutil.copytree(exported, tmp_path / "int4", ignore=shutil.ignore_patterns("joint_train_export.json"))
    quantise(base, "int4")
    drafter = tuned(base, drafter, tmp_path / "tuned")
    asked = prompts("31b")
    options = options_of(serve_command("vllm", base, drafter, K, None)) | OPTIONS | {"dtype": "float16"}
    jobs = {"int4": {"options": options, "prompts": asked, "max_tokens": 48, "ignore_eos": False}}
    found = by_vllm(jobs, tmp_path)["int4"]
    assert "error" not in found, found["error"]

    def by_us() -> tuple[list[Decoded], list[str]]:
        models = [load_model(folder, torch.float16) for folder in (base, drafter)]
        decoded = [decode(*models, prompt, K, 48, engine=True) for prompt in asked]
        return decoded, differences(found["steps"], decoded, load_model(base, torch.float32), asked)

    ours, other = by_us()
    formula = (found["generation_tokens"] - len(asked)) / found["spec_decode_num_drafts"]
    print(f"{formula:.3f} tokens per base forward, ours {tokens_per_forward(ours):.3f}")
    assert not other and 1.2 < formula < 4.9
    if [[token for step in steps for token in step] for steps in found["steps"]] == [d.ids for d in ours]:
        assert formula == pytest.approx(tokens_per_forward(ours), abs=1e-12)
    for fault in (swap_nibbles, cast_scales):
        with monkeypatch.context() as patched:
            fault(patched)
            other = by_us()[1]
        print(fault.__name__, other)
        assert other
