"""AdamW over both models, and its learning-rate schedule."""

import math

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from joint_train.model import Gemma4WithDrafter


def build_optimizer(model: Gemma4WithDrafter, cfg: DictConfig) -> AdamW:
    """Four groups: base and drafter, each with and without weight decay.

    Norms, biases, scales and embedding tables (with the heads tied to them) have no decay, as is customary.
    """
    groups = []
    for name, module, lr in (("base", model.base, cfg.lr), ("drafter", model.drafter, cfg.drafter_lr)):
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        trained = [p for p in module.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim > 1 and id(p) not in embeddings]
        rest = [p for p in trained if p.ndim <= 1 or id(p) in embeddings]
        groups.append({"name": f"{name}.decay", "params": decayed, "lr": lr, "weight_decay": cfg.weight_decay})
        groups.append({"name": f"{name}.no_decay", "params": rest, "lr": lr, "weight_decay": 0.0})
    return AdamW([g for g in groups if g["params"]], betas=tuple(cfg.betas), eps=cfg.eps, foreach=True)


def build_schedule(optimizer: torch.optim.Optimizer, cfg: DictConfig, max_steps: int) -> LambdaLR:
    """Linear warm-up over ``warmup_steps``, then ``schedule`` down to ``min_lr_ratio`` of the peak at ``max_steps``."""

    def factor(step: int) -> float:
        if step < cfg.warmup_steps:
            return (step + 1) / (cfg.warmup_steps + 1)
        done = (step - cfg.warmup_steps) / max(1, max_steps - cfg.warmup_steps)
        shape = {"cosine": (1 + math.cos(math.pi * min(1.0, done))) / 2, "linear": max(0.0, 1 - done), "constant": 1.0}
        return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * shape[cfg.schedule]

    return LambdaLR(optimizer, factor)
