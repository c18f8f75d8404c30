"""A distributed checkpoint as two Hugging Face folders: ``python -m joint_train.export CHECKPOINT OUT --verify``."""

import argparse
import sys
from pathlib import Path

import torch

from joint_train.command import start
from joint_train.config import Config, read
from joint_train.errors import ConfigError
from joint_train.weights.adapter import export_adapter, fill_from_checkpoint
from joint_train.weights.export import export_checkpoint, verify
from joint_train.weights.folders import read_config, resolve
from joint_train.weights.loading import build_meta, stored_tensors


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m joint_train.export",
        description="Write a checkpoint of a run as two Hugging Face folders, OUT/base and OUT/drafter.",
    )
    parser.add_argument("checkpoint", type=Path, help="OUTPUT_DIR/checkpoints/step_NNNNNNNN")
    parser.add_argument("out", type=Path, help="folder to write base/ and drafter/ to")
    parser.add_argument(
        "--verify", action="store_true", help="compare names, shapes and dtypes with the source folders"
    )
    parser.add_argument(
        "--max-shard-size", help="largest safetensors file; the run's model.export.max_shard_size by default"
    )
    parser.add_argument("--base", help="source folder of the base, if the run's model.base isn't there any more")
    parser.add_argument(
        "--drafter", help="source folder of the drafter, if the run's model.drafter isn't there any more"
    )
    parser.add_argument(
        "--kv-shared-weights", action="store_true",
        help="write the unused keys and values of KV-shared layers where the base's folder has none, as the run does "
        "with model.export.kv_shared_weights=true",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return start(
        "joint_train.export",
        lambda: export_run(
            args.checkpoint, args.out, args.verify, args.max_shard_size, args.base, args.drafter, args.kv_shared_weights
        ),
    )


def export_run(
    checkpoint: Path,
    out: Path,
    check: bool = False,
    max_shard_size: str | None = None,
    base: str | None = None,
    drafter: str | None = None,
    kv_shared_weights: bool = False,
) -> int:
    """What the command does. Returns 1 if `check` found a difference, 0 otherwise."""
    cfg = run_config(checkpoint)
    status = 0
    for part, path, revision, tokens in (
        ("base", base or cfg.model.base, cfg.model.revision, None),
        ("drafter", drafter or cfg.model.drafter, cfg.model.drafter_revision, cfg.drafter.num_steps),
    ):
        source = resolve(path, revision, cfg.model.cache_dir)
        overrides = cfg.model.text_config if part == "base" else None
        model = build_meta(read_config(source, text_config=overrides), torch.bfloat16)
        if part == "base" and cfg.lora.r:
            fill_from_checkpoint(model, cfg, checkpoint, source)
            export_adapter(model, out / "adapter")
        size = max_shard_size or cfg.model.export.max_shard_size
        unused = cfg.model.export.kv_shared_weights or kv_shared_weights
        export_checkpoint(
            checkpoint / part / "model", model, source, out / part, size,
            num_assistant_tokens=tokens, kv_shared_weights=unused,
        )  # fmt: skip
        print(f"{out / part}: {len(stored_tensors(out / part))} tensors")
        if check and (problems := verify(out / part, source, unused)):
            status = 1
            print(f"{out / part} differs from {source}:", *problems, sep="\n  ", file=sys.stderr)
        elif check:
            print(f"{out / part}: names, shapes and dtypes as in {source}")
    return status


def run_config(checkpoint: Path) -> Config:
    """The configuration of the run that wrote a checkpoint.

    Raises:
        ConfigError: if the folder isn't a complete checkpoint of a run.
    """
    if not (checkpoint / "COMPLETE").exists():
        raise ConfigError(f"{checkpoint} isn't a complete checkpoint (no COMPLETE in it): give a step_NNNNNNNN folder.")
    file = checkpoint.resolve().parent.parent / "config.yaml"
    if not file.exists():
        raise ConfigError(f"no configuration of the run at {file}: keep the checkpoint in its OUTPUT_DIR/checkpoints.")
    return read(file)


if __name__ == "__main__":
    sys.exit(main())
