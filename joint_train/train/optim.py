"""The optimizer over both models, and its learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from joint_train.config import OptimConfig
from joint_train.distributed.moments import moved_by_muon, weights_without_decay
from joint_train.distributed.parallelize import reshard, towers
from joint_train.distributed.placement import local_tensor
from joint_train.pair.model import JointModel
from joint_train.torch_private import norms as norm_of_each
from joint_train.train.compact import CompactAdamW
from joint_train.train.muon import Muon


def build_optimizer(model: JointModel, cfg: OptimConfig, on_host: bool = False) -> AdamW | CompactAdamW:
    """Groups of base and drafter, each with and without weight decay, and apart what some steps have no gradient of.

    Args:
        cfg: the ``optim`` group.
        on_host: keep the states in CPU memory though the weights aren't there: ``parallel.cpu_offload=optimizer``.

    Norms, biases, scales and embedding tables (with the heads tied to them) have no decay, as is customary; LoRA
    adapters have.
    """
    groups = []
    sometimes = without_gradient_in_some_steps(model)
    for (name, module), lr in zip(model.parts(), (cfg.lr, cfg.drafter_lr), strict=True):
        spared = weights_without_decay(module)
        sorted_out: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for p in module.parameters():
            if p.requires_grad:
                sorted_out.setdefault((id(p) in sometimes, id(p) in spared), []).append(p)
        for (apart, without), params in sorted(sorted_out.items(), key=lambda item: item[0]):
            decay = 0.0 if without else cfg.weight_decay
            rates = {"lr": lr, "peak_lr": lr, "of": name}
            groups.append({"params": params, "weight_decay": decay, "apart": apart, **rates})
    beta1, beta2 = cfg.betas
    if cfg.name == "muon":
        matrices = [p for _, module in model.parts() for p in moved_by_muon(module)]
        return Muon(groups, matrices, (beta1, beta2), cfg.eps)
    if cfg.name != "adamw" or on_host:
        return CompactAdamW(groups, cfg.name, (beta1, beta2), cfg.eps, on_host)
    # Fused, because it can skip a step by a flag on the device: see update().
    return AdamW(groups, betas=(beta1, beta2), eps=cfg.eps, fused=True)


def freeze_base(model: JointModel, optimizer: torch.optim.Optimizer) -> None:
    """Train the drafter alone from now on: what the optimizer keeps of the base is dropped. Between two steps.

    A base whose gradients merely are 0 would be moved on by its momentum and its decay.
    """
    reshard(model)
    model.freeze_base()
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["of"] == "base" else ():
            optimizer.state.pop(parameter, None)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["of"] != "base"]


def without_gradient_in_some_steps(model: JointModel) -> set[int]:
    """``id`` of each weight whose gradient is 0, or missing, in steps of some data: the towers' without an image, the
    drafter's ``post_projection`` where all answers are too short for a second round.

    Such a step must leave them as they are: decay would shrink them, for as long as there is no such data.
    """
    modules = (*towers(model.base), model.drafter.post_projection)
    return {id(p) for module in modules for p in module.parameters()}


def lr_factor(step: int, cfg: OptimConfig, max_steps: int, part: str = "base") -> float:
    """Learning rate of step 0, 1, … over its peak: linear warm-up, then ``schedule`` down to ``min_lr_ratio``, which is
    that of the last step, ``max_steps - 1``.

    Args:
        max_steps: in which the part is trained: of the base up to ``freeze.base_after``.
        part: ``base`` or ``drafter``, which may have a schedule of its own: one that decays with the base's anneals on
            a base that still moves.
    """
    schedule, least = cfg.schedule, cfg.min_lr_ratio
    if part == "drafter":
        schedule = cfg.drafter_schedule or schedule
        least = least if cfg.drafter_min_lr_ratio is None else cfg.drafter_min_lr_ratio
    if step < cfg.warmup_steps:
        return (step + 1) / (cfg.warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    last = max_steps - 1
    start = cfg.warmup_steps
    if schedule == "wsd":  # warm-up, stable, decay (Hu et al., arXiv 2404.06395, section 4.2)
        start = max(start, last - round(cfg.decay_share * max_steps))
    done = min(1.0, max(0, step - start) / max(1, last - start))
    shape = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
    return least + (1 - least) * shape


def total_norm(gradients: Iterable[Tensor | None]) -> Tensor:
    """L2 norm of all gradients together, over all ranks: a scalar, fp32 or wider; 0, on the CPU, if there is none.

    It is on the device of the mesh also where the gradients are in CPU memory (``parallel.cpu_offload=all``), so that
    it is reduced on the network of all other collectives.
    """
    present = [g for g in gradients if g is not None]
    if not present:
        return torch.zeros(())
    sharded = [g for g in present if isinstance(g, DTensor)]
    dtype = torch.promote_types(present[0].dtype, torch.float32)  # bfloat16's squares would stop adding up at 256
    of_each = norm_of_each([local_tensor(g) for g in present], dtype)
    norm = torch.stack([one.to(of_each[0].device) for one in of_each]).norm()
    if not sharded:
        return norm
    assert len(sharded) == len(present), "whole gradients beside sharded ones would count once for each rank"
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
    drafter_factor: float | None = None,
) -> dict[str, Tensor]:
    """Clip the gradients and take one step.

    A step whose gradient norm isn't finite changes nothing, neither weights nor moments, and neither does one whose
    gradients are all 0, as where no rank has a target; that is decided on the device, so the host doesn't wait. So it
    is with each group that is ``apart`` and whose own gradients are all 0.

    Args:
        max_grad_norm: largest norm over both models; 0 leaves the gradients as they are.
        factor: of :func:`lr_factor`.
        drafter_max_grad_norm: if given, that of the drafter alone; ``max_grad_norm`` is that of the base alone then.
        drafter_factor: of :func:`lr_factor` for the drafter, where it isn't that of the base.

    Returns:
        The norms before clipping, scalars on the device: ``grad_norm`` and that of each model.
    """
    norms = {f"grad_norm_{name}": total_norm(p.grad for p in part.parameters()) for name, part in model.parts()}
    device = next(p.device for group in optimizer.param_groups for p in group["params"])  # of the update
    norm = torch.stack([norm.to(device, non_blocking=device.type != "cpu") for norm in norms.values()]).norm()
    finite = norm.isfinite()
    clipped: list[tuple[nn.Module, float, Tensor]]
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
            # A norm that isn't finite would spread to every gradient and hide its origin.
            scale = torch.where(finite, own, 0.0)
            nn.utils.clip_grads_with_norm_([p for p in part.parameters() if p.requires_grad], limit, scale)
    for group in optimizer.param_groups:
        own_factor = drafter_factor if group.get("of") == "drafter" and drafter_factor is not None else factor
        group["lr"] = group["peak_lr"] * own_factor
    skip = (~finite | (norm == 0)).float()
    _step(optimizer, [group for group in optimizer.param_groups if not group.get("apart")], skip)
    for group in optimizer.param_groups:
        if group.get("apart"):
            own = total_norm(p.grad for p in group["params"]).to(device, non_blocking=device.type != "cpu")
            _step(optimizer, [group], torch.maximum(skip, (own == 0).float()))
    return {"grad_norm": norm, **norms}


def _step(optimizer: AdamW | CompactAdamW, groups: list[dict], skip: Tensor) -> None:
    """A step of some of the groups, which changes nothing where ``skip``, on the device, is 1."""
    every = optimizer.param_groups
    fused: Any = optimizer  # torch's AdamW looks for the first two, and declares neither
    fused.grad_scale, fused.found_inf, optimizer.param_groups = None, skip, groups
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = every
