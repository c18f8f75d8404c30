"""The files of ``conf/recipe/``: every released pair on 1, 2, 8 and 16 GPUs of 80 GB, as far as the plan says it fits.

    python -m benchmarks.recipes [NAME…]

Each file has its settings, and in its head what ``joint_train.plan`` says of them. What the plan chooses here: the
settings of least consequence that fit (``SAVINGS``), the mesh of two nodes, and the micro-batch that is fastest.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joint_train import config
from joint_train.command import start
from joint_train.plan.machine import Machine
from joint_train.plan.planner import GIB, Plan, make_plan

FOLDER = Path(__file__).resolve().parent.parent / "conf" / "recipe"
PAIRS = {
    "gemma4_e2b": "Gemma 4 E2B",
    "gemma4_e4b": "Gemma 4 E4B",
    "gemma4_12b_unified": "Gemma 4 12B",
    "gemma4_26b_a4b": "Gemma 4 26B-A4B",
    "gemma4_31b": "Gemma 4 31B",
}
MACHINES = {"1gpu": (1, "one GPU"), "2gpu": (2, "2 GPUs"), "8gpu": (8, "8 GPUs"), "2x8gpu": (16, "two nodes of 8 GPUs")}
# What is trained, and the settings of it.
JOINT = {"epochs": 2, "freeze.base_after": "auto"}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("base and drafter in full", {"optim.lr": 1e-5, **JOINT}),
    "lora": (
        "adapters on the base, and the drafter in full",
        {"lora.r": 16, "lora.alpha": 32, "optim.lr": 1e-4, **JOINT},
    ),
    "drafter": ("the drafter alone; the base stays as it is", {"freeze.base": True}),
}
# Tried in turn: the first that fits is taken.
SAVINGS: list[dict[str, Any]] = [
    {},
    {"optim.name": "adamw_bf16"},
    {"parallel.cpu_offload": "optimizer"},
    {"optim.name": "adamw_bf16", "parallel.cpu_offload": "optimizer"},
    {"data.max_length": 2048},
    {"optim.name": "adamw_bf16", "parallel.cpu_offload": "optimizer", "data.max_length": 2048},
]
ROWS = 64  # of a step, on all GPUs
COMMENTS = {
    "freeze.base_after": "then the drafter alone, for what joint training saves (docs/losses.md)",
    "optim.name": "moments in bfloat16, for memory",
    "parallel.cpu_offload": "optimizer states in the host's memory",
    "parallel.dp_replicate": "a copy of the pair on each node, sharded inside it",
}


@dataclass
class Recipe:
    name: str
    pair: str
    way: str
    gpus: int

    @property
    def machine(self) -> Machine:
        return Machine(gpus=self.gpus)

    def settings(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """All of a recipe's settings by key, in the order in which they are written."""
        together = {
            "data.max_length": 4096, "data.micro_batch_size": 1, "data.mixture": "epoch", "epochs": 1,
            **WAYS[self.way][1], "optim.drafter_lr": 1e-4, "optim.warmup_steps": 20, **chosen,
        }  # fmt: skip
        together["optim.grad_accum"] = max(1, ROWS // (self.gpus * together["data.micro_batch_size"]))
        return together

    def plan(self, settings: dict[str, Any]) -> Plan:
        given = [f"{key}={value}" for key, value in settings.items()]
        return make_plan(config.load([f"model={self.pair}", "data.train=unused", *given]), self.machine)


def recipes() -> Iterator[Recipe]:
    for pair in PAIRS:
        for way in WAYS:
            for short, (gpus, _) in MACHINES.items():
                yield Recipe(f"{pair}_{way}_{short}", pair, way, gpus)


def choose(recipe: Recipe) -> tuple[dict[str, Any], Plan] | None:
    """The settings that are added to a recipe's own, and their plan; None if nothing fits."""
    meshes: list[dict[str, Any]] = [{}]
    if recipe.gpus > recipe.machine.gpus_per_node:
        meshes.append({"parallel.dp_replicate": recipe.gpus // recipe.machine.gpus_per_node})
    for saving in SAVINGS:
        found = []
        for mesh in meshes:
            for rows in (1, 2, 4):
                chosen = {**saving, **mesh, "data.micro_batch_size": rows}
                plan = recipe.plan(recipe.settings(chosen))
                if plan.peak > recipe.machine.usable:
                    break
                found.append((plan.tokens / plan.seconds(recipe.machine), -rows, chosen, plan))
        if found:
            # Twice the rows have to be worth their memory.
            fastest = max(speed for speed, *_ in found)
            *_, chosen, plan = max((one for one in found if one[0] >= 0.97 * fastest), key=lambda one: one[1])
            return chosen, plan
    return None


def head(recipe: Recipe, plan: Plan) -> list[str]:
    """What the plan says of a recipe."""
    machine, (_, where) = recipe.machine, MACHINES[recipe.name.rpartition("_")[2]]
    seconds = plan.seconds(machine)
    hours = 1e8 / plan.tokens * seconds / 3600
    host = f"; {sum(plan.host.values()) / GIB:.0f} GiB of the host for each GPU" if plan.host else ""
    return [
        f"{PAIRS[recipe.pair]}, {WAYS[recipe.way][0]}, on {where} of {machine.gpu_memory_gb:g} GB.",
        f"Planned memory: a peak of {plan.peak / GIB:.1f} GiB of {machine.usable / GIB:.1f} on each GPU{host}.",
        f"Planned time: {seconds:.2f} s for a step of {plan.tokens:,} tokens, {hours:.1f} h for 100 million tokens.",
    ]


def text(recipe: Recipe, settings: dict[str, Any], plan: Plan) -> str:
    """A recipe's file."""
    nodes, gpus = max(1, recipe.gpus // 8), min(8, recipe.gpus)
    start_with = f"torchrun --nproc-per-node {gpus} -m joint_train"
    if nodes > 1:
        start_with = f"python -m launch.submit nodes={nodes} gpus_per_node={gpus} --"
    lines = ["# @package _global_", *(f"# {line}" for line in head(recipe, plan))]
    lines += [f"#   {start_with} +recipe={recipe.name} data.train=FILE output_dir=DIR"]
    lines += ["# A copy of your own is given with --config COPY.yaml. This file was written by benchmarks/recipes.py."]
    lines += ["defaults:", f"  - override /model: {recipe.pair}", ""]
    groups: dict[str, list[str]] = {}
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        value = str(value).lower() if isinstance(value, bool) else f"{value:.0e}" if isinstance(value, float) else value
        value = str(value).replace("e-0", "e-")
        comment = f" # {COMMENTS[key]}" if key in COMMENTS else ""
        groups.setdefault(group, []).append(f"{'  ' if group else ''}{name}: {value}{comment}")
    for group in sorted(groups, key=list(groups).index):
        if group == "data":
            lines += [
                "data:",
                "  # train: train.jsonl  # a file, or a list of sources: --help data.train",
            ]
            lines += ["  # val: val.jsonl", *groups[group]]
        else:
            lines += [*([f"{group}:"] if group else []), *groups[group]]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="the recipes to write; all of them by default")
    wanted = parser.parse_args().names

    def run() -> None:
        for recipe in recipes():
            if wanted and recipe.name not in wanted:
                continue
            file = FOLDER / f"{recipe.name}.yaml"
            if (found := choose(recipe)) is None:
                print(f"{recipe.name}: nothing that is known here fits", flush=True)
                file.unlink(missing_ok=True)
                continue
            chosen, plan = found
            file.write_text(text(recipe, recipe.settings(chosen), plan))
            print(f"{file.name}: {plan.peak / GIB:.1f} GiB, {chosen}", flush=True)

    return start("benchmarks.recipes", run)


if __name__ == "__main__":
    sys.exit(main())
