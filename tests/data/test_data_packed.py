"""Packed rows against the same documents one a row: losses and gradients of base and drafter; and how full rows are."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import make_config, write_jsonl
from pairs import VOCAB_SIZE, build_pair

from joint_train import Gemma4WithDrafter
from joint_train.data import build_loader
from joint_train.data.packing import assemble
from joint_train.data.rows import Walk
from joint_train.starter import build_tokenizer, examples

K, LENGTH = 3, 48


def documents(seed: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Tokens, targets and source of some documents, shorter and longer than the sliding window and the rounds."""
    rng = np.random.default_rng(seed)
    lengths = [1, 2, 3, 5, 9, 17, 20, 31, 12, 48]
    return [(rng.integers(3, VOCAB_SIZE - 16, n), rng.random(n) < 0.9, i % 2) for i, n in enumerate(lengths)]


def batch(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    inputs = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
    inputs.pop("source")
    return inputs


def losses_and_gradients(model, inputs):
    model.zero_grad()
    out = model(**inputs, weights=torch.tensor([1.0, 0.7, 0.5, 0.3]))
    out.loss.backward()
    return out.stats.named(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for index, length in enumerate(lengths):
        row = next((row for row in rows if sum(lengths[i] for i in row) + length <= capacity), None)
        rows.append([index]) if row is None else row.append(index)
    return rows


@pytest.mark.parametrize("pairing", ["serving", "same_token"])
@pytest.mark.parametrize("shape", ["e2b", "31b"])
def test_packed_equals_unpacked(shape, pairing):
    base, drafter = build_pair(shape)
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=K, pairing=pairing)
    docs = documents(0)
    packed = batch([assemble([docs[i] for i in row], LENGTH) for row in first_fit([len(d[0]) for d in docs], LENGTH)])
    apart = batch([assemble([doc], LENGTH) for doc in docs])
    assert len(packed["input_ids"]) == 4 and packed["document_ids"].max() > 2

    stats, gradients = losses_and_gradients(model, packed)
    expected_stats, expected = losses_and_gradients(model, apart)
    assert stats["count"].tolist() == expected_stats["count"].tolist() and stats["count"].min() > 20
    torch.testing.assert_close(stats["loss"], expected_stats["loss"], rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert error < 1e-5, f"{name}: {error}"


def test_without_document_ids_the_losses_differ():
    """What the test above would miss if documents were not kept apart at all."""
    base, drafter = build_pair("e2b")
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=K)
    docs = documents(0)
    packed = batch([assemble([docs[i] for i in row], LENGTH) for row in first_fit([len(d[0]) for d in docs], LENGTH)])
    mixed = {**packed, "document_ids": (packed["document_ids"] > 0).long()}
    with torch.no_grad():
        right, wrong = (model(**inputs, weights=torch.ones(1 + K)).stats.loss for inputs in (packed, mixed))
    assert ((right - wrong).abs() > 1e-2 * right.abs()).all()


def test_packed_rows_are_full_on_the_starter_data(tmp_path):
    """At least 99 % of the positions are real tokens, over the first epoch."""
    chats, _ = examples(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer = build_tokenizer(chats)
    path = write_jsonl(tmp_path / "train.jsonl", chats)
    for max_length in (256, 1024):  # 256 is the starter configuration's
        cfg = make_config(tmp_path, [path], max_length=max_length, mixture="epoch")
        sequence = build_loader(cfg, tokenizer, "train", 0, 1).dataset.sequence
        rows = list(Walk(sequence))
        assert sum(document.length for row in rows for document in row) / (max_length * len(rows)) >= 0.99
