"""What a run logs at its start: advice on its settings, from its plan, and what it resumes from."""

import logging
import math
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

from joint_train.config import CheckpointConfig, Config, ConfigError, EvalConfig, ParallelConfig
from joint_train.config.typed import read
from joint_train.config.values import run_length
from joint_train.plan.fits import savings
from joint_train.plan.planner import GIB, Machine, Plan
from joint_train.train.best import Best
from joint_train.train.optim import lr_factor

log = logging.getLogger(__name__)

PROMPTS = 8  # validation prompts in an assisted generation
MOST_PADDING = 0.1  # of the sharded weights
MOST_CHANGES = 4  # that are named after an out-of-memory


def warn(cfg: Config, plan: Plan, machine: Machine, device_type: str, steps: tuple[int, int]) -> None:
    """Warn of what can't be meant.

    Args:
        steps: the run's last step, and that after which the base is frozen.
    """
    max_steps, joint_steps = steps
    warn_of_grace(cfg.checkpoint, plan, machine, device_type)
    warn_of_padding(plan)
    warn_of_torchrun(cfg.checkpoint)
    warn_of_warmup(cfg, joint_steps)
    warn_of_base_after(cfg, max_steps)
    warn_of_validation(cfg)


def generation_prompts(
    cfg: EvalConfig, parallel: ParallelConfig, plan: Plan, machine: Machine, device_type: str
) -> int:
    """``eval.prompts``; where it is null 8, or none if generating would take longer than validating."""
    if cfg.prompts is not None:
        return cfg.prompts
    if parallel.cpu_offload == "all":
        log.info(
            "no assisted generation in this run's validations: parallel.cpu_offload=all would copy every weight "
            "to the GPU for each token"
        )
        return 0
    generation = plan.generation_seconds(machine, -(-PROMPTS // plan.ranks) * cfg.max_new_tokens)
    validation = plan.validation_seconds(machine, cfg.batches)
    if device_type == "cpu" or generation <= validation:  # the plan knows no CPU's speed
        return PROMPTS
    log.info(
        "no assisted generation in this run's validations: the plan says %.0f s for %d prompts, against %.0f s for the "
        "validation. eval.prompts=%d turns it on",
        generation, PROMPTS, validation, PROMPTS,
    )  # fmt: skip
    return 0


def warn_of_grace(cfg: CheckpointConfig, plan: Plan, machine: Machine, device_type: str) -> None:
    """Warn at the start if a save won't fit into the time that a signal leaves."""
    seconds = plan.checkpoint / machine.disk_gb_per_second / 1e9
    if device_type != "cpu" and seconds > cfg.grace_seconds:
        log.warning(
            "checkpoint.grace_seconds=%d is too short: a checkpoint of %.0f GB takes %.0f s at %g GB/s, and one that "
            "isn't done in time is lost. Set checkpoint.grace_seconds=%d, and the launcher's limits above it",
            cfg.grace_seconds, plan.checkpoint / 1e9, seconds, machine.disk_gb_per_second, 1.5 * seconds,
        )  # fmt: skip


def warn_of_torchrun(cfg: CheckpointConfig) -> None:
    """Warn where torchrun kills a run before ``checkpoint.grace_seconds`` are over: before torch 2.13."""
    if dist.is_torchelastic_launched() and torch.__version__ < TorchVersion("2.13") and cfg.grace_seconds > 30:
        log.warning(
            "torchrun of torch %s kills a run 30 s after a signal: a save on preemption has that long, and not "
            "checkpoint.grace_seconds=%d. torch 2.13 can wait for it.",
            torch.__version__, cfg.grace_seconds,
        )  # fmt: skip


def warn_of_padding(plan: Plan) -> None:
    """Warn that the weights don't divide evenly over the shards."""
    if plan.padding > MOST_PADDING:
        log.warning(
            "over %d shards the weights take %.0f %% more memory and communication than they have values, because none "
            "of a weight's dimensions divides evenly. Shard over fewer ranks: parallel.dp_shard=64, "
            "parallel.dp_replicate=%d",
            plan.mesh[1], 100 * plan.padding, max(1, plan.ranks // 64),
        )  # fmt: skip


def say_run(cfg: Config, ranks: int, gpu: str | None) -> None:
    """Log what is run, and on what: GPUs of a kind, or the CPU."""
    where = f"{ranks} x {gpu}" if gpu else f"{ranks} CPU ranks" if ranks > 1 else "the CPU"
    what = f"{cfg.model.base} and its drafter {cfg.model.drafter}"
    if cfg.freeze.base:
        what = f"the drafter {cfg.model.drafter} for {cfg.model.base}, which stays as it is"
    elif cfg.model.continue_adapter:
        what = f"an adapter on {cfg.model.base}, and its drafter {cfg.model.drafter}"
    elif cfg.lora.r:
        what = f"adapters of rank {cfg.lora.r} on {cfg.model.base}, and its drafter {cfg.model.drafter}"
    log.info(
        "%s, joint-train %s: training %s, on %s; everything is written to %s",
        time.strftime("%Y-%m-%d %H:%M:%S"), version("joint-train"), what, where, Path(cfg.output_dir).absolute(),
    )  # fmt: skip


def warn_of_memory(plan: Plan, machine: Machine) -> None:
    """Warn, before weights are loaded, that the plan is above what a rank has."""
    if plan.peak > machine.usable:
        log.warning(
            "the planned peak of %.2f GiB is above the %.2f GiB that a rank can use, of %.2f: the run will probably "
            "run out of memory. python -m joint_train.plan says what would fit",
            plan.peak / GIB, machine.usable / GIB, machine.gpu_memory_gb,
        )  # fmt: skip


def say_plan(plan: Plan, peak: int, machine: Machine, device_type: str, steps: float) -> None:
    """Log what the plan says of the steps to come.

    Args:
        peak: of all of them, in bytes.
        steps: as many joint steps as all of them take the time of.
    """
    chosen = " ".join(f"{key}={value}" for key, value in plan.chosen.items())
    seconds = plan.seconds(machine)
    time_of = f", {seconds:.2f} s a step, {steps * seconds / 3600:.1f} h in all" if device_type == "cuda" else ""
    log.info(
        "plan: a peak of %.2f GiB of the %.2f that a rank can use%s%s (python -m joint_train.plan shows its parts)",
        peak / GIB, machine.usable / GIB, time_of, f"; {chosen}, chosen by it" if chosen else "",
    )  # fmt: skip


def say_patience(best: Best, step: int, max_steps: int) -> None:
    """Log that a run ends before its last step."""
    log.info(
        "the run ends at step %d of %d: %d validations in a row were no better than step %s (%s %.4g; "
        "eval.patience=%d)",
        step, max_steps, best.waited, best.step, str(best.metric).removeprefix("-"),
        math.nan if best.value is None else best.value, best.patience,
    )  # fmt: skip


def warn_of_validation(cfg: Config) -> None:
    """Warn that nothing can be validated."""
    if not cfg.data.val:
        log.warning(
            "data.val is empty, so that nothing is validated: eval.every=%d has no effect, and the run can't say what "
            "it gained. Give validation data, e.g. data.val=val.jsonl",
            cfg.eval.every,
        )


def out_of_memory(cfg: Config, plan: Plan, machine: Machine, error: Exception) -> str:
    """What to change after an out-of-memory: the settings that take less, those that cost the least time first."""
    peaks = savings(cfg, machine)
    least = [f"{change} (planned: {peak / GIB:.1f} GiB)" for change, peak in peaks.items() if peak < 0.97 * plan.peak]
    reason = str(error).strip().splitlines()[0]
    return (
        f"out of memory: {reason} The plan was a peak of {plan.peak / GIB:.1f} GiB of the {machine.usable / GIB:.1f} "
        "that a rank can use. What takes less, the cheapest first: "
        f"{'; '.join(least[:MOST_CHANGES]) or 'nothing that is known here; use more GPUs or a smaller pair'}. "
        "python -m joint_train.plan --suggest combines them; a resume goes on from the last checkpoint"
    )


def warn_of_warmup(cfg: Config, max_steps: int) -> None:
    """Warn that the learning rate never reaches its peak.

    Args:
        max_steps: the run's steps; those of the base where ``freeze.base_after`` is set.
    """
    if cfg.optim.warmup_steps >= max_steps:
        share = lr_factor(max_steps - 1, cfg.optim, max_steps)
        whose = "run" if cfg.freeze.base_after is None else "base's training"
        log.warning(
            "optim.warmup_steps=%d isn't over when the %s ends, after step %d: the learning rate reaches %.0f %% of "
            "its peak. Set optim.warmup_steps below that",
            cfg.optim.warmup_steps, whose, max_steps, 100 * share,
        )  # fmt: skip


def warn_of_base_after(cfg: Config, max_steps: int) -> None:
    """Warn that the base is trained to the end."""
    after = cfg.freeze.base_after
    if isinstance(after, int) and after >= max_steps:
        log.warning(
            "freeze.base_after=%d is not below the run's %d steps: the base is trained in all of them", after, max_steps
        )


def say_frozen(cfg: Config, plan: Plan, step: int, steps: tuple[int, int]) -> None:
    """Log that the base is frozen from here on.

    Args:
        plan: of the steps that follow.
        step: done; later than that of the freeze in a run that was resumed after it.
        steps: the run's last step, and that after which the base is frozen.
    """
    max_steps, joint_steps = steps
    log.info(
        "the base is frozen after step %d (freeze.base_after=%s): steps %d to %d train the drafter alone, with a "
        "planned peak of %.2f GiB",
        joint_steps, cfg.freeze.base_after, step + 1, max_steps, plan.peak / 2**30,
    )  # fmt: skip


def say_resumed(
    cfg: Config, checkpoint: Path, step: int, steps: tuple[int, int], before: tuple[int | None, int | None]
) -> None:
    """Log where a run resumes, and what a changed configuration does to the learning rates of its next step.

    Args:
        steps: the run's last step, and that after which the base is frozen.
        before: the same when the checkpoint was written; None where that isn't known.
    """
    max_steps, joint_steps = steps
    log.info("resumed from step %d of %d (%s)", step, max_steps, checkpoint)
    last = min(max_steps, cfg.stop_after or max_steps)
    if step >= last:
        of = "last step" if last == max_steps else "step of stop_after"
        log.warning("%s is already at or past the %s, %d: there is nothing left to train", checkpoint.name, of, last)
        return
    try:
        old = read(checkpoint / "config.json")
    except (OSError, ConfigError):  # of another version: it can't be known
        return
    max_before = before[0] or run_length(old)[0]
    if max_before is None:
        return
    joint_before = before[1] or max_before
    if joint_before < step < joint_steps:
        log.warning(
            "the base was frozen after step %d, and is trained again from step %d to %d, with new optimizer state",
            joint_before, step + 1, joint_steps,
        )  # fmt: skip
    for part, key, length_before, length in (
        ("base", "lr", joint_before, joint_steps),
        ("drafter", "drafter_lr", max_before, max_steps),
    ):
        if part == "base" and not step < min(joint_before, joint_steps):
            continue  # frozen now, or then
        was = getattr(old.optim, key) * lr_factor(step, old.optim, length_before, part)
        now = getattr(cfg.optim, key) * lr_factor(step, cfg.optim, length, part)
        if abs(now - was) > 1e-6 * max(now, was):
            change = f" ({100 * (now / was - 1):+.0f} %)" if was > 0 else ""
            log.warning(
                "the learning rate of the %s at step %d is %.3g%s; with the configuration of the checkpoint it would "
                "be %.3g",
                part, step + 1, now, change, was,
            )  # fmt: skip
