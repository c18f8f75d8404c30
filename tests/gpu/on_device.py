"""The device that the GPU suite runs on, and a joint step of a small pair there, to be compared with the CPU's."""

import os
from dataclasses import dataclass
from pathlib import Path

import test_parallel
import torch
from pairs import build_pair
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from joint_train.config import Config
from joint_train.distributed.mesh import init_distributed, init_mesh
from joint_train.pair.model import Gemma4JointOutput
from joint_train.pair.targets import joint_targets
from joint_train.weights.composite import Gemma4WithDrafter, load_pair

DEVICE = torch.device(os.environ.get("JOINT_TRAIN_GPU_SUITE_DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
CPU = torch.device("cpu")
# Real head sizes, and rows of several blocks of attention kernels with a window inside of them.
REAL_HEADS = dict(
    vocab_size=2048, vocab_size_per_layer_input=2048, hidden_size=128, intermediate_size=192, head_dim=256,
    global_head_dim=512, sliding_window=100,
)  # fmt: skip
SIZES = {"small": {}, "real heads": REAL_HEADS}
LENGTHS = {"small": 20, "real heads": 272}
# Sums that don't hang on which of two nearly equal logits is the larger.
CONTINUOUS = {"loss", "ce", "routing.ce", "count", "left_out", "full_rows"}


def one_rank(cfg: Config) -> DeviceMesh:
    """A mesh of this process alone: NCCL on a GPU, gloo on CPU. Another test may have ended the group before."""
    assert init_distributed(600).type == DEVICE.type
    return init_mesh(cfg.parallel)


def configure(folder: Path, shape: str = "e2b", size: str = "small", **overrides) -> Config:
    """The configuration of a small pair, which is written into ``folder`` once."""
    target = folder / f"{shape} {size}".replace(" ", "_")
    if not target.exists():
        for name, model in zip(
            ("base", "drafter"), build_pair(shape, dtype=torch.bfloat16, **SIZES[size]), strict=True
        ):
            for key, weight in model.named_parameters():
                if key.endswith("q_norm.weight"):
                    # Scores aren't divided by sqrt(head_dim) in Gemma 4, as its norms' weights are so small; of random
                    # ones a softmax is all but an argmax, which a step in bfloat16 says nothing about.
                    weight.data.mul_(weight.numel() ** -0.5)
            model.save_pretrained(target / name)
    model = {"model__base": str(target / "base"), "model__drafter": str(target / "drafter")}
    return test_parallel.config(**model, **overrides)


@dataclass
class Step:
    """What a step made, on the CPU in fp32."""

    loss: Tensor
    stats: dict[str, Tensor]
    gradients: dict[str, Tensor]


def forward_backward(model: Gemma4WithDrafter, device: torch.device, rows: dict, packed: bool) -> Gemma4JointOutput:
    """Of a micro-batch, as the trainer makes them; rows of several documents or of one each."""
    names = ["input_ids", "position_ids", "document_ids"] if packed else ["input_ids"]
    inputs = {name: rows[name].to(device) for name in names}
    targets = joint_targets(
        rows["labels"], rows["document_ids"] if packed else None, model.drafter_num_steps, "serving"
    )
    weights = model.loss_weights(targets.counts.to(device))
    model.zero_grad()
    out = model(**inputs, targets=targets.to(device), weights=weights)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return out


def step_of(model: Gemma4WithDrafter, device: torch.device, length: int = 20, packed: bool = True) -> Step:
    """What a step on eight rows makes."""
    out = forward_backward(model, device, test_parallel.batch(length=length), packed)
    return Step(
        out.loss.detach().float().cpu(),
        {name: x.float().cpu() for name, x in out.stats.named().items()},
        {name: gradient.float().cpu() for name, gradient in test_parallel.gradients(model).items()},
    )


def step(cfg: Config, device: torch.device, sharded: bool = True, **rows) -> Step:
    """A step of the configuration's pair, by FSDP2 on a mesh of one rank or without any of it."""
    return step_of(load_pair(cfg, one_rank(cfg) if sharded else None, device).train(), device, **rows)


def error(found: Step, expected: Step) -> float:
    """L2 norm of the difference of all gradients together, relative to that of the expected ones."""
    assert found.gradients.keys() == expected.gradients.keys()
    squares = [((found.gradients[n] - g).square().sum(), g.square().sum()) for n, g in expected.gradients.items()]
    difference, norm = (sum(column) ** 0.5 for column in zip(*squares, strict=True))
    return float(difference / norm)


def assert_equal(found: Step, expected: Step, tolerance: float) -> None:
    """Loss, sums and each weight's gradient; one of almost nothing is held to a thousandth of them all."""
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=0)
    overlap = {("dense" if "dense.agree" in expected.stats else "drafts") + ".acceptance_sampled"}
    for name in (CONTINUOUS & expected.stats.keys()) | overlap:
        torch.testing.assert_close(found.stats[name], expected.stats[name], rtol=tolerance, atol=tolerance)
    assert found.gradients.keys() == expected.gradients.keys()
    least = 1e-3 * sum(g.square().sum() for g in expected.gradients.values()) ** 0.5
    for name, gradient in expected.gradients.items():
        relative = (found.gradients[name] - gradient).norm() / gradient.norm().clamp(min=least)
        assert relative <= tolerance, f"{name}: relative error {relative:.2e}"
