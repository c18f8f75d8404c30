"""The optimizer over both models, and its learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from joint_train.config import OptimConfig
from joint_train.distributed.moments import moved_by_muon, without_decay
from joint_train.pair.model import JointModel
from joint_train.train.compact import CompactAdamW
from joint_train.train.muon import Muon


def build_optimizer(model: JointModel, cfg: OptimConfig, on_host: bool = False) -> AdamW | CompactAdamW:
    """Up to four groups: base and drafter, each with and without weight decay.

    Args:
        cfg: the ``optim`` group.
        on_host: keep the states in CPU memory though the weights aren't there: ``parallel.cpu_offload=optimizer``.

    Norms, biases, scales and embedding tables (with the heads tied to them) have no decay, as is customary.
    """
    groups = []
    for (_, module), lr in zip(model.parts(), (cfg.lr, cfg.drafter_lr), strict=True):
        spared = without_decay(module)
        trained = [p for p in module.parameters() if p.requires_grad]
        decayed = [p for p in trained if id(p) not in spared]
        rest = [p for p in trained if id(p) in spared]
        groups.append({"params": decayed, "lr": lr, "peak_lr": lr, "weight_decay": cfg.weight_decay})
        groups.append({"params": rest, "lr": lr, "peak_lr": lr, "weight_decay": 0.0})
    groups = [g for g in groups if g["params"]]
    if cfg.name == "muon":
        matrices = [p for _, module in model.parts() for p in moved_by_muon(module)]
        return Muon(groups, matrices, tuple(cfg.betas), cfg.eps)
    if cfg.name != "adamw" or on_host:
        return CompactAdamW(groups, cfg.name, tuple(cfg.betas), cfg.eps, on_host)
    # Fused, because it can skip a step by a flag on the device: see update().
    return AdamW(groups, betas=tuple(cfg.betas), eps=cfg.eps, fused=True)


def lr_factor(step: int, cfg: OptimConfig, max_steps: int) -> float:
    """Learning rate of step 0, 1, … over its peak: linear warm-up, then ``schedule`` down to ``min_lr_ratio``."""
    if step < cfg.warmup_steps:
        return (step + 1) / (cfg.warmup_steps + 1)
    done = min(1.0, (step - cfg.warmup_steps) / max(1, max_steps - cfg.warmup_steps))
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[cfg.schedule]
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * shape if cfg.schedule != "constant" else 1.0


def total_norm(gradients: Iterable[Tensor | None]) -> Tensor:
    """L2 norm of all gradients together, over all ranks: a scalar; 0, on the CPU, if there is none.

    It is on the device of the mesh also where the gradients are in CPU memory (``parallel.cpu_offload=all``), so that
    it is reduced on the network of all other collectives.
    """
    gradients = [g for g in gradients if g is not None]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    norm = nn.utils.get_total_norm([g.to_local() if isinstance(g, DTensor) else g for g in gradients])
    if not sharded:
        return norm
    assert len(sharded) == len(gradients), "whole gradients beside sharded ones would count once for each rank"
    mesh, placements = sharded[0].device_mesh, sharded[0].placements
    square = norm.to(mesh.device_type).square()
    for dimension, placement in enumerate(placements):
        if placement.is_shard():
            dist.all_reduce(square, group=mesh.get_group(dimension))
    return square.sqrt()


@torch.no_grad()
def update(
    optimizer: AdamW | CompactAdamW,
    model: JointModel,
    max_grad_norm: float,
    factor: float,
    drafter_max_grad_norm: float | None = None,
) -> dict[str, Tensor]:
    """Clip the gradients and take one step.

    A step whose gradient norm isn't finite changes nothing, neither weights nor moments, and neither does one whose
    gradients are all 0, as where no rank has a target; that is decided on the device, so the host doesn't wait.

    Args:
        max_grad_norm: largest norm over both models; 0 leaves the gradients as they are.
        factor: of :func:`lr_factor`.
        drafter_max_grad_norm: if given, that of the drafter alone; ``max_grad_norm`` is that of the base alone then.

    Returns:
        The norms before clipping, scalars on the device: ``grad_norm`` and that of each model.
    """
    norms = {f"grad_norm_{name}": total_norm(p.grad for p in part.parameters()) for name, part in model.parts()}
    device = next(p.device for group in optimizer.param_groups for p in group["params"])  # of the update
    norm = torch.stack([norm.to(device, non_blocking=device.type != "cpu") for norm in norms.values()]).norm()
    finite = norm.isfinite()
    if drafter_max_grad_norm is None:
        clipped = [(model, max_grad_norm, norm)]
    else:
        limits = (max_grad_norm, drafter_max_grad_norm)
        clipped = [
            (part, limit, norms[f"grad_norm_{name}"].to(device))
            for (name, part), limit in zip(model.parts(), limits, strict=True)
        ]
    for part, limit, own in clipped:
        if limit > 0:
            # A norm that isn't finite would spread to every gradient, and hide where it came from.
            scale = torch.where(finite, own, 0.0)
            nn.utils.clip_grads_with_norm_([p for p in part.parameters() if p.requires_grad], limit, scale)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    optimizer.grad_scale, optimizer.found_inf = None, (~finite | (norm == 0)).float()
    optimizer.step()
    return {"grad_norm": norm, **norms}
