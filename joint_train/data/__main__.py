"""Look at the data, or make some.

    python -m joint_train.data check FILE… [--format F] [--columns FIELD=COLUMN…] [--json OUT.json] [overrides]
    python -m joint_train.data show FILE… [--format F] [--columns FIELD=COLUMN…] [--row 0] [--rows 2] [overrides]
    torchrun --nproc-per-node N -m joint_train.data regenerate OUT.jsonl [--max-new-tokens 512] [overrides]
    python -m joint_train.data regenerate OUT.jsonl --url http://HOST:8000 [--concurrency 64] [overrides]

Without a file, check and show take the sources of the configuration. Overrides are those of the main job:
``+experiment=starter pair=DIR``, ``data=tulu3_magicoder model.base=…``.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joint_train.command import DONE, NO, Parser, above_zero, from_zero, not_negative, positive, share, start
from joint_train.config import Config, ModelConfig, join_options, load
from joint_train.config.values import is_override
from joint_train.errors import ConfigError, DataError
from joint_train.files import replace

if TYPE_CHECKING:
    from joint_train.data.regenerate import Answerer, Sampling


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(
        prog="python -m joint_train.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="look at whole files: bad rows, formats, columns, lengths")
    check.add_argument("--json", type=Path, help="file for the report in JSON; - prints it instead of the tables")
    show = commands.add_parser("show", help="print rows in colour")
    show.add_argument("--split", choices=("train", "val"), default="train")
    show.add_argument("--row", type=from_zero, default=0, help="the first row")
    show.add_argument("--rows", type=positive, default=2, help="how many")
    show.add_argument(
        "--at", type=from_zero, help="position whose rounds are spelled out; default: the first with all of them"
    )
    regenerate = commands.add_parser("regenerate", help="have the base answer the prompts of a dataset")
    regenerate.add_argument("output", type=Path, help="JSONL file to make")
    regenerate.add_argument("--split", choices=("train", "val"), default="train")
    regenerate.add_argument("--batch-size", type=positive, default=8, help="prompts at once, without --url (default 8)")
    regenerate.add_argument("--max-new-tokens", type=positive, default=512)
    regenerate.add_argument("--temperature", type=not_negative, default=0.0, help="0 is greedy (default)")
    of_base = "(default: the base's generation configuration)"
    regenerate.add_argument("--top-k", type=from_zero, help=f"with a temperature; 0: all tokens {of_base}")
    regenerate.add_argument("--top-p", type=share, help=f"with a temperature; 1: all tokens {of_base}")
    regenerate.add_argument(
        "--url", help="let an engine answer that serves the base: vLLM or SGLang, by its OpenAI API"
    )
    regenerate.add_argument("--model", help="the name of the base at --url, where several are served")
    regenerate.add_argument("--concurrency", type=positive, default=64, help="requests at a time to --url (default 64)")
    regenerate.add_argument("--timeout", type=above_zero, default=1800.0, help="seconds that a request may take (1800)")
    for command in (check, show):
        command.add_argument("--format", default="auto", help="of the files; default: by their fields")
        command.add_argument(
            "--columns",
            nargs="*",
            default=[],
            metavar="FIELD=COLUMN",
            help="the files' column for a field of the format",
        )
        command.add_argument("overrides", nargs="*", metavar="FILE", help="files, and overrides of the configuration")
    regenerate.add_argument("overrides", nargs="*", help="of the configuration, e.g. data.max_length=512")
    return top


def load_config(overrides: list[str]) -> Config:
    """The configuration; unlike the main job's it needs no drafter."""
    cfg = load(overrides, check=False)
    if cfg.model.adapter is not None or cfg.model.adapters:
        from joint_train.weights.settle import with_adapter

        cfg = with_adapter(cfg)
    return cfg


def main(arguments: list[str]) -> int:
    options, more = parser().parse_known_args(join_options(arguments))
    unknown = [argument for argument in more if argument.startswith("--") and not argument.startswith("--config")]
    if unknown:
        parser().error(f"unknown option {unknown[0]}")

    def run() -> int | None:
        if options.command == "check":
            return run_check(options, options.overrides + more)
        if options.command == "show":
            cfg = with_files(options, options.overrides + more, options.split)
        else:
            cfg = load_config(options.overrides + more)
        if cfg.data.tokenizer is None and not cfg.model.base:
            raise ConfigError("model.base is not set (or data.tokenizer, for show)")
        if options.command == "regenerate":
            return run_regenerate(cfg, options)
        run_show(cfg, options)
        return None

    return start("joint_train.data", run, int(os.environ.get("RANK", 0)))


def _base(model: ModelConfig) -> tuple[str, str | None, str | None]:
    return model.base, model.revision, model.cache_dir


def with_files(options: argparse.Namespace, arguments: list[str], split: str) -> Config:
    """The configuration, with the files among the arguments as the sources of a split."""
    from joint_train.config import SourceConfig

    groups = {field.name for field in dataclasses.fields(Config)}
    after_columns = [
        pair for pair in options.columns if (key := pair.split("=")[0].lstrip("+")) in groups or "." in key
    ]
    options.columns = [pair for pair in options.columns if pair not in after_columns]
    arguments = arguments + after_columns
    files = [word for word in arguments if not word.startswith("--") and not is_override(word)]
    overrides = [word for word in arguments if word not in files]
    if files and not any(override.startswith("data.mixture=") for override in overrides):
        overrides += ["data.mixture=epoch", "data.shuffle=false"]  # in the order of the files
    cfg = load_config(overrides)
    if files:
        columns = dict(pair.split("=", 1) for pair in options.columns)
        cfg.data.train, cfg.data.val = [], []
        sources = [SourceConfig(path=file, format=options.format, columns=columns) for file in files]
        setattr(cfg.data, split, sources)
    return cfg


def run_check(options: argparse.Namespace, arguments: list[str]) -> int:
    """``check``: 1 if a row is bad, or a source has none."""
    from rich.console import Console

    from joint_train.data import report
    from joint_train.data.formats import check_source
    from joint_train.data.readers import sources_of

    cfg = with_files(options, arguments, "train")
    specs = sources_of(cfg.data, "train") + sources_of(cfg.data, "val")
    if not specs:
        raise ConfigError("no file is named, and data.train has no source")
    for spec in specs:
        check_source(spec.path, spec.format, spec.columns)
    has_tokenizer = cfg.data.tokenizer is not None or bool(cfg.model.base)
    if has_tokenizer:
        from joint_train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(cfg) if has_tokenizer else None
    if tokenizer is None:
        print("no tokenizer (data.tokenizer, model.base): only whether the rows are understood", file=sys.stderr)
    reports = report.check(specs, cfg.data, tokenizer)
    if options.json == Path("-"):
        print(report.to_json(reports), end="")
    else:
        report.show(Console(), reports)
        if options.json:
            replace(options.json, report.to_json(reports))
    return int(any(found.bad or not found.rows for found in reports))


def run_show(cfg: Config, options: argparse.Namespace) -> None:
    """``show``."""
    from rich.console import Console

    from joint_train.data.loader import build_loader
    from joint_train.data.pieces import Pieces
    from joint_train.data.show import show
    from joint_train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(cfg)
    cfg.data.num_workers = max(cfg.data.num_workers, 1)
    sequence = build_loader(cfg, tokenizer, options.split, 0, 1).dataset.sequence
    if all(isinstance(source, Pieces) for source in sequence.sources):  # nobody knows how long a stream is
        documents = sum(map(len, sequence.sources))
        if options.row >= documents:
            raise DataError(f"--row={options.row}: there are {documents:,} documents, and so at most as many rows")
    show(Console(), cfg.drafter, sequence, tokenizer, options.row, options.rows, options.at)


def run_regenerate(cfg: Config, options: argparse.Namespace) -> int:
    """``regenerate``, on each rank."""
    from joint_train.data.readers import sources_of
    from joint_train.data.regenerate import prompts, regenerate
    from joint_train.data.render import Template
    from joint_train.data.tokenizer import load_tokenizer

    if cfg.model.adapters:
        raise ConfigError(
            "model.adapters: answers are one adapter's. Regenerate those of each with model.adapter=DIR, to a file of "
            "its own, and name it as a source of that adapter."
        )
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    tokenizer = load_tokenizer(cfg)
    Template(tokenizer, {})  # refuses a tokenizer without one before the base is loaded
    examples = list(prompts(sources_of(cfg.data, options.split), cfg.data, pictures=options.url is not None))
    make = load_base if options.url is None else connect
    answerer = make(cfg, options, tokenizer, rank)
    counts = regenerate(examples, answerer, options.output, rank=rank, world_size=world_size)
    rows, state = None, f"{counts['missing']} are still to be answered"
    if not counts["missing"] and Path(options.output).exists():  # another rank may be about to put it together
        rows = sum(1 for _ in open(options.output, "rb"))
        state = f"{options.output} is complete ({rows:,} row{'s' * (rows != 1)})"
    speed = (
        f" ({counts['tokens']:,} tokens, {counts['tokens'] / counts['seconds']:,.1f} a second)"
        if counts["tokens"]
        else ""
    )
    print(
        f"[rank {rank}] {counts['answered']} of {len(examples)} prompts answered now{speed}; {counts['unfinished']} "
        f"answers hit --max-new-tokens={options.max_new_tokens} before their end and are left out; {state}"
    )
    for reason, count in counts["refused"].items():
        print(f"[rank {rank}] {count} prompts were refused and are left out: {reason}")
    return NO if rows == 0 else DONE


def sampling_of(generation: Any, options: argparse.Namespace, seed: int) -> "Sampling":
    """The sampling of the command line, and otherwise of a base's generation configuration."""
    from joint_train.data.regenerate import Sampling

    top_k = generation.top_k if options.top_k is None else options.top_k
    top_p = generation.top_p if options.top_p is None else options.top_p
    top_p = 1.0 if top_p is None else top_p
    return Sampling(options.max_new_tokens, options.temperature, top_k or 0, top_p, seed)


def load_base(cfg: Config, options: argparse.Namespace, tokenizer: Any, rank: int) -> "Answerer":
    """The base in this process."""
    import torch

    from joint_train.data.regenerate import Base
    from joint_train.data.tokenizer import end_token_ids
    from joint_train.distributed.parallelize import compute_dtype
    from joint_train.weights.folders import resolve
    from joint_train.weights.run_files import end_generation_with
    from joint_train.weights.settle import load_merged
    from joint_train.weights.to_generate import load_to_generate

    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    dtype = compute_dtype(cfg.precision, device.type)
    if cfg.model.adapter is None:
        model = load_to_generate(resolve(*_base(cfg.model)), dtype, device)
    else:
        model = load_merged(cfg, dtype, device)
    if (added := end_generation_with(model, end_token_ids(tokenizer, cfg.data.chat_template_kwargs))) and rank == 0:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(added)))
        print(f"answers also end with {names}, as in training; the base's generation configuration doesn't have it")
    return Base(model, tokenizer, sampling_of(model.generation_config, options, cfg.seed), options.batch_size)


def connect(cfg: Config, options: argparse.Namespace, tokenizer: Any, rank: int) -> "Answerer":
    """An engine that serves the base."""
    from transformers import AutoConfig, GenerationConfig

    from joint_train.data.tokenizer import end_token_ids
    from joint_train.weights.folders import resolve
    from joint_train.weights.run_files import list_of_ids

    try:
        from joint_train.data.engine import Engine
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        raise ConfigError("--url needs httpx: pip install 'joint-train[serving]'") from None
    if not cfg.model.base:
        raise ConfigError(
            "model.base is not set: give the base that the engine serves, for its tokenizer and end tokens."
        )
    folder = resolve(*_base(cfg.model))
    if (folder / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(folder)
    else:
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))
    ends = list_of_ids(generation.eos_token_id)
    ends += [end for end in end_token_ids(tokenizer, cfg.data.chat_template_kwargs) if end not in ends]
    engine = Engine(
        options.url,
        tokenizer,
        sampling_of(generation, options, cfg.seed),
        name=str(folder) if cfg.model.adapter is None else f"{folder} {cfg.model.adapter}",
        ends=ends,
        suppressed=generation.suppress_tokens or (),
        model=options.model,
        concurrency=options.concurrency,
        timeout=options.timeout,
    )
    if rank == 0:
        print(f"{options.url} answers with {engine.served}; the prompts are those of {cfg.model.base}")
    return engine


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
