"""A small run that saves and resumes, for the tests of checkpoints: real models, sharding and optimizer, random data.

Each rank draws its batches from Python's, NumPy's and torch's generators, so that a resume whose random states differ
has other losses.
"""

import random

import numpy as np
import torch
import torch.distributed as dist
from configs import compose
from pairs import build_pair
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from joint_train.checkpoint import Checkpointer
from joint_train.checkpoint.state import optimizer_tensors, pair_tensors
from joint_train.config import Config
from joint_train.distributed.mesh import init_mesh
from joint_train.distributed.parallelize import freeze, parallelize
from joint_train.train.optim import build_optimizer
from joint_train.weights.composite import Gemma4WithDrafter

TIMEOUT = 60


def config(overrides: dict | None = None) -> Config:
    settings = {
        "drafter.num_steps": 2,
        "loss.drafter": "ce",
        "optim.lr": 1e-3,
        "optim.drafter_lr": 1e-3,
        "checkpoint.every": 2,
    }
    return compose(settings | (overrides or {}))


def build(cfg: Config, shape: str = "e2b", seed: int = 0, **pair):
    base, drafter = build_pair(shape, seed=seed, **pair)
    model = Gemma4WithDrafter(
        base,
        drafter,
        drafter_num_steps=cfg.drafter.num_steps,
        freeze_base_for_drafter=cfg.freeze.base,
        loss=cfg.loss,
    )
    freeze(model, cfg.freeze)
    if dist.is_initialized():
        parallelize(model, init_mesh(cfg.parallel), cfg)
    return model.train(), build_optimizer(model, cfg.optim)


class Half(nn.Module):
    """One half of a stand-in pair, where only files and ranks are tested."""

    def __init__(self, size: int):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size))
        self.register_buffer("layer_scalar", torch.ones(1))
        self.config = PreTrainedConfig(hidden_size=size)


class StandIn(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.drafter = Half(64), Half(32)


def build_stand_in():
    """Replicated, so that saving spreads its tensors over the ranks; with optimizer state."""
    torch.manual_seed(0)
    model = StandIn()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    return model, optimizer


def train_step(model, optimizer) -> float:
    """One step on this rank's random batch; the mean loss of all ranks."""
    ids = torch.randint(3, 240, (1, 12))
    ids[0, 0] = random.randrange(3, 240)
    ids[0, 1] = int(np.random.randint(3, 240))
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = loss.detach()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def full(tensor: torch.Tensor) -> np.ndarray:
    whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
    return (whole.float() if whole.dtype == torch.bfloat16 else whole).numpy().copy()


def everything(model, optimizer) -> dict[str, np.ndarray]:
    """Every weight, buffer and optimizer tensor, unsharded. Collective."""
    parts = {**pair_tensors(model), "optimizer": optimizer_tensors(model, optimizer)}
    return {f"{part}:{name}": full(tensor) for part, tensors in parts.items() for name, tensor in tensors.items()}


def seed_all(rank: int) -> None:
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)


def train(rank: int, output_dir, overrides: dict, steps: int, on_step=None):
    """Run to ``steps``, from the newest checkpoint. Returns (losses by step, everything at the end)."""
    cfg = config(overrides)
    seed_all(rank)
    model, optimizer = build(cfg)
    checkpointer = Checkpointer(output_dir, cfg.checkpoint, timeout_seconds=TIMEOUT, lock_wait_seconds=5)
    try:
        start = 0
        if path := checkpointer.find_resume(cfg.resume):
            start = checkpointer.load(path, model, optimizer, config=cfg)["step"]
        losses = {}
        for step in range(start + 1, steps + 1):
            losses[step] = train_step(model, optimizer)
            checkpointer.poll()
            if step % cfg.checkpoint.every == 0:
                checkpointer.save(step, model, optimizer, {"step": step}, config=cfg, metrics={"loss": losses[step]})
            if on_step:
                on_step(rank, step, checkpointer)
    finally:
        checkpointer.close()
    return losses, everything(model, optimizer)
