"""The drafter for a fine-tune that you have: ``python -m joint_train.retune BASE [ADAPTER] --data FILE``.

    BASE     the tuned base; or the base that ADAPTER is for; or a PEFT folder, which names its base
    OUT/data/         the examples, those that are held out, and with --regenerate the tuned base's own answers
    OUT/              a run: config.yaml, metrics.jsonl, checkpoints/, export/base and export/drafter
    OUT/evaluation/   what the evaluation of the old against the new drafter wrote
    OUT/retune.json   the table, and as a page OUT/retune.html; it is in the new drafter's model card, too

The same command goes on where it was interrupted. Overrides of the main job may follow, e.g. ``data.max_length=4096``.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from joint_train.command import DONE, NO, Parser, positive, start
from joint_train.config import Config, SourceConfig, read
from joint_train.config.values import as_saved, is_override, quoted
from joint_train.data.readers import read_records
from joint_train.errors import ConfigError, JointTrainError
from joint_train.evaluate.page import Section, Table, format_interval, html
from joint_train.files import replace

STALE, TUNED = "stale", "tuned"
WHAT = {STALE: "the drafter as it was", TUNED: "the drafter retuned"}


class CommandFailed(JointTrainError):
    """A command that this one started has failed, and said why."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(
        prog="python -m joint_train.retune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("base", metavar="BASE", help="folder or hub id of the base, or a PEFT folder that names it")
    top.add_argument("adapter", metavar="ADAPTER", nargs="?", help="PEFT LoRA folder or hub id, merged into the base")
    top.add_argument("--data", required=True, nargs="+", metavar="FILE", help="prompts, in any format of training data")
    top.add_argument("--drafter", help="the drafter to begin with (default: the one released with the base)")
    top.add_argument("--out", type=Path, default=Path("retuned"), help="folder to write (default: retuned)")
    top.add_argument(
        "--regenerate", action="store_true", help="let the tuned base answer the prompts first, and train on that"
    )
    top.add_argument(
        "--held-out", type=positive, default=64, help="examples for validation and evaluation (default 64)"
    )
    top.add_argument(
        "--max-new-tokens", type=positive, default=512, help="of an answer with --regenerate (default 512)"
    )
    top.add_argument("--nproc-per-node", type=positive, help="ranks (default: the GPUs, or 1)")
    top.add_argument(
        "--eval-tokens", type=positive, default=128, help="tokens for a prompt in the evaluation (default 128)"
    )
    return top


def split_command_line(
    top: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """What the options say, and the overrides of the main job, which may stand anywhere among them."""
    args, overrides = top.parse_known_args(argv)
    # argparse takes those behind BASE and --data for a folder and files
    if is_override(getattr(args, "adapter", None) or ""):
        overrides, args.adapter = [args.adapter, *overrides], None
    overrides = [*filter(is_override, args.data), *overrides]
    args.data = [word for word in args.data if not is_override(word)]
    if unknown := [word for word in overrides if word.startswith("--") or "=" not in word]:
        top.error(f"{unknown[0]} is neither an option nor an override KEY=VALUE")
    if not args.data:
        top.error(f"--data names no file before {overrides[0]}")
    return args, overrides


def main(argv: list[str] | None = None) -> int:
    """Exit codes are those of :data:`joint_train.command.EXIT_CODES`."""
    args, overrides = split_command_line(parser(), argv)
    return start("joint_train.retune", lambda: retune(args, overrides))


def retune(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """All of it. Returns 1 if speculative decoding gave another text by more than rounding."""
    out = args.out.absolute()
    pair = pair_overrides(args)
    train, held_out = split(args.data, args.held_out, out / "data")
    ranks = launcher(args.nproc_per_node)
    if args.regenerate:
        answers = []
        for file in (train, held_out):
            answers.append(file.with_name(f"{file.stem}.answers.jsonl"))
            run(
                [*ranks, "joint_train.data", "regenerate", str(answers[-1]), "--max-new-tokens",
                 str(args.max_new_tokens), *pair, *sources("train", file), *overrides]
            )  # fmt: skip
        distilled = ["data.train_on=last_assistant", *sources("train", answers[0]), *sources("val", answers[1])]
    else:
        distilled = [*sources("train", train), *sources("val", held_out)]
    here = f"output_dir={quoted(out)}"
    run([*ranks, "joint_train", "+experiment=retune_drafter", *pair, *distilled, here, *overrides])
    cfg = read(out / "config.yaml")
    tuned = out / "export"
    if not (tuned / "drafter/config.json").is_file():
        raise ConfigError(f"{tuned} has no export: the run was stopped, or model.export.at_end=false. Run it again.")
    fits = type(cfg.model.resize_vocabulary) is not int  # else the old one has fewer rows than the base
    base, before = cfg.model.base if as_saved(cfg) else tuned / "base", cfg.model.drafter if fits else None
    differs = evaluate(base, tuned / "drafter", before, cfg, held_out, args.eval_tokens, out / "evaluation")
    write_results(out, cfg, json.loads((out / "evaluation/evaluation.json").read_text()))
    return NO if differs else DONE


def pair_overrides(args: argparse.Namespace) -> list[str]:
    """``model.base``, ``.adapter`` and ``.drafter`` of what is on the command line.

    Raises:
        ConfigError: if there is no drafter to begin with.
    """
    # torch and transformers take seconds to import
    from joint_train.weights.folders import resolve
    from joint_train.weights.peft_folder import is_adapter, read_adapter
    from joint_train.weights.released import CONFIGS

    base, adapter = args.base, args.adapter
    if is_adapter(Path(base)):
        if adapter is not None:
            raise ConfigError(f"{base} is an adapter itself: give the base that it is for, and then one adapter.")
        base, adapter = None, base
    if adapter is not None:
        named = read_adapter(resolve(adapter)).base
        base = base or named
        if base is None:
            raise ConfigError(f"{adapter} doesn't say which base it is for: give BASE ADAPTER.")
    drafter = args.drafter
    if drafter is None:
        drafter = next((name for name in CONFIGS if name.lower() == f"{base}-assistant".lower()), None)
    if drafter is None:
        raise ConfigError(
            f"--drafter is not set, and {base} isn't a released base: name the drafter that was released with the base "
            "that yours was made from, or make one (python -m joint_train.drafter new)."
        )
    found = {"model.base": base, "model.drafter": drafter, "model.adapter": adapter}
    return [f"{key}={quoted(value)}" for key, value in found.items() if value is not None]


def sources(key: str, file: Path) -> list[str]:
    """A file as the only source of a split."""
    return [f"data.{key}=[{{path: {quoted(file)}}}]"]


def split(files: Sequence[str], held_out: int, folder: Path) -> tuple[Path, Path]:
    """The examples as two JSONL files: to train on, and held out. Which ones are held out depends on their text alone.

    Raises:
        DataError: for a bad example, naming its file and line.
        ConfigError: if there are too few, or one that JSON can't hold.
    """
    rows = read_rows(files)
    if len(rows) < 2 * held_out or held_out < 1:
        raise ConfigError(f"--held-out={held_out} of {len(rows)} different examples: hold out at most half of them.")
    out = set(sorted(rows)[:held_out])
    folder.mkdir(parents=True, exist_ok=True)
    parts = folder / "train.jsonl", folder / "held_out.jsonl"
    for part, wanted in zip(parts, (False, True), strict=True):
        text = "".join(f"{row}\n" for key, row in rows.items() if (key in out) == wanted)
        if part.exists() and part.read_text(encoding="utf-8") != text:
            raise ConfigError(f"{part} was made from other data, or with another --held-out: give another --out.")
        replace(part, text)
    return parts


def read_rows(files: Sequence[str]) -> dict[str, str]:
    """The different examples of some files as lines of JSON, by a digest of each.

    Raises:
        DataError: for a bad example, naming its file and line.
        ConfigError: for one that JSON can't hold.
    """
    from joint_train.data.sources import parse

    rows: dict[str, str] = {}
    for file in files:
        source = SourceConfig(path=file)
        for record in read_records(source, 1 << 24):
            parse(record, source)
            fields = json.loads(record.data) if isinstance(record.data, bytes) else record.data
            try:
                text = json.dumps(fields, ensure_ascii=False)
            except (TypeError, ValueError):
                raise ConfigError(
                    f"{record.file}:{record.line}: this row can't be written as JSON (pictures?): run the main job "
                    "with +experiment=retune_drafter, and data.train and data.val of your own."
                ) from None
            rows.setdefault(hashlib.sha256(text.encode()).hexdigest(), text)
    return rows


def launcher(ranks: int | None) -> list[str]:
    """How a command is started on so many ranks of this machine."""
    if ranks is None:
        import torch

        ranks = torch.cuda.device_count() or 1
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *torchrun, "-m"]


def run(command: Sequence[str], may_say_no: bool = False) -> int:
    """Start a command, and wait for it.

    Raises:
        CommandFailed: with its exit code, unless that is 1 and may be its answer.
    """
    print("$ python " + " ".join(command[1:]), file=sys.stderr, flush=True)
    code = subprocess.run(command).returncode
    if code and not (code == NO and may_say_no):
        name = next(word for word in command if word.startswith("joint_train"))
        raise CommandFailed(f"{name} ended with {code}; what it printed says why. The same command goes on from there.")
    return code


def evaluate(
    base: Path | str, drafter: Path, before: str | None, cfg: Config, prompts: Path, tokens: int, out: Path
) -> int:
    """Measure a drafter on the tuned base, against the one before it; 1 if a text differs by more than rounding."""
    command = [
        sys.executable, "-m", "joint_train.evaluate", str(base), str(drafter), "--prompts", str(prompts), "--num-steps",
        str(cfg.drafter.num_steps), "--max-new-tokens", str(tokens), "--thresholds", "0", "--out", str(out),
    ]  # fmt: skip
    if before is not None:
        command += ["--against", before, "--write-card"]
    if cfg.data.chat_template_kwargs:
        command += ["--chat-template-kwargs", json.dumps(cfg.data.chat_template_kwargs)]
    return run(command, may_say_no=True)


def write_results(out: Path, cfg: Config, found: dict[str, Any]) -> None:
    """The table: printed, as JSON and as a page."""
    from joint_train.evaluate.against import cells  # with torch, which the help does without

    rows, note = {TUNED: found["speculative"][-1]}, ""
    if "against" in found:
        rows = {STALE: found["against"]["speculative"][-1], **rows}
        compared = found["against"]["rows"][-1]
        heads, table = ["", WHAT[STALE], WHAT[TUNED], "difference"], cells(compared)
    else:
        heads, one = ["", WHAT[TUNED]], rows[TUNED]
        values = one["tokens_per_forward"], one["acceptance"][0]["share"], one["speedup"]
        names = "tokens per base forward", "first draft accepted", "speed-up over plain decoding"
        table = [[name, format_interval(value)] for name, value in zip(names, values, strict=True)]
        note = " The drafter as it was doesn't fit the grown vocabulary."
    what = f"{cfg.model.base}" + (f" with {cfg.model.adapter}" if cfg.model.adapter else "")
    facts = {"base": cfg.model.base, "adapter": cfg.model.adapter, "drafter": cfg.model.drafter, "results": rows}
    replace(out / "retune.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    note = (
        f"K = {cfg.drafter.num_steps}, {found['prompts']['count']} held-out prompts, greedy; in brackets 95 % "
        f"intervals over prompts, of the difference paired.{note}"
    )
    folders = [["the tuned base", str(out / "export/base")], ["its drafter", str(out / "export/drafter")]]
    sections = [
        Section("Speculative decoding", tables=[Table(heads, table, note)]),
        Section("To serve", tables=[Table(["", "folder"], folders)]),
        Section("More", "evaluation/evaluation.html has the measurement, metrics.jsonl the run."),
    ]
    replace(out / "retune.html", html("A drafter retuned", what, sections))
    widths = [max(len(line[i]) for line in [heads, *table]) + 2 for i in range(len(heads))]
    for line in [heads, *table]:
        print("".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"{note}\nwritten: {out / 'retune.json'}, {out / 'retune.html'}; to serve: {out / 'export'}")


if __name__ == "__main__":
    sys.exit(main())
