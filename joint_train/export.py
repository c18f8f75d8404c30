"""A distributed checkpoint as two Hugging Face folders: ``python -m joint_train.export CHECKPOINT OUT --verify``."""

import argparse
import os
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

from joint_train.checkpoint.layout import AVERAGE, Manifest, check_files, damage_error
from joint_train.checkpoint.layout import MANIFEST as COMPLETE
from joint_train.checkpoint.layout import verify as verify_sizes
from joint_train.command import start
from joint_train.config import Config, read
from joint_train.errors import ConfigError
from joint_train.weights.adapter import export_adapter, fill_from_checkpoint
from joint_train.weights.export import compare_checkpoint, export_checkpoint, verify
from joint_train.weights.folders import read_config, resolve
from joint_train.weights.loading import build_meta, stored_tensors
from joint_train.weights.placing import MANIFEST, PARTS, discard, place
from joint_train.weights.placing import verify as verify_files


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 1 if ``--verify`` finds a difference; 2 for an error, a damaged checkpoint among them."""
    parser = argparse.ArgumentParser(
        prog="python -m joint_train.export",
        description="Write a checkpoint of a run as two Hugging Face folders, OUT/base and OUT/drafter.",
    )
    parser.add_argument("checkpoint", type=Path, help="OUTPUT_DIR/checkpoints/step_NNNNNNNN; with --verify and without "
                        "OUT, an export")  # fmt: skip
    parser.add_argument("out", type=Path, nargs="?", help="folder to write base/ and drafter/ to")
    parser.add_argument(
        "--verify", action="store_true",
        help="compare names, shapes and dtypes with the source folders, values with the checkpoint, and what is on "
        "disk with the export's checksums; of an export alone, only the last",
    )  # fmt: skip
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
    if args.out is None and not args.verify:
        parser.error("give the folder to write to, OUT; or --verify, to compare an export with its checksums")
    return start("joint_train.export", lambda: verify_export(args.checkpoint) if args.out is None else export_run(
        args.checkpoint, args.out, args.verify, args.max_shard_size, args.base, args.drafter, args.kv_shared_weights
    ))  # fmt: skip


def export_run(
    checkpoint: Path,
    out: Path,
    check: bool = False,
    max_shard_size: str | None = None,
    base: str | None = None,
    drafter: str | None = None,
    kv_shared_weights: bool = False,
) -> int:
    """What the command does. Returns 1 if `check` found a difference, 0 otherwise.

    Raises:
        DamagedCheckpoint: before anything is written.
    """
    manifest = verify_checkpoint(checkpoint)
    cfg = run_config(checkpoint)
    unused = cfg.model.export.kv_shared_weights or kv_shared_weights
    parts: dict[str, tuple[PreTrainedModel, Path]] = {}
    outs: list[Path] = []
    try:
        of_base = base or cfg.model.base, cfg.model.revision, None
        of_drafter = drafter or cfg.model.drafter, cfg.model.drafter_revision, cfg.drafter.num_steps
        weights = {"base": "base/model", "drafter": "drafter/model"}
        if (checkpoint / AVERAGE).is_dir():
            weights |= {"drafter": AVERAGE} | (
                {"drafter_last": "drafter/model"} if cfg.model.export.drafter_last else {}
            )
        for part in weights:
            path, revision, tokens = of_base if part == "base" else of_drafter
            source = resolve(path, revision, cfg.model.cache_dir)
            overrides = cfg.model.text_config if part == "base" else None
            model = build_meta(read_config(source, text_config=overrides), torch.bfloat16)
            outs.append(out / part)
            if part == "base" and cfg.lora.r:
                fill_from_checkpoint(model, cfg, checkpoint, source)
                outs.append(out / "adapter")
                export_adapter(model, out / "adapter", in_place=False)
            export_checkpoint(
                checkpoint / weights[part], model, source, out / part,
                max_shard_size or cfg.model.export.max_shard_size, num_assistant_tokens=tokens,
                kv_shared_weights=unused, in_place=False,
            )  # fmt: skip
            parts[part] = model, source
        place(outs)
    except BaseException:
        discard(outs)
        raise
    problems = 0
    for part, (model, source) in parts.items():
        print(f"{out / part}: {len(stored_tensors(out / part))} tensors")
        if check:
            found = verify(out / part, source, unused)
            found += compare_checkpoint(checkpoint / weights[part], model, source, out / part)
            problems += print_problems(f"{out / part} differs from {source} and {checkpoint}", found)
            if not found:
                print(f"{out / part}: names, shapes and dtypes as in {source}, values as in step {manifest.step}")
    return (verify_export(out) if check else 0) or int(problems > 0)


def verify_export(folder: Path) -> int:
    """Compare the folders of an export, or one of them, with their checksums. Returns 1 for a difference.

    Raises:
        WeightsError: if there is no whole export, or none with checksums.
    """
    parts = [folder / part for part in PARTS if (folder / part / MANIFEST).exists()]
    problems = 0
    for part in parts or [folder]:
        found = verify_files(part)
        problems += print_problems(f"{part} isn't what the export wrote", found)
        if not found:
            print(f"{part}: every file as the export wrote it")
    return int(problems > 0)


def print_problems(what: str, problems: list[str]) -> int:
    """Print problems; returns how many there are."""
    if problems:
        print(f"{what}:", *problems, sep="\n  ", file=sys.stderr)
    return len(problems)


def verify_checkpoint(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint whose weights and configuration have every byte that was written.

    Raises:
        ConfigError: if the folder isn't a checkpoint.
        CheckpointError: if it is incomplete or damaged, naming every wrong file.
    """
    if not os.path.lexists(checkpoint / COMPLETE):
        raise ConfigError(f"{checkpoint} isn't a complete checkpoint (no COMPLETE in it): give a step_NNNNNNNN folder.")
    manifest = verify_sizes(checkpoint, contents=False)
    names = [name for name in manifest.files if name.startswith(("base/", "drafter/")) or name == "config.json"]
    if problems := check_files(checkpoint, manifest, names):
        raise damage_error(checkpoint, problems)
    return manifest


def run_config(checkpoint: Path) -> Config:
    """The configuration of the run that wrote a checkpoint: its config.yaml, else what the checkpoint has of it.

    Raises:
        ConfigError: if there is none, or none that can be read.
    """
    file = checkpoint.resolve().parent.parent / "config.yaml"
    if not file.exists():
        file = checkpoint / "config.json"
    if not file.exists():
        raise ConfigError(
            f"no configuration of the run at {checkpoint.resolve().parent.parent / 'config.yaml'}, and no config.json "
            f"in {checkpoint}."
        )
    return read(file)


if __name__ == "__main__":
    sys.exit(main())
