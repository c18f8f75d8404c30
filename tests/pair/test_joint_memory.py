"""What a joint step holds grows with the tokens by the layers' activations alone, whatever the vocabulary."""

import pytest
import torch

from benchmarks.joint_step import DRAFTER_HIDDEN, HIDDEN, build_pair
from joint_train.config import LossConfig
from joint_train.pair.targets import joint_targets
from joint_train.plan.meter import Meter
from joint_train.plan.stand_ins import stand_ins
from joint_train.weights.composite import Gemma4WithDrafter

K, BUDGET_MB = 4, 256
MLP, HEADS = 6144, 8 * 512  # of the base's wider layer; numbers a token


def peak(vocab_size: int, length: int) -> tuple[int, int]:
    """Bytes above the weights at the peak of a step whose tokens are all targets, and those of all gradients."""
    with torch.device("meta"):
        base, drafter = build_pair(vocab_size, ordered=False)
    model = Gemma4WithDrafter(
        base,
        drafter,
        drafter_num_steps=K,
        base_activation_checkpointing=True,
        drafter_activation_checkpointing=True,
        loss=(LossConfig(memory_budget_mb=BUDGET_MB)),
    ).train()
    ids = torch.zeros(1, length, dtype=torch.long)
    targets = joint_targets(ids, None, K, "serving").to("meta")
    meter = Meter()
    with meter, stand_ins(meter):
        for tensor in (*model.parameters(), *model.buffers()):
            meter.ignore(tensor)
        model(ids.to("meta"), targets=targets, weights=torch.ones(1 + K, device="meta")).loss.backward()
    return meter.peak, sum(p.numel() for p in model.parameters()) * 4


def test_growth_with_the_length_is_the_activations():
    """From S = 512 to 2048 the peak grows by the same bytes at V = 262,144 as at a sixteenth of it.

    The bound: one base layer is recomputed at a time. It holds 4 tensors of the MLP's width (gate, up, activation and
    product) with the gradient of one, 6 of the heads' width (queries before and after norm and rotation, the output,
    and a gradient), and 10 of the hidden size. What is kept for it is the hidden size once a layer and once a round,
    with as much for gradients, and the drafter's state once a round.
    """
    growth = {}
    for vocab_size in (16_384, 262_144):
        (short, gradients), (long, _) = peak(vocab_size, 512), peak(vocab_size, 2048)
        growth[vocab_size] = (long - short) / 1536 / 4
        assert short <= gradients + BUDGET_MB * 2**20
    assert growth[16_384] == pytest.approx(growth[262_144], abs=1)
    layer = 5 * MLP + 6 * HEADS + 10 * HIDDEN
    kept = 2 * (2 + K) * HIDDEN + 2 * K * DRAFTER_HIDDEN
    assert growth[262_144] <= layer + kept < 2 * growth[262_144]
