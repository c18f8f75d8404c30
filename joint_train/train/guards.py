"""Guards against runs that go wrong unnoticed: bad steps, loss spikes, hangs; and a profiler for slow ones.

Each guard stands alone and costs a step nothing that the host would wait for::

    profiler, bad, spikes = StepProfiler(…), BadSteps(…), LossSpikes()
    with Watchdog(timeout, rank) as watchdog:
        for step in …:
            watchdog.beat()
            with profiler.step(step):
                …
            bad.observe(grad_norm)                # on the device
            if is_due(step, log_every):
                metrics |= bad.read() | {"loss_spike": spikes.observe(loss)}
"""

import contextlib
import faulthandler
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from joint_train.command import HUNG
from joint_train.config import parse_steps
from joint_train.torch_private import dump_memory, record_memory

log = logging.getLogger(__name__)

STACKS_SECONDS = 2  # the other ranks' stacks get on screen before a launcher that saw this one end stops them


class BadSteps:
    """Counts the steps that the optimizer skipped because the gradient norm wasn't finite.

    The counters live on the device, so that counting waits for nothing; :meth:`read` waits. The norm covers all
    parameters of all ranks, so every rank counts alike.

    Args:
        limit: steps in a row after which the run shouldn't go on.
        before: bad steps of the run so far; they don't count towards a new row of bad steps.
    """

    def __init__(self, limit: int, device: torch.device | str, before: int = 0) -> None:
        self.limit = limit
        self.counts = torch.tensor([before, 0, 0], device=device)  # in all, in a row, most in a row

    def observe(self, grad_norm: Tensor) -> None:
        """Count a step by its gradient norm, a scalar tensor."""
        bad = ~grad_norm.isfinite()
        total, row, most = self.counts.unbind()
        row = (row + 1) * bad
        self.counts = torch.stack([total + bad, row, torch.maximum(most, row)])

    def read(self) -> dict[str, int]:
        """The metric ``bad_steps``: how many there were so far."""
        return {"bad_steps": int(self.counts[0])}

    def exhausted(self) -> bool:
        """Whether there were ``limit`` bad steps in a row since the run started."""
        return int(self.counts[2]) >= self.limit


def dump(folder: str | Path, rank: int, step: int, batches: Sequence[Mapping[str, Tensor]], model: nn.Module) -> Path:
    """Write what is needed to find out why steps were bad; each rank for itself, so that it can't hang.

    ``rank_R.pt`` has the micro-batches. ``rank_R.json`` has, for each parameter, the norms of this rank's shard and of
    its gradient (if there is one), and how many elements of either aren't finite; parameters with any come first.

    Returns:
        The folder of this step.
    """
    folder = Path(folder) / f"bad_step_{step:08}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save([{name: x.cpu() for name, x in batch.items()} for batch in batches], folder / f"rank_{rank}.pt")
    parameters: dict[str, dict[str, float | None]] = {}
    for name, parameter in model.named_parameters():
        facts: dict[str, float | None] = {}
        parameters[name] = facts
        for kind, x in (("weight", parameter), ("gradient", parameter.grad)):
            if x is not None:
                x = (x.to_local() if isinstance(x, DTensor) else x).detach().float()
                norm = x.norm().item()
                facts[f"{kind}_norm"] = norm if math.isfinite(norm) else None
                facts[f"{kind}_nonfinite"] = int((~x.isfinite()).sum())
    worst = sorted(parameters, key=lambda n: -sum(v or 0 for k, v in parameters[n].items() if k.endswith("nonfinite")))
    report = {"step": step, "rank": rank, "parameters": {name: parameters[name] for name in worst}}
    (folder / f"rank_{rank}.json").write_text(json.dumps(report, indent=1) + "\n")
    return folder


class LossSpikes:
    """Detects a loss far above its recent values.

    Far is eight robust standard deviations (1.4826 times the median absolute deviation) and a tenth above the median of
    the last 64 losses. The first 20 only teach it.
    """

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=64)

    def observe(self, loss: float) -> bool:
        """Whether this loss is a spike. Losses that aren't finite are :class:`BadSteps`' business."""
        if not math.isfinite(loss):
            return False
        spike = False
        if len(self.recent) >= 20:
            median = statistics.median(self.recent)
            deviation = 1.4826 * statistics.median(abs(x - median) for x in self.recent)
            spike = loss > median + 8 * deviation + 0.1 * abs(median)
        self.recent.append(loss)
        return spike


class Watchdog:
    """Ends a process that hangs, with the stacks of all its threads on screen and exit code :data:`HUNG`.

    A collective has a time-out of its own, but its error says where the others waited, not where the missing rank is.
    So the watchdog of each rank waits a tenth less. Should a hang hold Python's lock, where no thread can act,
    ``faulthandler`` ends the process from outside of Python at the full time-out.

    Args:
        timeout_seconds: longest time between two heartbeats, as ``parallel.timeout_seconds``.
    """

    def __init__(self, timeout_seconds: float, rank: int) -> None:
        self.timeout, self.rank = timeout_seconds, rank
        self.last = time.monotonic()
        self.errors = sys.__stderr__ or open(os.devnull, "w")  # a process may have been started without one
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.beat()
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Reset the watchdog's timer: once a step, and during long work between steps."""
        self.last = time.monotonic()
        # Replaces the one before.
        faulthandler.dump_traceback_later(self.timeout, exit=True, file=self.errors)

    def _watch(self) -> None:
        limit = 0.9 * self.timeout
        while not self.stop.wait(max(0.01, min(1.0, limit / 20))):
            if (silent := time.monotonic() - self.last) > limit:
                self._end(silent)

    def _end(self, silent: float) -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        text = f"no progress for {silent:.0f} s (parallel.timeout_seconds={self.timeout:g}). Stacks of its threads:\n"
        lines = (text + stacks).splitlines()
        self.errors.write("".join(f"[rank {self.rank}] {line}\n" for line in lines))
        self.errors.flush()
        time.sleep(min(STACKS_SECONDS, 0.05 * self.timeout))
        os._exit(HUNG)


def flight_recorder(output_dir: str | Path) -> None:
    """Have NCCL remember its last collectives and write them where one times out; before the process group is made.

    The files, ``OUTPUT_DIR/flight_recorder/rank_R``, are read by ``torchfrtrace``. A user's own settings win.
    """
    folder = Path(output_dir).absolute() / "flight_recorder"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "rank_"))


class StepProfiler:
    """Traces some steps into ``folder``: a Chrome trace for each rank, and a memory snapshot on a GPU.

    ``rank_R.trace.json.gz`` opens at ui.perfetto.dev, ``rank_R.memory.pickle`` at pytorch.org/memory_viz.

    Raises:
        ConfigError: for a ``spec`` (``profile.steps``) that isn't one.
    """

    def __init__(self, spec: str | None, folder: str | Path, rank: int) -> None:
        self.steps, self.folder, self.rank = parse_steps(spec), Path(folder), rank
        self.profile: torch.profiler.profile | None = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step that will be ``number``."""
        if number in self.steps and self.profile is None:
            self._start()
        with torch.profiler.record_function(f"step {number}") if self.profile else contextlib.nullcontext():
            yield
        if self.profile and number + 1 not in self.steps:
            self._finish(self.profile)

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if torch.cuda.is_available():
            record_memory(200_000)
        self.profile = torch.profiler.profile(record_shapes=True, profile_memory=True, with_stack=True)
        self.profile.start()

    def _finish(self, profile: torch.profiler.profile) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profile.stop()
        profile.export_chrome_trace(str(self.folder / f"rank_{self.rank}.trace.json.gz"))
        if torch.cuda.is_available():
            dump_memory(str(self.folder / f"rank_{self.rank}.memory.pickle"))
            record_memory(None)
        self.profile = None
        log.info("profile of steps %d-%d: %s", self.steps[0], self.steps[-1], self.folder)
