"""How fast a base answers prompts: in this process, and by an engine that serves it; both in one run, on one machine.

    python -m benchmarks.regenerate BASE --url http://localhost:8000 [--data FILE] [--limit 64] [--concurrency 1,16,64]

Every way answers the same prompts (by default of the starter data's held-out examples) with the same sampling, after a
warm-up. `equal` is the share of messages that are those of the base in this process, to the character.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import results
from joint_train.command import start

COLUMNS = {
    "way": ("answered by", ""),
    "tokens": ("tokens", ",d"),
    "seconds": ("seconds", ".1f"),
    "tokens_per_second": ("tokens/s", ",.1f"),
    "equal": ("equal", ".0%"),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.regenerate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("base", metavar="BASE", help="folder or hub id of the base")
    top.add_argument("--url", required=True, help="of the engine that serves it")
    top.add_argument("--data", type=Path, help="prompts, in any format of training data")
    top.add_argument("--limit", type=int, default=64, help="at most this many (default 64)")
    top.add_argument("--max-new-tokens", type=int, default=128)
    top.add_argument("--batch-size", type=int, default=8, help="of the base in this process (default 8)")
    top.add_argument("--concurrency", default="1,16,64", help="requests at a time (default 1,16,64)")
    top.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on GPU")
    results.add_option(top)
    return top


def prompts_of(data: Path | None) -> list[dict]:
    """Examples up to the question."""
    import sysconfig

    from joint_train import starter
    from joint_train.config import DataConfig, SourceConfig
    from joint_train.data.regenerate import prompts

    if data is None:
        _, held_out = starter.examples(Path(sysconfig.get_paths()["stdlib"]))
        return [{"messages": chat["messages"][:1]} for chat in held_out]
    return list(prompts([SourceConfig(path=str(data))], DataConfig()))


def timed(answerer: Any, asked: list[tuple[int, dict]]) -> tuple[float, dict[int, Any]]:
    """Seconds, and what became of each prompt."""
    for _ in answerer.answers(asked[:1]):
        pass
    started = time.perf_counter()
    found = {index: answer for some in answerer.answers(asked) for index, answer in some}
    return time.perf_counter() - started, found


def run(args: argparse.Namespace) -> int:
    import torch

    from joint_train.data.engine import Engine
    from joint_train.data.regenerate import Base, Sampling
    from joint_train.data.tokenizer import end_token_ids, read_tokenizer
    from joint_train.weights.folders import resolve
    from joint_train.weights.run_files import end_generation_with, list_of_ids
    from joint_train.weights.to_generate import load_to_generate

    folder, device = resolve(args.base), "cuda" if torch.cuda.is_available() else "cpu"
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    tokenizer, sampling = read_tokenizer(folder), Sampling(args.max_new_tokens)
    model = load_to_generate(folder, getattr(torch, dtype), device)
    end_generation_with(model, end_token_ids(tokenizer))
    ends = list_of_ids(model.generation_config.eos_token_id)
    asked = list(enumerate(prompts_of(args.data)[: args.limit]))

    ways: list[tuple[str, Any]] = [
        (f"this process, {args.batch_size} at a time", Base(model, tokenizer, sampling, args.batch_size))
    ]
    for count in map(int, args.concurrency.split(",")):
        engine = Engine(args.url, tokenizer, sampling, name=str(folder), ends=ends, concurrency=count)
        ways.append((f"the engine, {count} at a time", engine))
    rows: list[dict[str, results.Value]] = []
    local: dict[int, Any] = {}
    for name, answerer in ways:
        print(name, file=sys.stderr, flush=True)
        seconds, found = timed(answerer, asked)
        local = local or found
        tokens = sum(answer.tokens for answer in found.values())
        equal = sum(found[i].message == local[i].message for i, _ in asked) / len(asked)
        row: dict[str, results.Value] = {"way": name, "tokens": tokens, "seconds": seconds, "equal": equal}
        rows.append({**row, "tokens_per_second": tokens / seconds})
    details = {"prompts": len(asked), "max_new_tokens": args.max_new_tokens, "dtype": dtype, "served": engine.served}
    results.finish(results.record("regenerate", COLUMNS, rows, **details), args.results)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return start("benchmarks.regenerate", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
