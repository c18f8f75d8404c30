"""What would fit: the longest rows, and the settings that take less memory."""

from collections.abc import Mapping
from importlib.util import find_spec

import torch

from joint_train.config import Config, select, with_overrides
from joint_train.distributed.quantised import LEAST_TORCH
from joint_train.pair.loss import memory_budget_mb
from joint_train.plan.ladder import rungs
from joint_train.plan.machine import Machine
from joint_train.plan.planner import Plan, make_plan, mesh_sizes


def longest(cfg: Config, machine: Machine, plan: Plan, unit: int = 256, most: int = 2**20) -> int:
    """The largest ``data.max_length`` that fits, in multiples of `unit` and up to `most`, to 6 %; 0 if none does.

    What is recomputed by ``auto`` is then as much as can be. The peak is nearly linear in the length: the first guess
    takes all activations to grow with it, the others are on the line through the two nearest lengths, and a length that
    fits is the last one where that line says so.

    Args:
        plan: of the configuration.
    """
    as_set, cfg = cfg.activation_checkpointing, pinned(cfg)
    start, most = cfg.data.max_length // unit, most // unit
    low, high = (start, None) if plan.peak <= machine.usable else (0, -(-cfg.data.max_length // unit))
    if low >= most:
        return cfg.data.max_length
    peaks: dict[int, int] = {}
    last, at = plan, cfg.data.max_length / unit
    if plan.chosen in ({}, rungs(as_set)[-1]) and cfg.data.max_length % unit == 0:
        peaks[start] = plan.peak
    while high is None or high - low > max(1, low // 16):
        if len(peaks) < 2:
            activations = last.memory["activations"]
            limit = at * max(0.0, activations + machine.usable - last.peak) / activations
            limit *= 1.5 if peaks else 1  # a part of them does not grow, and a point beyond is as good for the line
        else:
            (x, a), (y, b) = sorted(peaks.items(), key=lambda point: abs(point[1] - machine.usable))[:2]
            limit = x + (machine.usable - a) * (y - x) / (b - a) if a != b else 2 * max(x, y)
        if low in peaks and len(peaks) > 1 and limit < low + 1 + low / 16:
            break
        guess = int(limit * (1 - 1 / 24))
        guess = min(max(guess, low + 1, 1), most if high is None else high - 1)
        last, at = make_plan(with_overrides(cfg, {"data.max_length": guess * unit}), machine), guess
        peaks[guess] = last.peak
        if last.peak <= machine.usable:
            low = guess
        else:
            high = guess
        if low == most:
            break
    return low * unit or (cfg.data.max_length if plan.peak <= machine.usable else 0)


def pinned(cfg: Config) -> Config:
    """The configuration with the most recomputation that ``auto`` can choose."""
    return with_overrides(cfg, rungs(cfg.activation_checkpointing)[-1])


def can_adapt(cfg: Config) -> bool:
    """Whether adapters could still take the place of a trained base."""
    return not cfg.lora.r and not cfg.freeze.base and cfg.freeze.towers and find_spec("peft") is not None


def can_quantise(cfg: Config) -> bool:
    """Whether a frozen base, or one under adapters, could be kept in codes."""
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    return cfg.model.quantization == "none" and cfg.freeze.towers and version >= LEAST_TORCH


def savings(cfg: Config, machine: Machine) -> dict[str, int]:
    """Settings that take less memory, those that cost the least time first, and the peak with each alone."""
    smaller_loss, cfg = min(256, memory_budget_mb(cfg.loss, "cuda")), pinned(cfg)
    changes: list[Mapping[str, object]] = [
        {"parallel.reshard_after_forward": True},
        {"loss.memory_budget_mb": smaller_loss},
        {"activation_checkpointing.drafter": "full"},
        {"activation_checkpointing.drafter": "layers"},
        {"activation_checkpointing.base": "selective"},
        {"activation_checkpointing.base": "full"},
        {"activation_checkpointing.base": "full", "activation_checkpointing.offload": True},
        {"data.micro_batch_size": 1, "optim.grad_accum": cfg.optim.grad_accum * cfg.data.micro_batch_size},
        {"parallel.dp_shard": 2 * mesh_sizes(cfg, machine)[1]},
        {"data.max_length": max(256, cfg.data.max_length // 2)},
        {"optim.name": "adamw_bf16"},
        {"optim.name": "adamw_8bit"},
        {"precision.params": "bfloat16"},
        *([{"lora.r": 16}] if can_adapt(cfg) else []),
        *([{"freeze.base": True}] if not cfg.lora.r else []),
        *([{"model.quantization": "nf4"}] if (cfg.lora.r or cfg.freeze.base) and can_quantise(cfg) else []),
        {"parallel.cpu_offload": "optimizer"},
        *([] if cfg.eval.prompts else [{"parallel.cpu_offload": "all"}]),
    ]
    peaks = {}
    for change in changes:
        if any(select(cfg, key) != value for key, value in change.items()):
            name = " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
            peaks[name] = make_plan(with_overrides(cfg, change), machine).peak
    return peaks
