"""What a checkpoint costs the training loop, saved at once and in the background.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.checkpoint_overhead [--millions 60] [--folder DIR]

Each mode trains the same stand-in pair (matrix products and AdamW, so weights and two moments are saved), with and
without checkpoints. Two costs are printed, per save:

- blocked: time inside ``save`` and ``poll``, when no step can run;
- all told: the loop's time above the same number of steps without a save. By default a step waits, as for a GPU. With
  ``--on-cpu`` it computes: then what is written in the background is taken from the step's own cores.

The first save of a run also touches the memory of the copies for the first time; it is shown on its own.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedConfig

from benchmarks import results
from joint_train.checkpoint import Checkpointer
from joint_train.config import Config

COLUMNS = {
    "save": ("save", ""),
    "blocked": ("blocked", ".2f s"),
    "first": ("blocked by the first save", ".2f s"),
    "more": ("all told", "+.2f s"),
    "written": ("on disk after", ".1f s"),
}


class Half(nn.Module):
    def __init__(self, millions: float):
        super().__init__()
        width = 1024
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(max(1, round(millions * 1e6 / width**2))))
        self.config = PreTrainedConfig(hidden_size=width)


class Pair(nn.Module):
    def __init__(self, millions: float):
        super().__init__()
        self.base, self.drafter = Half(0.9 * millions), Half(0.1 * millions)


class Steps:
    """Steps of a fixed amount of work, on this CPU or on a GPU that isn't there."""

    def __init__(self, optimizer: torch.optim.Optimizer, seconds: float, on_cpu: bool):
        self.optimizer, self.seconds, self.products = optimizer, seconds, 0
        self.x = torch.ones(64, 1024)
        if on_cpu:
            started = time.perf_counter()
            while time.perf_counter() - started < seconds:
                self.product()
                self.products += 1

    def product(self) -> None:
        self.x = torch.tanh(self.x @ self.x.T @ self.x)

    def __call__(self) -> None:
        if self.products:
            for _ in range(self.products):
                self.product()
            self.optimizer.step()
        else:
            time.sleep(self.seconds)
        dist.all_reduce(self.x)


def run(model, optimizer, step: Steps, folder: Path, background: bool, saves: int, every: int) -> dict:
    cfg = Config()
    cfg.model.base, cfg.model.drafter = "base", "drafter"
    cfg.checkpoint.background, cfg.checkpoint.keep_last = background, 1
    checkpointer = Checkpointer(folder, cfg.checkpoint)
    blocked, loops, durations = [], [], []
    for save in range(saves):
        dist.barrier()
        started = time.perf_counter()
        spent = written = 0.0
        for i in range(every):
            step()
            before = time.perf_counter()
            if i == 0:
                checkpointer.save(save + 1, model, optimizer, {"step": save + 1}, config=cfg)
            checkpointer.poll()
            spent += time.perf_counter() - before
            if not written and not checkpointer.saving:
                written = time.perf_counter() - started
        before = time.perf_counter()
        checkpointer.wait()
        spent += time.perf_counter() - before
        blocked.append(spent)
        loops.append(time.perf_counter() - started)
        durations.append(written or loops[-1])
    checkpointer.close()
    return {"blocked": blocked, "loops": loops, "written": durations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--millions", type=float, default=60, help="millions of parameters of the pair")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--every", type=int, default=40, help="steps between saves")
    parser.add_argument("--step-seconds", type=float, default=0.2)
    parser.add_argument("--on-cpu", action="store_true", help="steps that compute instead of waiting")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    results.add_option(parser)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = Pair(args.millions)
    for half in (model.base, model.drafter):
        fully_shard(half)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()

    chosen = [tempfile.mkdtemp(dir=args.folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(chosen)
    folder = Path(chosen[0])
    rows = {}
    try:
        step = Steps(optimizer, args.step_seconds, args.on_cpu)
        dist.barrier()
        started = time.perf_counter()
        for _ in range(args.every):
            step()
        plain = time.perf_counter() - started
        for name, background in (("at once", False), ("in the background", True)):
            target = folder / name.replace(" ", "-")
            rows[name] = run(model, optimizer, step, target, background, args.saves, args.every)
            dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    if dist.get_rank() == 0:
        size = sum(p.numel() for p in model.parameters()) * 12 / 1e9
        print(
            f"{size:.2f} GB a checkpoint on {dist.get_world_size()} ranks, {args.every} steps without one {plain:.1f} s"
        )
        table: list[dict[str, results.Value]] = []
        for name, row in rows.items():
            mean = {key: sum(values[1:]) / len(values[1:]) for key, values in row.items()}
            more = {"first": row["blocked"][0], "more": mean.pop("loops") - plain}
            table.append({"save": name, **mean, **more})
        at_once, background = (row["blocked"] for row in table)
        table.append({"save": "in the background / at once", "blocked": background / at_once})
        results.finish(results.record("checkpoint_overhead", COLUMNS, table), args.results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
