"""Tokenising and loading of generated rows: the CPU that it takes, the first batch, memory and the loader's speed.

    python -m benchmarks.data WORK_DIR                                  # 10,000 rows and 1,000,000, one size a line
    python -m benchmarks.data WORK_DIR --rows 1000000 --processes 8

A row is a conversation of one or two questions with their answers, in words of the starter's docstrings' length; rows
of a number are the same everywhere. Printed for each size:

- the CPU time of tokenising with masks and checks, from a line of JSON to what is cached, as a ratio to that of
  ``json.loads`` and transformers' ``apply_chat_template(tokenize=True)`` on the same lines (a sample of ``--sample``,
  the two in turns every SLICE rows, so that other work on the machine slows both);
- seconds to tokenise all rows into the cache, with so many processes;
- of a new process that finds the cache: seconds from the configuration to the first batch, by how much its memory grows
  at most (pages of the cache that are mapped included), and microseconds that the loader takes for a packed row.

What must not grow with the number of rows is in the columns of ratios to the first size. The files and the cache of a
size stay in WORK_DIR; one that is there isn't made again (its seconds of tokenising are then those of finding it).
"""

import argparse
import itertools
import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import transformers

from benchmarks import results
from benchmarks.runs import starter_pair
from joint_train.config import Config, load
from joint_train.data import build_loader
from joint_train.data.json_files import Record
from joint_train.data.tokenise import tokenise

SLICE = 500
COLUMNS = {
    "size": ("rows", ""),
    "tokenising": ("CPU of tokenising, x `apply_chat_template`", ".2f"),
    "cache": ("all rows into the cache, s", ".1f"),
    "first_batch": ("first batch from the cache, s", ".2f"),
    "first_batch_ratio": ("first batch, x that of the first size", ".2f"),
    "memory": ("growth of memory, MiB", ".0f"),
    "memory_ratio": ("memory, x that of the first size", ".2f"),
    "row": ("loader, µs a packed row", ".0f"),
    "row_ratio": ("loader, x that of the first size", ".2f"),
}


def generated(count: int) -> Iterator[str]:
    """Lines of JSON, each a conversation."""
    words = ["".join(random.Random(i).choices("aeinorst", k=2 + i % 9)) for i in range(2000)]
    for number in range(count):
        draw = random.Random(number)
        messages = []
        for turn in range(draw.choice((1, 1, 2))):
            question = f"What does {' '.join(draw.choices(words, k=4))} do, {number}.{turn}?"
            answer = " ".join(draw.choices(words, k=min(int(draw.expovariate(1 / 60)) + 5, 600))) + "."
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield json.dumps({"messages": messages}) + "\n"


def configuration(work_dir: Path, file: Path, tokenizer: str, options: argparse.Namespace) -> Config:
    texts = {"tokenizer": tokenizer, "cache_dir": str(work_dir / "cache")}
    overrides = [f"data.{key}={json.dumps(text)}" for key, text in texts.items()]
    overrides += [f"data.train=[{{path: {json.dumps(str(file))}}}]", f"data.max_length={options.max_length}"]
    return load([*overrides, f"data.num_workers={options.processes}", "model.base=unused", "model.drafter=unused"])


def cpu_ratio(file: Path, cfg: Config, tokenizer, sample: int) -> list[float]:
    """CPU time of tokenising as a ratio to transformers', of each slice of the sample."""
    with open(file, "rb") as stream:
        lines = list(itertools.islice(stream, sample))
    records = [Record(str(file), number, line) for number, line in enumerate(lines, 1)]

    def ours(first: int) -> None:
        for _ in tokenise(records[first : first + SLICE], cfg.data.train[0], cfg.data, tokenizer, num_workers=0):
            pass

    def theirs(first: int) -> None:
        for line in lines[first : first + SLICE]:
            tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=True)

    def seconds(work, first: int) -> float:
        start = time.process_time()
        work(first)
        return time.process_time() - start

    seconds(ours, 0)  # compiles the template
    return [seconds(ours, first) / seconds(theirs, first) for first in range(0, len(lines), SLICE)]


def memory(what: str) -> int:
    """Bytes of this process: ``VmRSS``, now, or ``VmHWM``, at most."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(what))


def cached_start(cfg: Config, tokenizer_folder: str, batches: int) -> tuple[float, int, float]:
    """Seconds to the first batch, growth of memory in bytes, and seconds a row. To be run in a process of its own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    cfg.data.num_workers = 0
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    before, start = memory("VmRSS"), time.perf_counter()
    loader = iter(build_loader(cfg, tokenizer, "train", 0, 1))
    next(loader)
    first = time.perf_counter()
    for _ in range(batches):
        next(loader)
    row = (time.perf_counter() - first) / batches / cfg.data.micro_batch_size
    return first - start, memory("VmHWM") - before, row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--processes", type=int, default=0, help="that tokenise; 0: this one")
    parser.add_argument("--tokenizer", help="folder of one with a chat template; the starter's by default")
    parser.add_argument("--max-length", type=int, default=2048, help="of a packed row")
    parser.add_argument("--sample", type=int, default=10_000, help="rows whose CPU time is compared")
    parser.add_argument("--batches", type=int, default=200, help="that are timed after the first")
    results.add_option(parser)
    options = parser.parse_args(argv)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    folder = options.tokenizer or str(starter_pair(options.work_dir / "pair") / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    rows: list[dict[str, results.Value]] = []
    first_size: dict[str, float] = {}
    for count in options.rows:
        file = options.work_dir / f"rows_{count}.jsonl"
        if not file.exists():
            part = file.with_suffix(".part")
            with open(part, "w") as stream:
                stream.writelines(generated(count))
            part.rename(file)
        cfg = configuration(options.work_dir, file, folder, options)
        ratio = cpu_ratio(file, cfg, tokenizer, options.sample)
        start = time.perf_counter()
        build_loader(cfg, tokenizer, "train", 0, 1)
        made = time.perf_counter() - start
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            first, growth, row = process.submit(cached_start, cfg, folder, options.batches).result()
        found: dict[str, float] = {"first_batch": first, "memory": growth / 2**20, "row": row * 1e6}
        first_size = first_size or found
        ratios = {f"{name}_ratio": value / first_size[name] for name, value in found.items()}
        rows.append({"size": f"{count:,}", "tokenising": results.spread(ratio), "cache": made, **found, **ratios})
    results.finish(results.record("data", COLUMNS, rows), options.results)


if __name__ == "__main__":
    main()
