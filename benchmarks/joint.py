"""What joint training is worth, against training the base first and then its drafter, at equal cost.

    python -m benchmarks.joint DIR                          # seeds 0 1 2, every arm of the table below
    python -m benchmarks.joint DIR --arms stale sequential "joint 0.1" --seeds 0

The domain shifts: the starter pair is trained on docstrings, and then fine-tuned on code, both of Python's standard
library. A seed is another pair of random weights and another data order. Each exported pair is measured on held-out
prompts of the code: its base's loss, its greedy text, and the tokens per base forward as engines serve it. Whatever is
finished in DIR isn't run again, so an interrupted command goes on where it was.

DIR gets joint.json and joint.svg.
"""

import argparse
import ast
import json
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import results
from benchmarks.greedy import compared, greedy_texts, variety, verifications
from benchmarks.runs import run_module, starter_pair, train
from joint_train.command import start
from joint_train.config import load
from joint_train.errors import ConfigError
from joint_train.evaluate.measure import interval
from joint_train.evaluate.page import figure
from joint_train.evaluate.prompts import chat_prompt
from joint_train.files import replace
from joint_train.pair.model import JointModel
from joint_train.plan.planner import Machine, make_plan
from joint_train.starter import chats, documented, modules, write_jsonl

COLUMNS = {
    "arm": ("arm", ""),
    "base_steps": ("steps of the base", ".0f"),
    "drafter_steps": ("of the drafter", ".0f"),
    "flops_of_sequential": ("FLOPs", ".2f"),
    "base_loss": ("base loss", ".4f"),
    "base_loss_change": ("against base-only", "+.2%"),
    "tokens_per_forward": ("tokens per base forward", ".2f"),
    "gain_over_sequential": ("against sequential", "+.1%"),
    "kl_from_base_only": ("KL from base-only", ".3f"),
    "entropy": ("entropy", ".3f"),
    "distinct_2": ("distinct 2-grams", ".3f"),
    "repeated_4": ("repeated 4-grams", ".3f"),
}


@dataclass(frozen=True)
class Stage:
    """One run of the main job, from the pair that the stage before it left.

    Attributes:
        overrides: of the configuration.
        steps: a multiple of ``--steps``; ``rest``: as many as reach the FLOPs of the sequential arm.
        keeps_drafter: false: only the base counts. The next stage starts from the drafter that there was before, and
            the stage is counted without the drafter's FLOPs.
        own_text: trained on the base's own greedy answers to the training prompts.
    """

    overrides: tuple[str, ...]
    steps: float | str = 1.0
    keeps_drafter: bool = True
    own_text: bool = False


def joint(scale: float, *more: str, steps: float | str = 1.0, keeps_drafter: bool = True) -> Stage:
    """Both models train, each clipped by its own norm."""
    return Stage((f"drafter.base_grad_scale={scale}", "optim.clip=separate", *more), steps, keeps_drafter)


# With base_grad_scale=0 and a clip of its own, the base is bit for bit what it would be without a drafter.
BASE_ONLY = joint(0, keeps_drafter=False)
DRAFTER_ONLY = ("freeze.base=true", "optim.clip=separate")
REFERENCE = "sequential"  # the arm whose cost and tokens per forward the others are compared with

ARMS: dict[str, tuple[Stage, ...]] = {
    "stale": (BASE_ONLY,),
    "sequential": (BASE_ONLY, Stage(DRAFTER_ONLY)),
    "sequential, own text": (BASE_ONLY, Stage(DRAFTER_ONLY, own_text=True)),
    "joint 0": (joint(0),),
    "joint 0.1": (joint(0.1),),
    "joint 0.3": (joint(0.3),),
    "joint 1": (joint(1),),
    "joint 1, joint clip": (Stage(("drafter.base_grad_scale=1", "optim.clip=joint")),),
    "joint 0, then drafter": (joint(0), Stage(DRAFTER_ONLY, "rest")),
    "joint 0.1, then drafter": (joint(0.1), Stage(DRAFTER_ONLY, "rest")),
    "joint 0.1 teacher 0.03": (joint(0.1, "loss.teacher_grad=0.03"),),
    "joint 0.1 teacher 0.1": (joint(0.1, "loss.teacher_grad=0.1"),),
    "joint 0.1 teacher 0.3": (joint(0.1, "loss.teacher_grad=0.3"),),
    "joint 0.1 teacher 1": (joint(0.1, "loss.teacher_grad=1"),),
}
START = ("drafter.base_grad_scale=1", "optim.clip=joint")  # of the training on docstrings
COMMON = ("optim.lr=4e-3", "optim.drafter_lr=8e-3", "eval.batches=1")  # of every stage on code; an arm's come after
CODE_CHARS = 300  # of a function: most then fit in a row
FAMILIES = ("stale", "sequential", "joint", "teacher", "then")  # of arms: the plot's colours; the last that fits


def functions(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (question with the head, body) of the short functions under ``root`` that have no docstring."""
    for module, text, tree in modules(root):
        lines = text.splitlines()
        for name, node in documented(tree, module):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not ast.get_docstring(node):
                split = node.body[0].lineno - 1
                head, body = lines[node.lineno - 1 : split], lines[split : node.end_lineno]
                head, body = (textwrap.dedent("\n".join(part)) for part in (head, body))
                if head and len(head) + len(body) <= CODE_CHARS:
                    yield f"Go on with `{name}`:\n{head}", body


class Seed:
    """All runs of a seed, in a folder of its own."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed, self.folder = options, seed, options.work_dir / f"seed_{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pair = starter_pair(self.folder / "pair", seed)
        overrides = [f"seed={seed}", f"max_steps={options.start_steps}", *START]
        self.start = train(self.folder / "start", self.pair, *overrides, timeout=options.timeout) / "export"
        self.code = options.work_dir / "code"
        if not (self.code / "val.jsonl").exists():
            self.code.mkdir(exist_ok=True)
            learned, held_out = chats(functions(Path(sysconfig.get_paths()["stdlib"])))
            write_jsonl(self.code / "train.jsonl", learned)
            write_jsonl(self.code / "val.jsonl", held_out)  # last: with it there are both

    @property
    def reference(self) -> Path:
        """The base that was fine-tuned without a drafter."""
        return self.run((BASE_ONLY,))[0]

    def settings(self, stage: Stage, steps: int, base: Path, drafter: Path) -> list[str]:
        """The overrides of a stage's run."""
        learned = self.code / "train.jsonl"
        if stage.own_text:
            learned = self.own_text(base)
        data = [f"data.train=[{{path: {learned}, name: code}}]"]
        data += [f"data.val=[{{path: {self.code / 'val.jsonl'}, name: code}}]"]
        models = [f"model.base={base}", f"model.drafter={drafter}", f"seed={self.seed}", f"max_steps={steps}"]
        return [*models, *data, *COMMON, *self.options.set, *stage.overrides]

    def run(self, stages: Sequence[Stage]) -> tuple[Path, Path, dict[str, Any]]:
        """Base, drafter, and the cost of the arm with these stages; its runs are made where they aren't there."""
        base, drafter = self.start / "base", self.start / "drafter"
        cost: dict[str, Any] = {"flops": 0.0, "base_steps": 0, "drafter_steps": 0, "own_texts": 0}
        done: list[str] = []
        for stage in stages:
            per_step = self.flops_per_step(stage)
            steps = self.steps(stage, cost["flops"], per_step)
            settings = self.settings(stage, steps, base, drafter)
            own = ["own"] if stage.own_text else []
            done.append(" ".join([*stage.overrides, *own, str(steps)]))
            folder = self.folder / "runs" / re.sub(r"[^\w.]+", "_", "+".join(done))
            if stage.own_text:
                cost["own_texts"], flops = self.own_text_cost(base)
                cost["flops"] += flops
            export = train(folder, self.pair, *settings, timeout=self.options.timeout) / "export"
            cost["flops"] += steps * per_step
            if "freeze.base=true" not in stage.overrides:
                base = export / "base"
                cost["base_steps"] += steps
            if stage.keeps_drafter:
                drafter = export / "drafter"
                cost["drafter_steps"] += steps
        return base, drafter, cost

    def steps(self, stage: Stage, spent: float, per_step: float) -> int:
        """Optimizer steps of a stage."""
        if stage.steps == "rest":
            budget = self.options.steps * sum(map(self.flops_per_step, ARMS[REFERENCE]))
            return max(1, round((budget - spent) / per_step))
        return max(1, round(stage.steps * self.options.steps))

    def flops_per_step(self, stage: Stage) -> float:
        """FLOPs of a step as :mod:`joint_train.plan` counts them, every token a target."""
        arguments = tuple(self.options.set) + stage.overrides
        if stage.keeps_drafter:
            return planned_flops(self.pair, arguments)
        return without_drafter(self.pair, arguments)

    def own_text(self, base: Path) -> Path:
        """The training prompts, answered by the base."""
        output = self.folder / "own_text.jsonl"
        if not output.exists():
            source = f"data.train=[{{path: {self.code / 'train.jsonl'}, limit: {self.options.own_prompts}}}]"
            arguments = [str(output), "--max-new-tokens", str(self.options.max_new_tokens), "--batch-size", "100"]
            overrides = [f"model.base={base}", source, f"seed={self.seed}"]
            run_module("joint_train.data", "regenerate", *arguments, *overrides, timeout=self.options.timeout)
        return output

    def own_text_cost(self, base: Path) -> tuple[int, float]:
        """How many answers there are, and the FLOPs of the base's forward over their tokens and those of their prompts.

        Answers without an end are neither: the command leaves them out, and so says less than all was spent.
        """
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        records = [json.loads(line)["messages"] for line in self.own_text(base).read_text().splitlines()]
        tokens = sum(len(tokenizer.apply_chat_template(m, return_dict=True)["input_ids"]) for m in records)
        cfg = load(["+experiment=starter", f"pair={self.pair}"])
        forward = without_drafter(self.pair, (*self.options.set, *DRAFTER_ONLY))
        return len(records), tokens * forward / (cfg.data.max_length * cfg.data.micro_batch_size)

    def measure(self, arm: str) -> dict[str, Any]:
        """What the arm cost and reached on this seed."""
        file = self.folder / "arms" / (re.sub(r"[^\w.]+", "_", arm) + ".json")
        if not file.exists():
            print(f"seed {self.seed}: {arm}", file=sys.stderr, flush=True)
            base, drafter, cost = self.run(ARMS[arm])
            file.parent.mkdir(exist_ok=True)
            replace(file, json.dumps(cost | self.measured(base, drafter)) + "\n")
        return json.loads(file.read_text())

    @torch.no_grad()
    def measured(self, base_folder: Path, drafter_folder: Path) -> dict[str, Any]:
        """A pair on the held-out code: sums of each prompt, and how varied its base's greedy texts are."""
        base, reference = (load_base(folder) for folder in (base_folder, self.reference))
        drafter = transformers.Gemma4AssistantForCausalLM.from_pretrained(drafter_folder, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder)
        records = (self.code / "val.jsonl").read_text().splitlines()[: self.options.prompts]
        conversations = [json.loads(line)["messages"] for line in records]
        cfg = load(["+experiment=starter", f"pair={self.pair}"])
        rows, max_length = [], cfg.data.max_length
        for messages in conversations:
            encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            targets = [bool(x) for x in encoded["assistant_masks"]]
            rows.append((encoded["input_ids"][:max_length], targets[:max_length]))  # as a row of training is cut
        prompts = [chat_prompt(messages, tokenizer, "code").ids for messages in conversations]
        texts = greedy_texts(base, prompts, self.options.max_new_tokens)
        rounds = JointModel(base, drafter, drafter_num_steps=cfg.drafter.num_steps).eval()
        settled = verifications(rounds, prompts, texts)
        return {
            **compared(base, reference, rows),
            "settled": [sum(s) for s in settled],
            "verifications": [len(s) for s in settled],
            **variety(texts),
        }


@cache
def planned_flops(pair: Path, overrides: tuple[str, ...]) -> float:
    """FLOPs of a step with these overrides."""
    common = ["+experiment=starter", f"pair={pair}", "output_dir=unused"]
    return make_plan(load([*common, *COMMON, *overrides]), Machine(gpus=1), "cpu").flops


def without_drafter(pair: Path, overrides: tuple[str, ...]) -> float:
    """FLOPs of a step of the base alone: they are linear in K from K = 2 on, and here K is 0."""
    two, three = (planned_flops(pair, (*overrides, f"drafter.num_steps={k}")) for k in (2, 3))
    return 3 * two - 2 * three


def load_base(folder: Path) -> transformers.PreTrainedModel:
    """A base in float32, in eval mode."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def summary(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each arm over all seeds.

    Intervals are 95 % bootstrap intervals over prompts and seeds, paired in comparisons.
    """

    def column(arm: str, name: str) -> list[float]:
        return [value for seed in found[arm] for value in seed[name]]

    def mean(arm: str, name: str) -> float:
        return sum(seed[name] for seed in found[arm]) / len(found[arm])

    cost = mean(REFERENCE, "flops") if REFERENCE in found else None
    rows = []
    for arm, seeds in found.items():
        loss, targets, kl, entropy = (column(arm, name) for name in ("loss", "targets", "kl", "entropy"))
        settled, verified = column(arm, "settled"), column(arm, "verifications")
        row: dict[str, Any] = {
            "arm": arm,
            "seeds": len(seeds),
            "base_steps": mean(arm, "base_steps"),
            "drafter_steps": mean(arm, "drafter_steps"),
            "flops": mean(arm, "flops"),
            "flops_of_sequential": cost and mean(arm, "flops") / cost,
            "base_loss": sum(loss) / sum(targets),
            "base_loss_seeds": [sum(seed["loss"]) / sum(seed["targets"]) for seed in seeds],
            "tokens_per_forward": interval([settled, verified], lambda s, v: s / v, seed=0),
            "tokens_per_forward_seeds": [sum(seed["settled"]) / sum(seed["verifications"]) for seed in seeds],
            "kl_from_base_only": sum(kl) / sum(targets),
            "entropy": sum(entropy) / sum(targets),
            **{name: mean(arm, name) for name in ("distinct_2", "distinct_3", "repeated_4", "own_texts")},
        }
        if "stale" in found:  # its base is the one that was trained without a drafter
            row["base_loss_change"] = interval([loss, column("stale", "loss")], lambda a, b: a / b - 1, seed=0)
        if REFERENCE in found:
            columns = [settled, verified, column(REFERENCE, "settled"), column(REFERENCE, "verifications")]
            row["gain_over_sequential"] = interval(columns, lambda s, v, t, w: (s / v) / (t / w) - 1, seed=0)
        rows.append(row)
    return rows


def plot(rows: list[dict[str, Any]]) -> str:
    """SVG: tokens per base forward over the base's loss, an arm a point."""

    def draw(axes) -> None:
        drawn = set()
        for row in rows:
            arm = row["arm"]
            family = [name for name in FAMILIES if name in arm][-1]
            colour = f"C{FAMILIES.index(family)}"
            x, y = row["base_loss"], row["tokens_per_forward"]
            error = None if y["low"] is None else [[y["value"] - y["low"]], [y["high"] - y["value"]]]
            label = None if family in drawn else {"then": "joint, then drafter"}.get(family, family)
            axes.errorbar(x, y["value"], yerr=error, fmt="o", markersize=4, color=colour, linewidth=1, label=label)
            drawn.add(family)
            axes.annotate(arm, (x, y["value"]), xytext=(4, 3), textcoords="offset points", fontsize=5)

    return figure(draw, "base loss on held-out code, nats a token", "tokens per base forward")


def check_settings(options: argparse.Namespace) -> None:
    """All that is in a folder was made with the same settings.

    Raises:
        ConfigError: the folder's differ from the options.
    """
    names = ("steps", "start_steps", "prompts", "max_new_tokens", "own_prompts", "set")
    settings = {name: getattr(options, name) for name in names}
    file = options.work_dir / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise ConfigError(f"{options.work_dir} was begun with other settings: {file.read_text()}; now {settings}")
    options.work_dir.mkdir(parents=True, exist_ok=True)
    replace(file, json.dumps(settings) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.joint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work_dir", type=lambda path: Path(path).absolute(), metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="; ".join(ARMS))
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a stage on code")
    parser.add_argument("--start-steps", type=int, default=1000, help="optimizer steps on docstrings")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts; there are 200")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--own-prompts", type=int, default=3000, help="training prompts that the base answers")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every run on code")
    options = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()

    def run() -> None:
        check_settings(options)
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
        for number_of_seed in options.seeds:
            seed = Seed(options, number_of_seed)
            for arm in options.arms:
                found[arm].append(seed.measure(arm))
        rows = summary(found)
        replace(options.work_dir / "joint.svg", plot(rows))
        results.finish(results.record("joint", COLUMNS, rows), options.work_dir / "joint.json")

    return start("benchmarks.joint", run)


if __name__ == "__main__":
    sys.exit(main())
