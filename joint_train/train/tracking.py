"""What a run reports: metrics.jsonl and generations.jsonl always, wandb and TensorBoard if wanted, and the console.

Only rank 0 writes. Nothing here may end a run: a tracker that fails is turned off with one warning. The exception is
``metrics.jsonl``, which is the record that other tools rely on.
"""

import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from joint_train.config import Config, config_to_save, to_yaml
from joint_train.config.values import as_saved, run_length
from joint_train.files import naming, replace
from joint_train.metrics import SUMMARY
from joint_train.train.trackers import TensorBoard, Wandb

log = logging.getLogger(__name__)

CONSOLE_SECONDS = 10  # between lines in a log; a terminal is updated at every step


class Tracker:
    """Where a run's metrics go.

    Args:
        cfg: the whole configuration.
        rank: only rank 0 does anything.
        step: the step that the run resumes from; 0 for a new one. Records after it, of a run that was cut short,
            are moved out of the way.
        unfinished: the record of ``step`` itself is still to come, so one that is there already is moved as well.
        max_steps: the run's last step; by default that of the configuration.
        work: how much a run has done after a step, where its steps take different times.

    Raises:
        OSError: if ``output_dir`` can't be written.
        ImportError: for ``tracking.tensorboard=true`` without the tensorboard package.
    """

    def __init__(
        self,
        cfg: Config,
        rank: int,
        step: int = 0,
        unfinished: bool = False,
        max_steps: int | None = None,
        work: Callable[[int], float] = float,
    ) -> None:
        self.sinks: list[Any] = []
        if rank != 0:
            return
        output_dir = Path(cfg.output_dir).absolute()
        with naming(output_dir, "output_dir"):
            output_dir.mkdir(parents=True, exist_ok=True)
        replace(output_dir / "config.yaml", to_yaml(cfg))
        console = ConsoleLines(cfg, step, max_steps, work=work)
        self.sinks = [JsonLines(output_dir / "metrics.jsonl", step, unfinished), console]
        self.sinks.append(Generations(output_dir / "generations.jsonl", step, unfinished))
        if cfg.tracking.tensorboard:
            self.sinks.append(Guarded("TensorBoard", TensorBoard(output_dir / "tensorboard", step)))
        if cfg.tracking.wandb != "disabled":
            self.sinks.append(Guarded("wandb", Wandb(cfg.tracking, output_dir, config_to_save(cfg), step)))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record a step's metrics (see ``METRICS``): once for each step, in order."""
        for sink in self.sinks:
            sink.log(step, metrics)

    def examples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Show generated texts: dictionaries with the same keys, one for each prompt."""
        for sink in self.sinks:
            if rows and hasattr(sink, "examples"):
                sink.examples(step, rows)

    def finish(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Say what the run achieved: validation metrics before and after it, and where the models are."""
        for sink in self.sinks:
            if hasattr(sink, "finish"):
                sink.finish(before, after)

    def exported(self, folder: Path) -> None:
        """Take note of the run's export, a folder of folders."""
        for sink in self.sinks:
            if hasattr(sink, "exported"):
                sink.exported(folder)

    def sync(self) -> None:
        """Sync the records to disk, before a checkpoint that continues after them."""
        for sink in self.sinks:
            if isinstance(sink, JsonLines):
                os.fsync(sink.file.fileno())

    def close(self) -> None:
        """Finish what is still being written. Does nothing the second time."""
        for sink in self.sinks:
            sink.close()
        self.sinks = []


class JsonLines:
    """``metrics.jsonl``: one JSON object a step, append-only, every step once.

    Records after ``step`` belong to steps that are about to be run again, that of an ``unfinished`` step is about to be
    written again, and a crash may have torn the last line. They are moved to ``metrics.dropped.jsonl``, so that nothing
    measured is lost. A fresh run (step 0) moves all of them.
    """

    def __init__(self, path: Path, step: int, unfinished: bool = False) -> None:
        # Bytes that are no text, of a disk that failed, come back as they were in the file of what is dropped.
        # Texts may hold other separators of lines than "\n".
        lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n") if path.exists() else []
        lines = lines[:-1] if lines and not lines[-1] else lines
        kept, dropped = {}, []
        for line in lines:
            done = recorded_step(line)
            if step > 0 and 0 <= done <= step - unfinished and done not in kept:
                kept[done] = line
            else:
                dropped.append(line)
        if dropped:
            aside = path.with_suffix(".dropped.jsonl")
            with naming(aside, "output_dir"), open(aside, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write("".join(line + "\n" for line in dropped))
            replace(path, "".join(line + "\n" for line in kept.values()))
        self.path = path
        with naming(path, "output_dir"):
            self.file = open(path, "a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.write(step, metrics_to_json(metrics))

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Append an object of a step; its values are as JSON has them."""
        line = json.dumps({"step": step, "time": round(time.time(), 3)} | dict(record), ensure_ascii=False)
        with naming(self.path, "output_dir"):
            self.file.write(line + "\n")
            self.file.flush()

    def close(self) -> None:
        with naming(self.path, "output_dir"):
            self.file.close()


class Generations:
    """``generations.jsonl``: the texts of each assisted generation, as :class:`JsonLines` keeps metrics: one object a
    validation, with its ``step``, ``time`` and ``examples``."""

    def __init__(self, path: Path, step: int, unfinished: bool = False) -> None:
        self.open = partial(JsonLines, path, step, unfinished)
        self.lines: JsonLines | None = self.open() if path.exists() else None  # what is generated again goes aside

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def examples(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.lines = self.lines or self.open()
        self.lines.write(step, {"examples": rows})

    def close(self) -> None:
        if self.lines is not None:
            self.lines.close()


def recorded_step(line: str) -> int:
    """The step of a line of ``metrics.jsonl``, or -1 if the line isn't whole."""
    try:
        line.encode()  # not where it has bytes that are no text
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1


def metrics_to_json(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as numbers that JSON has: infinities and NaN become null."""
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def metrics_from_json(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Metrics that :func:`metrics_to_json` made, with NaN for null."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}


class Guarded:
    """A tracker whose first failure turns it off, with a warning, and never ends the run."""

    def __init__(self, name: str, sink: Any) -> None:
        self.name, self.sink = name, sink

    def __getattr__(self, method: str) -> Callable[..., None]:
        if self.sink is not None and not hasattr(self.sink, method):
            raise AttributeError(method)
        return lambda *args: self.call(method, *args)

    def call(self, method: str, *args: Any) -> None:
        if self.sink is None:
            return
        try:
            getattr(self.sink, method)(*args)
        except Exception as error:  # whatever it is, the run is worth more
            self.sink = None
            log.warning("%s failed and is off for the rest of the run: %s: %s", self.name, type(error).__name__, error)


class ConsoleLines:
    """Progress for people: a bar and the newest numbers on a terminal, a line with its time now and then in a log."""

    def __init__(
        self,
        cfg: Config,
        step: int,
        max_steps: int | None = None,
        console: Console | None = None,
        work: Callable[[int], float] = float,
    ) -> None:
        self.work = work
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.total, self.output_dir = max_steps or run_length(cfg)[0] or 0, Path(cfg.output_dir)
        export = cfg.model.export
        parts = {
            "base": not as_saved(cfg),
            "drafter": True,
            "drafter_last": export.drafter_last,
            "adapter": cfg.lora.r > 0,
        }
        self.exports = [part for part, is_written in parts.items() if export.at_end and is_written]
        self.first: tuple[int, float] | None = None  # the first step that was reported, and when
        self.printed = -math.inf
        self.live: Live | None = None
        self.explained: set[str] = set()  # of validation and training: what can't be measured
        if self.console.is_terminal:
            self.bar = Progress(
                BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=self.total, completed=step, numbers="")
            redirected = sys.stderr.isatty()  # one that goes to a file stays there
            self.live = Live(self.bar, console=self.console, refresh_per_second=4, redirect_stderr=redirected)
            self.live.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for prefix, data in (("val/", "the validation data"), ("", "this step's batches")):
            if prefix not in self.explained and (why := without_targets(metrics, prefix)):
                self.explained.add(prefix)
                self.console.print(f"step {step}: in {data} {why}")
        if any(name.startswith("val/") for name in metrics):
            self.console.print(validation_line(step, metrics))
        if "base_loss" not in metrics:
            return
        numbers = self.progress_text(step, metrics)
        if self.live:
            self.bar.update(self.task, completed=step, numbers=numbers)
        elif step == self.total or time.monotonic() - self.printed >= CONSOLE_SECONDS:
            now = time.strftime("%m-%d %H:%M:%S")
            self.console.print(f"{now}  step {step} of {self.total}{epoch_of(metrics)}  {numbers}")
            self.printed = time.monotonic()
        if metrics.get("loss_spike"):
            self.console.print(f"step {step}: the loss jumped; see metrics.jsonl")

    def progress_text(self, step: int, metrics: Mapping[str, float]) -> str:
        """Both losses, speed and time left, in under 60 columns; in a log also learning rates and gradient norm."""
        text = f"base {format_metric(metrics, 'base_loss')}  drafter {format_metric(metrics, 'drafter_loss')}"
        if not self.live:
            text += learning_rates(metrics)
            text += f"  grad {metrics['grad_norm']:.3g}" if "grad_norm" in metrics else ""
        if speed := metrics.get("tokens_per_second"):
            text += f"  {short_number(speed)} tok/s"
        self.first = self.first or (step, time.monotonic())
        if step > self.first[0]:
            start, now, end = map(self.work, (self.first[0], step, self.total))
            text += f"  {duration((time.monotonic() - self.first[1]) / (now - start) * (end - now))} left"
        if bad := int(metrics.get("bad_steps", 0)):
            text += f"  bad {bad}"
        return text

    def finish(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        self.stop()
        rows = [(name, key) for key, name in SUMMARY.items() if key in before and key in after]
        if rows:
            self.console.print(f"\n{'on the validation data':<32}{'before':>10}{'after':>10}")
            for name, key in rows:
                self.console.print(f"  {name:<30}{format_metric(before, key):>10}{format_metric(after, key):>10}")
        for part in self.exports:
            self.console.print(f"Hugging Face {part}: {self.output_dir / 'export' / part}")

    def stop(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def close(self) -> None:
        self.stop()


# What is NaN over no targets, and only then: shares of counts, which are finite whatever the losses are.
COUNTED = {"base_loss": "base_accuracy", "drafter_loss": "agreement_0", "drafter_ce": "agreement_0"}


def format_metric(metrics: Mapping[str, float], name: str) -> str:
    """A metric with three digits; "–" where there was nothing to measure, "nan" where the loss isn't a number."""
    prefix, slash, metric = name.rpartition("/")
    counted = metric if metric.startswith(("accepted_length", "own_accepted_length")) else COUNTED.get(metric, "")
    if name not in metrics or math.isnan(metrics.get(f"{prefix}{slash}{counted}", 0.0)):
        return "–"
    return f"{metrics[name]:.3f}"


def without_targets(metrics: Mapping[str, float], prefix: str) -> str | None:
    """A sentence on what couldn't be measured of the drafter for lack of targets; None if everything was."""
    rounds = [name for name in metrics if re.fullmatch(rf"{prefix}agreement_\d+", name)]
    empty = [name.rpartition("_")[2] for name in rounds if math.isnan(metrics[name])]
    if empty and len(empty) == len(rounds):
        return "no answer is long enough for a target of the drafter: there is nothing to measure it by (–)"
    if empty:
        return (
            f"no answer is long enough for targets of the drafter's round {', '.join(empty)}: its loss is the mean "
            "over the others, and its accepted length can't be measured (–)"
        )
    if math.isnan(metrics.get(f"{prefix}accepted_length_expected", 0.0)):
        return "no row has a target of every round of the drafter: its accepted length can't be measured (–)"
    return None


def validation_line(step: int, metrics: Mapping[str, float]) -> str:
    """One line for a validation."""
    text = f"step {step}: validation"
    for key, name in (("val/base_loss", "base"), ("val/drafter_loss", "drafter")):
        if key in metrics:
            text += f"  {name} {format_metric(metrics, key)}"
    if (value := metrics.get("val/tokens_per_forward")) is not None:
        text += f"  {value:.2f} tokens/forward"
    elif "val/own_accepted_length" in metrics:
        text += f"  {format_metric(metrics, 'val/own_accepted_length')} expected"
    return text


def learning_rates(metrics: Mapping[str, float]) -> str:
    """``  lr 1.0e-5, 1.0e-4`` of base and drafter; one where they are the same, or the base is frozen."""
    rates = {metrics[name]: None for name in ("lr", "drafter_lr") if name in metrics}
    shown = [f"{rate:.1e}".replace("e-0", "e-") for rate in rates if rate or len(rates) == 1]
    return f"  lr {', '.join(shown)}" if shown else ""


def epoch_of(metrics: Mapping[str, float]) -> str:
    """``, epoch 1.4`` where the data has epochs."""
    return f", epoch {short_epoch(metrics['epoch'])}" if "epoch" in metrics else ""


def short_epoch(epoch: float) -> str:
    """One digit behind the point, or as many as a small number needs: ``1.4``, ``0.002``."""
    return f"{epoch:.1f}" if epoch >= 0.1 or epoch == 0 else f"{epoch:.1g}"


def short_number(number: float) -> str:
    """``1234567`` as ``1.2M``, in at most five characters below 10^12."""
    for unit in ("", "k", "M"):
        if abs(number) < 999.5:
            return f"{number:.0f}{unit}" if not unit or abs(number) >= 99.95 else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}G"


def duration(seconds: float) -> str:
    """``75`` as ``1:15``, ``3675`` as ``1:01:15``, and days as ``2d 03h``."""
    seconds = round(seconds)
    if seconds >= 86400:
        return f"{seconds // 86400}d {seconds % 86400 // 3600:02}h"
    hours, minutes, seconds = seconds // 3600, seconds % 3600 // 60, seconds % 60
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
