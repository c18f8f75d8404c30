"""What can't work is refused here, before a process group is made or a weight is read."""

import dataclasses
import difflib
import math
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any

from joint_train.config.schema import Config
from joint_train.config.typed import select
from joint_train.config.uploads import check_uploads
from joint_train.config.values import (
    adapter_index,
    base_after,
    mesh_shape,
    parse_adapters,
    parse_drafter_loss,
    parse_served,
    parse_steps,
    round_weights,
    run_length,
    teacher_grad,
    unroll_limit,
)
from joint_train.errors import ConfigError
from joint_train.metrics import TARGET_METRICS

CHOICES: dict[str, tuple[str | bool | None, ...]] = {
    "model.quantization": ("none", "as_saved", "nf4", "int8", "fp8"),
    "model.quantization_activations": ("none", "as_saved"),
    "model.attn_implementation": ("auto", "by_layer_type", "sdpa", "flex_attention", "eager"),
    "drafter.pairing": ("serving", "same_token"),
    "drafter.rope_position": ("last_kv", "next_token"),
    "data.overlong": ("truncate", "split", "drop"),
    "data.train_on": ("assistant", "last_assistant", "all"),
    "data.mixture": ("endless", "epoch"),
    "data.on_error": ("raise", "skip"),
    "optim.name": ("adamw", "adamw_8bit", "adamw_bf16", "muon"),
    "optim.clip": ("joint", "separate"),
    "optim.schedule": ("cosine", "linear", "constant", "wsd"),
    "optim.drafter_schedule": (None, "cosine", "linear", "constant", "wsd"),
    "parallel.cpu_offload": ("none", "optimizer", "all"),
    "precision.compute": ("auto", "bfloat16", "float32"),
    "precision.params": ("float32", "bfloat16"),
    "precision.reduce": ("float32", "bfloat16"),
    "activation_checkpointing.base": ("auto", "none", "every_n", "selective", "full"),
    "activation_checkpointing.drafter": ("auto", "none", "full", "layers"),
    "loss.compile": ("auto", True, False),
    "model.export.weights": ("last", "best"),
    "tracking.wandb": ("auto", "online", "offline", "disabled"),
}
AT_LEAST = {
    "drafter.num_steps": 1,
    "drafter.loss_weight": 0,
    "drafter.base_grad_scale": 0,
    "lora.r": 0,
    "lora.dropout": 0,
    "data.max_length": 2,
    "data.micro_batch_size": 1,
    "data.num_workers": 0,
    "data.max_line_bytes": 1,
    "optim.lr": 0,
    "optim.drafter_lr": 0,
    "optim.weight_decay": 0,
    "optim.eps": 0,
    "optim.min_lr_ratio": 0,
    "optim.drafter_min_lr_ratio": 0,
    "optim.decay_share": 0,
    "optim.drafter_ema": 0,
    "optim.grad_accum": 1,
    "optim.warmup_steps": 0,
    "optim.max_grad_norm": 0,
    "optim.drafter_max_grad_norm": 0,
    "parallel.dp_replicate": 1,
    "parallel.timeout_seconds": 1,
    "activation_checkpointing.every_n": 1,
    "loss.memory_budget_mb": 1,
    "loss.centroid_weight": 0,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 0,
    "checkpoint.keep_every": 0,
    "checkpoint.grace_seconds": 1,
    "checkpoint.upload_wait_seconds": 0,
    "eval.every": 0,
    "eval.batches": 1,
    "eval.generate_every": 0,
    "eval.prompts": 0,
    "eval.max_new_tokens": 1,
    "eval.patience": 0,
    "tracking.log_every": 1,
    "tracking.diagnose_every": 0,
    "tracking.max_bad_steps": 1,
    "max_steps": 1,
    "stop_after": 1,
}


def validate(cfg: Config, world_size: int | None = None, node: int | None = None) -> None:
    """Refuse what can't work, before a process group is made or a weight is read.

    Args:
        cfg: the configuration, see :func:`joint_train.config.typed.to_dataclasses`.
        world_size: number of ranks, where it is known; the mesh has to fit it.
        node: ranks on a node; by default what torchrun says.

    Raises:
        ConfigError: naming the key, the reason and what to set instead.
    """
    mesh_shape(cfg.parallel, world_size, node)
    if cfg.model.dtype != "bfloat16":
        raise ConfigError(
            f"model.dtype={cfg.model.dtype}: the drafter is released, loaded and exported in bfloat16 only. Set "
            "model.dtype=bfloat16; the dtype of compute and of the master weights are precision.compute and "
            "precision.params."
        )
    for name, choices in CHOICES.items():
        if (value := select(cfg, name)) not in choices:
            raise ConfigError(f"{name}={value}: choose one of {', '.join(map(str, choices))}.")
    check_finite(dataclasses.asdict(cfg))
    check_places(cfg)
    for name, least in AT_LEAST.items():
        value = select(cfg, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: must be at least {least}.")
    for name in ("optim.min_lr_ratio", "optim.drafter_min_lr_ratio", "optim.decay_share", "drafter.base_grad_scale"):
        if (value := select(cfg, name)) is not None and value > 1:
            raise ConfigError(f"{name}={value}: must be at most 1.")
    if not cfg.optim.drafter_ema < 1:
        raise ConfigError(f"optim.drafter_ema={cfg.optim.drafter_ema}: a decay must be below 1, e.g. 0.98.")
    if cfg.model.export.drafter_last and not cfg.optim.drafter_ema:
        raise ConfigError(
            "model.export.drafter_last=true writes the last weights beside their average, and there is none: set "
            "optim.drafter_ema, e.g. to 0.98, or model.export.drafter_last=false."
        )
    if len(cfg.optim.betas) != 2 or not all(0 <= beta < 1 for beta in cfg.optim.betas):
        raise ConfigError(f"optim.betas={cfg.optim.betas}: give two numbers from 0 to below 1, e.g. [0.9, 0.95].")
    _check_second_moment(cfg)
    if not cfg.loss.temperature > 0:
        raise ConfigError(f"loss.temperature={cfg.loss.temperature}: must be above 0.")
    adapters = parse_adapters(cfg.model.adapter)
    for name in ("model.base", "model.drafter"):
        if not select(cfg, name) and not (name == "model.base" and (adapters or cfg.model.adapters)):  # they name it
            raise ConfigError(
                f"{name} is not set: a folder or a hub id. E.g. model=gemma4_e4b, or "
                "model.base=/models/gemma-4-E4B-it model.drafter=/models/gemma-4-E4B-it-assistant"
            )
    if not cfg.data.train:
        raise ConfigError(
            "data.train is empty: name a source, e.g. 'data.train=[{path: train.jsonl}]' or data=starter."
        )
    if cfg.epochs is not None and not 0 < cfg.epochs < math.inf:
        raise ConfigError(f"epochs={cfg.epochs}: must be above 0.")
    if base_after(cfg.freeze.base_after) is not None and cfg.freeze.base:
        raise ConfigError(
            f"freeze.base_after={cfg.freeze.base_after} freezes the base during the run, and freeze.base=true before "
            "its first step: set only one of them."
        )
    unroll_limit(cfg.data.unroll)
    max_steps, _ = run_length(cfg)
    steps = parse_steps(cfg.profile.steps)
    if steps and max_steps is not None and steps[-1] > max_steps:
        raise ConfigError(f"profile.steps={cfg.profile.steps}: the run ends at max_steps={max_steps}.")
    if cfg.parallel.cpu_offload == "all" and cfg.eval.prompts:
        raise ConfigError(
            "parallel.cpu_offload=all copies every weight to the GPU for each token of an assisted generation: set "
            "eval.prompts=0 (or null), and evaluate the export with joint_train.evaluate."
        )
    if cfg.tracking.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("tracking.tensorboard=true needs the tensorboard package: pip install tensorboard")
    if cfg.optim.name == "muon" and cfg.parallel.cpu_offload != "none":
        raise ConfigError(
            "optim.name=muon multiplies whole matrices in its update, on the GPU: set parallel.cpu_offload=none, or "
            "another optim.name."
        )
    if cfg.optim.name == "adamw_8bit" and PathFinder.find_spec("torchao") is None:
        raise ConfigError(
            "optim.name=adamw_8bit needs the torchao package: pip install 'joint-train[low-precision]'. "
            "optim.name=adamw_bf16 needs none."
        )
    if cfg.model.continue_adapter and not adapters:
        raise ConfigError("model.continue_adapter=true trains an adapter on, and model.adapter names none: set it.")
    rows = cfg.model.resize_vocabulary
    if not isinstance(rows, bool) and not (isinstance(rows, int) and rows > 0):
        raise ConfigError(f"model.resize_vocabulary={rows}: must be true, false or a number of rows.")
    _check_best(cfg)
    _check_lora(cfg)
    _check_served(cfg)
    _check_quantization(cfg)
    check_uploads(cfg)
    try:
        parse_drafter_loss(cfg.loss)
        teacher_grad(cfg.loss)
        round_weights(cfg.loss, cfg.drafter.num_steps)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_finite(value: Any, key: str = "") -> None:
    """Raise a ConfigError for a number anywhere that is infinite or not a number."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            check_finite(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value}: must be a finite number.")


def check_places(cfg: Config) -> None:
    """Raise a ConfigError for folders and files that can't be any."""
    if not cfg.output_dir or "://" in cfg.output_dir:
        raise ConfigError(
            f"output_dir={cfg.output_dir}: must be a folder of this machine's or the cluster's file system; "
            "checkpoint.mirror=s3://… copies checkpoints to object storage."
        )
    for split, sources in (("train", cfg.data.train), ("val", cfg.data.val)):
        for index, source in enumerate(sources):
            if not source.path or "://" in source.path:
                raise ConfigError(
                    f"data.{split}[{index}].path={source.path}: must be a file, a folder, or the id of a dataset on "
                    "the hub (such as allenai/tulu-3-sft-mixture). Download what is elsewhere first."
                )
            if source.limit is not None and source.limit < 1:
                raise ConfigError(f"data.{split}[{index}].limit={source.limit}: must be at least 1.")


def _check_second_moment(cfg: Config) -> None:
    """bfloat16 has 8 significant bits: a second moment times 0.999 rounds back to itself, and never falls."""
    name, beta, most = cfg.optim.name, cfg.optim.betas[1], 0.99
    compact = name == "adamw_bf16" or (cfg.precision.params == "bfloat16" and name != "adamw_8bit")
    if compact and beta > most:
        why = f"optim.name={name}" if name == "adamw_bf16" else f"precision.params=bfloat16 with optim.name={name}"
        others = "optim.name=adamw_8bit or adamw" if name == "adamw_bf16" else "precision.params=float32"
        raise ConfigError(
            f"optim.betas={list(cfg.optim.betas)}: {why} keeps the second moment in bfloat16, where times {beta:g} "
            "rounds back to what it was, so that it never falls again. Set "
            f"optim.betas=[{cfg.optim.betas[0]:g}, 0.95] (at most {most:g}), or {others}."
        )


def validation_metrics(cfg: Config) -> list[str]:
    """Names of the metrics of a run's validations, without those of single sources and adapters."""
    rounds = range(cfg.drafter.num_steps)
    plain = [name for name in TARGET_METRICS if "{source}" not in name and "{adapter}" not in name]
    names = [name for name in plain if "{metric}" not in name]
    names += [f"dense_{name}" for name in names if name.startswith(("agreement", "acceptance", "accepted"))]
    each = [name.format(k=k) for name in names for k in (rounds if "{k}" in name else [0])]
    return [f"val/{name}" for name in dict.fromkeys(each)] + ["val/tokens_per_forward"]


def _check_best(cfg: Config) -> None:
    """``checkpoint.keep_best`` is a metric that the run will have, and what needs it has it."""
    best = cfg.checkpoint.keep_best
    for key, wanted in (("eval.patience", cfg.eval.patience), ("model.export.weights", cfg.model.export.weights)):
        if wanted not in (0, "last") and best is None:
            raise ConfigError(
                f"{key}={wanted} needs to know what is better: set checkpoint.keep_best, e.g. to val/base_loss or "
                "-val/accepted_length_expected (with the minus the highest value is the best)."
            )
    if best is None:
        return
    name, known = best.removeprefix("-"), validation_metrics(cfg)
    of_source = name.startswith("val/") and name.count("/") > 1
    if name not in known and not of_source:
        meant = difflib.get_close_matches(name if name.startswith("val/") else f"val/{name}", known, 1)
        hint = f" Did you mean {'-' * best.startswith('-')}{meant[0]}?" if meant else ""
        raise ConfigError(
            f"checkpoint.keep_best={best}: a run's validations don't measure that.{hint} Known are {known[0]}, "
            f"{known[-1]} and the others of docs/metrics.md, each with val/ in front."
        )
    if not cfg.data.val:
        raise ConfigError(
            f"checkpoint.keep_best={best} is measured on validation data, and data.val is empty: set data.val, or "
            "checkpoint.keep_best=null."
        )


def _check_lora(cfg: Config) -> None:
    """Adapters need their package, and a base that isn't trained in another way."""
    lora = cfg.lora
    if lora.r == 0 and not cfg.model.continue_adapter:
        return
    key, off = f"lora.r={lora.r}", "lora.r=0"
    if cfg.model.continue_adapter:
        key, off = "model.continue_adapter=true", "model.continue_adapter=false"
    if find_spec("peft") is None:
        raise ConfigError(f"{key} needs the peft package: pip install 'joint-train[lora]'")
    if cfg.freeze.base:
        raise ConfigError(
            f"{key} trains adapters on the base, and freeze.base=true trains nothing of it: set "
            f"freeze.base=false (its weights are frozen under adapters anyway), or {off}."
        )
    if not cfg.freeze.towers:
        raise ConfigError(
            f"{key} freezes the base, its towers included, and freeze.towers=false would train them: set "
            f"freeze.towers=true, or {off}."
        )
    if not lora.alpha > 0:
        raise ConfigError(f"lora.alpha={lora.alpha}: must be above 0.")
    if not lora.dropout < 1:
        raise ConfigError(f"lora.dropout={lora.dropout}: must be below 1.")
    if not lora.target_modules:
        raise ConfigError("lora.target_modules is empty: name linear layers of the decoder, e.g. [q_proj, v_proj].")


def _check_served(cfg: Config) -> None:
    """Adapters of ``model.adapters`` lie on a base that stays as it is, and each has data."""
    specs, used = parse_served(cfg.model.adapters), set[int]()
    for split, sources in (("train", cfg.data.train), ("val", cfg.data.val)):
        for index, source in enumerate(sources):
            try:
                found = adapter_index(specs, source.adapter)
            except ValueError as error:
                raise ConfigError(
                    f"data.{split}[{index}].adapter: {error}. Name one of them, or add it there."
                ) from None
            used |= {found} if split == "train" else set()
    if not specs:
        return
    if unused := [spec.name for index, spec in enumerate(specs) if index not in used]:
        raise ConfigError(
            f"model.adapters: no source of data.train names {', '.join(unused)}, so the drafter would learn "
            f"nothing about it. Give a source adapter: {unused[0]}, or leave it out of model.adapters."
        )
    if cfg.model.adapter is not None:
        raise ConfigError(
            "model.adapter is merged into the base, and model.adapters are put on it one at a time: set one of them."
        )
    if cfg.lora.r:
        raise ConfigError(
            f"lora.r={cfg.lora.r} trains new adapters on the base, and with model.adapters the base is served under "
            "each of those: set lora.r=0."
        )
    if not cfg.freeze.base:
        raise ConfigError(
            "model.adapters trains one drafter for a base that stays as it is under each of them: set freeze.base=true."
        )
    if cfg.parallel.compile:
        raise ConfigError("parallel.compile=true doesn't work with model.adapters: set parallel.compile=false.")


def _check_quantization(cfg: Config) -> None:
    """Quantised weights can't be trained: the base is frozen or has adapters, and nothing else of it changes."""
    m, key = cfg.model, f"model.quantization={cfg.model.quantization}"
    if m.quantization_activations != "none" and m.quantization != "as_saved":
        raise ConfigError(
            f"model.quantization_activations={m.quantization_activations} takes its rounding from a "
            "quantised folder: set model.quantization=as_saved and give such a folder, or leave it out."
        )
    if m.quantization == "none":
        return
    if not (cfg.freeze.base or cfg.lora.r or m.continue_adapter):
        raise ConfigError(
            f"{key}: quantised weights can't be trained. Set freeze.base=true to train the drafter alone, or lora.r "
            "(e.g. 16) for adapters on the base."
        )
    if not cfg.freeze.towers:
        raise ConfigError(f"{key}: freeze.towers=false would train the base's towers: set freeze.towers=true.")
    if m.quantization != "as_saved":
        return
    if m.adapter and not (m.continue_adapter and len(parse_adapters(m.adapter)) == 1):
        raise ConfigError(
            f"{key}: model.adapter would be merged into a base that isn't exported, since it stays as it is saved. Set "
            "model.adapters for a drafter of the base under adapters, model.continue_adapter=true to train one on, or "
            "give the bfloat16 base."
        )
    if m.resize_vocabulary is not False:
        raise ConfigError(f"{key}: the tables of a base that stays as it is saved can't grow: leave out "
                          "model.resize_vocabulary, or give the bfloat16 base.")  # fmt: skip
    if m.export.kv_shared_weights:
        raise ConfigError(f"{key}: no base is exported, so model.export.kv_shared_weights=true would do nothing: leave "
                          "it out.")  # fmt: skip
