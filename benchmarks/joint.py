"""What joint training is worth, against training the base first and then its drafter, at equal cost.

    python -m benchmarks.joint DIR --ratio-of gemma4_31b           # five start pairs, the recipes of the table below
    python -m benchmarks.joint DIR --ratio-of toy --arms sequential "joint 0" --starts 0 1
    python -m benchmarks.joint DIR --ratio-of gemma4_e4b --setting continual

A start pair is a starter pair of other random weights that was trained on docstrings. Then its domain shifts, to code
of Python's standard library. Settings: ``shift``; ``mild``, a quarter of the steps; ``continual``, three shifts one
after the other (code, then lists of methods, then the language reference), with a release after each.

A step of training costs what ``--ratio-of`` says: the FLOPs of that pair's steps as joint_train.plan counts them, with
as many supervised targets as the data has. What training jointly saves, the recipes spend on steps of the drafter
alone (freeze.base_after), so that they cost what "sequential" does.

Each exported pair is measured on held-out prompts: its base's loss; the expected length, 1 + the expected number of
accepted drafts when drafts are sampled, teacher forced on the held-out answers; and the tokens per base forward of
its greedy texts, as engines serve it. Intervals are 95 % bootstrap intervals, hierarchical: over start pairs, over the
data orders of each, and over prompts. Whatever is finished in DIR isn't run again, so an interrupted command goes on
where it was.

DIR gets joint.json and joint.svg.
"""

import argparse
import ast
import json
import re
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import results
from benchmarks.greedy import compared, expected_lengths, greedy_texts, variety, verifications
from benchmarks.runs import starter_pair, train
from joint_train.command import start
from joint_train.config import Config, load
from joint_train.errors import ConfigError
from joint_train.evaluate.page import figure
from joint_train.evaluate.prompts import chat_prompt
from joint_train.files import replace
from joint_train.pair.model import JointModel
from joint_train.plan.planner import Machine, make_plan
from joint_train.starter import chats, documented, modules, write_jsonl

COLUMNS = {
    "arm": ("arm", ""),
    "release": ("release", ""),
    "cost": ("cost", ".2f"),
    "base_loss": ("base loss", ".4f"),
    "base_loss_change": ("against base-only", "+.2%"),
    "expected_length": ("expected length, sampled", ".3f"),
    "gain": ("against sequential", "+.1%"),
    "tokens_per_forward": ("tokens per base forward, greedy", ".2f"),
    "gain_decoded": ("of it against sequential", "+.1%"),
    "kl_from_base_only": ("KL from base-only", ".3f"),
    "distinct_2": ("distinct 2-grams", ".3f"),
    "repeated_4": ("repeated 4-grams", ".3f"),
}


@dataclass(frozen=True)
class Arm:
    """How the pair is trained in a domain.

    Attributes:
        kind: ``stale``: the base only; ``sequential``: the base, then the drafter on it; ``joint``: both.
        overrides: of the configuration.
        alone: after the joint steps, train the drafter alone in as many steps as make the cost that of sequential.
    """

    kind: str
    overrides: tuple[str, ...] = ()
    alone: bool = True


def joint(scale: float, *more: str, alone: bool = True) -> Arm:
    return Arm("joint", (f"drafter.base_grad_scale={scale}", *more), alone)


REFERENCE = "sequential"  # the arm whose cost and lengths the others are compared with
# With base_grad_scale=0 and a clip of its own, the base is bit for bit what it would be without a drafter: this arm's
# base is that of stale and sequential as well.
BASE_ONLY = joint(0)
ARMS: dict[str, Arm] = {
    "stale": Arm("stale"),
    "sequential": Arm("sequential"),
    "joint 0": BASE_ONLY,
    "joint 0.1": joint(0.1),
    "joint 0.1 teacher 0.02": joint(0.1, "loss.teacher_grad=0.02"),
    "joint 0.1 teacher 0.02, average": joint(0.1, "loss.teacher_grad=0.02", "optim.drafter_ema=0.98"),
    "joint 0.1 teacher 0.1": joint(0.1, "loss.teacher_grad=0.1"),
    "joint 0.1 teacher 0.3": joint(0.1, "loss.teacher_grad=0.3"),
    "joint 0.3": joint(0.3),
    "joint 1": joint(1),
    "joint 0, later rounds count less": joint(0, "loss.round_weights={decay: 0.8}"),
    "joint 0, no steps alone": joint(0, alone=False),
    "joint 0, no steps alone, one schedule": joint(
        0, "optim.drafter_schedule=null", "optim.drafter_min_lr_ratio=null", alone=False
    ),
}
FIRST = ("stale", "sequential", "joint 0", "joint 0.1", "joint 0.1 teacher 0.02")  # of the table, by default
START = ("drafter.base_grad_scale=1", "optim.clip=joint")  # of the training on docstrings
# By default the drafter's rate stays at its peak until the last fifth of its steps, and then goes to 0. Where it is
# trained on the frozen base alone, it has the same schedule: among those tried none was better for it.
COMMON = ("optim.lr=4e-3", "optim.drafter_lr=8e-3", "eval.batches=1", "optim.clip=separate")
SETTINGS = {"shift": (1.0, 1), "mild": (0.25, 1), "continual": (1.0, 3)}  # steps in units of --steps, releases
CHARS = 300  # of an answer with its question, about: most then fit in a row
FAMILIES = (
    "stale",
    "sequential",
    "joint",
    "teacher",
    "no steps alone",
)  # of arms: the plot's colours; the last that fits
RESAMPLES = 2000


# Data: three domains of Python's standard library


def functions(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (question with the head, body) of the short functions under ``root`` that have no docstring."""
    for module, text, tree in modules(root):
        lines = text.splitlines()
        for name, node in documented(tree, module):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not ast.get_docstring(node):
                split = node.body[0].lineno - 1
                head, body = lines[node.lineno - 1 : split], lines[split : node.end_lineno]
                head, body = (textwrap.dedent("\n".join(part)) for part in (head, body))
                if head and len(head) + len(body) <= CHARS:
                    yield f"Go on with `{name}`:\n{head}", body


def methods(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (question, list) of the methods of classes under ``root``, as many as fit."""
    for module, _, tree in modules(root):
        for name, node in documented(tree, module):
            if isinstance(node, ast.ClassDef):
                heads = [
                    f"- {part.name}({ast.unparse(part.args)})"
                    for part in node.body
                    if isinstance(part, ast.FunctionDef)
                ]
                answer = "\n".join(heads)[:CHARS].rpartition("\n")[0] or (heads[0] if heads else "")
                if len(heads) > 1 and len(answer) <= CHARS:
                    yield f"Which methods has `{name}`?", answer


def reference(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (beginning, rest) of the paragraphs of the language reference that ``help()`` shows."""
    from pydoc_data.topics import topics

    for topic, text in topics.items():
        for paragraph in text.split("\n\n"):
            words = paragraph.split()
            if len(words) >= 16 and len(paragraph) <= 2 * CHARS:
                yield f"Explain `{topic}`, going on from: {' '.join(words[:8])}", " ".join(words[8:])


DOMAINS = (functions, methods, reference)


def domain_data(folder: Path, release: int) -> Path:
    """A folder with ``train.jsonl`` and ``val.jsonl`` of a release's domain, the same on every call."""
    out = folder / DOMAINS[release].__name__
    if not (out / "val.jsonl").exists():
        out.mkdir(parents=True, exist_ok=True)
        learned, held_out = chats(DOMAINS[release](Path(sysconfig.get_paths()["stdlib"])))
        write_jsonl(out / "train.jsonl", learned)
        write_jsonl(out / "val.jsonl", held_out)  # last: with it there are both
    return out


def conversations(file: Path, most: int) -> list[list[dict[str, Any]]]:
    return [json.loads(line)["messages"] for line in file.read_text().splitlines()[:most]]


def rows_of(tokenizer, messages: list[list[dict[str, Any]]], max_length: int) -> list[tuple[list[int], list[bool]]]:
    """(tokens, which of them are targets), as a row of training is cut."""
    rows = []
    for conversation in messages:
        encoded = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        targets = [bool(x) for x in encoded["assistant_masks"]]
        rows.append((encoded["input_ids"][:max_length], targets[:max_length]))
    return rows


# Costs


@dataclass(frozen=True)
class Costs:
    """FLOPs of a step: of the base alone, of the drafter on a frozen base, and of both together."""

    base: float
    drafter: float
    joint: float

    def of(self, both: float, base: float, drafter: float) -> float:
        """Of so many steps, in units of a step of the base and one of the drafter."""
        return (both * self.joint + base * self.base + drafter * self.drafter) / (self.base + self.drafter)

    def steps_alone(self, steps: int) -> int:
        """Steps of the drafter alone that make so many joint ones as expensive as training one after the other."""
        return max(0, round(steps * (self.base + self.drafter - self.joint) / self.drafter))


def costs(ratio_of: str, pair: Path, targets: float) -> Costs:
    """The costs of a released pair's steps, or with ``toy`` of the starter pair's.

    Args:
        targets: share of the tokens that are supervised.
    """
    if ratio_of == "toy":
        overrides, machine, device = ["+experiment=starter", f"pair={pair}"], Machine(gpus=1), "cpu"
    else:  # recomputed in full, as it has to be on few GPUs
        recomputed = ["activation_checkpointing.base=full", "activation_checkpointing.drafter=none"]
        overrides, machine, device = (
            [f"model={ratio_of}", "data.train=[{path: unused}]", *recomputed],
            Machine(),
            "cuda",
        )

    def flops(*more: str) -> float:
        return make_plan(load([*overrides, *more]), machine, device, targets=targets).flops

    # Joint FLOPs are linear in K from K = 2 on, and of the base alone K is 0.
    two, three = (flops("drafter.base_grad_scale=0", f"drafter.num_steps={k}") for k in (2, 3))
    return Costs(3 * two - 2 * three, flops("freeze.base=true"), flops())


# Runs


class Start:
    """All runs from one start pair with one order of the data.

    Args:
        start, order: numbers: another pair of random weights, and other data orders of the runs on it.
    """

    def __init__(self, options: argparse.Namespace, start: int, order: int) -> None:
        self.options, self.seed = options, start + 100 * order
        self.folder = options.work_dir / f"start_{start}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pair = starter_pair(self.folder / "pair", start)
        overrides = [f"seed={start}", f"max_steps={options.start_steps}", *START]
        self.start = train(self.folder / "start", self.pair, *overrides, timeout=options.timeout) / "export"
        self.folder /= f"order_{order}"
        self.data = options.work_dir / "data"
        share, self.releases = SETTINGS[options.setting]
        self.steps = max(1, round(share * options.steps))

    @cached_property
    def config(self) -> Config:
        return load(["+experiment=starter", f"pair={self.pair}"])

    @cached_property
    def costs(self) -> Costs:
        """The same for all, so counted once."""
        file = self.options.work_dir / f"costs_{self.options.ratio_of}.json"
        if not file.exists():
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.start / "base")
            messages = conversations(domain_data(self.data, 0) / "train.jsonl", 1000)
            rows = rows_of(tokenizer, messages, self.config.data.max_length)
            share = sum(sum(targets) for _, targets in rows) / sum(len(tokens) for tokens, _ in rows)
            found = costs(self.options.ratio_of, self.pair, share)
            replace(file, json.dumps(asdict(found) | {"targets": share}) + "\n")
        read = json.loads(file.read_text())
        return Costs(read["base"], read["drafter"], read["joint"])

    def train(self, release: int, steps: int, models: tuple[Path, Path], name: str, *overrides: str) -> Path:
        """A run in a release's domain, from these models; the folder of its export."""
        data = domain_data(self.data, release)
        settings = [f"model.base={models[0]}", f"model.drafter={models[1]}", f"seed={self.seed}", f"max_steps={steps}"]
        settings += [f"data.train=[{{path: {data}/train.jsonl, name: domain}}]"]
        settings += [f"data.val=[{{path: {data}/val.jsonl, name: domain}}]"]
        folder = self.folder / "runs" / re.sub(r"[^\w.]+", "_", f"{name}_{release}_{steps}")
        timeout = self.options.timeout
        return train(folder, self.pair, *settings, *COMMON, *self.options.set, *overrides, timeout=timeout) / "export"

    def run(self, arm: Arm) -> list[tuple[Path, Path, float]]:
        """After each release: base, drafter, and what all of it has cost; runs are made where they aren't there."""
        base, drafter, cost, found = self.start / "base", self.start / "drafter", 0.0, []
        for release in range(self.releases):
            if arm.kind == "joint":
                alone = self.costs.steps_alone(self.steps) if arm.alone else 0
                after = [f"freeze.base_after={self.steps}"] if alone else []
                name = " ".join(arm.overrides)
                out = self.train(release, self.steps + alone, (base, drafter), name, *arm.overrides, *after)
                base, drafter = out / "base", out / "drafter"
                cost += self.costs.of(self.steps, 0, alone) / self.steps
            else:
                base = self.run(BASE_ONLY)[release][0]
                cost += self.costs.of(0, 1, arm.kind == "sequential")
                if arm.kind == "sequential":
                    name, overrides = " ".join(["alone", *arm.overrides]), ("freeze.base=true", *arm.overrides)
                    drafter = self.train(release, self.steps, (base, drafter), name, *overrides) / "drafter"
            found.append((base, drafter, cost / (release + 1)))
        return found

    def measure(self, arm: str) -> list[dict[str, Any]]:
        """What the arm cost and reached with each release."""
        file = self.folder / "arms" / (re.sub(r"[^\w.]+", "_", arm) + ".json")
        if not file.exists():
            print(f"{self.folder}: {arm}", file=sys.stderr, flush=True)
            references = [base for base, _, _ in self.run(BASE_ONLY)]
            found = [
                {"cost": cost} | self.measured(release, base, drafter, references[release])
                for release, (base, drafter, cost) in enumerate(self.run(ARMS[arm]))
            ]
            file.parent.mkdir(exist_ok=True)
            replace(file, json.dumps(found) + "\n")
        return json.loads(file.read_text())

    @torch.no_grad()
    def measured(self, release: int, base_folder: Path, drafter_folder: Path, reference: Path) -> dict[str, Any]:
        """A pair on held-out prompts of a release's domain: sums of each prompt, and how varied its texts are."""
        base, base_only = (load_base(folder) for folder in (base_folder, reference))
        drafter = transformers.Gemma4AssistantForCausalLM.from_pretrained(drafter_folder, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder)
        messages = conversations(domain_data(self.data, release) / "val.jsonl", self.options.prompts)
        rows = rows_of(tokenizer, messages, self.config.data.max_length)
        pair = JointModel(base, drafter, drafter_num_steps=self.config.drafter.num_steps).eval()
        decoded = messages[: self.options.decoded]
        prompts = [chat_prompt(conversation, tokenizer, "held out").ids for conversation in decoded]
        texts = greedy_texts(base, prompts, self.options.max_new_tokens)
        settled = verifications(pair, prompts, texts)
        return {
            **compared(base, base_only, rows),
            **expected_lengths(pair, rows),
            "settled": [sum(s) for s in settled],
            "verifications": [len(s) for s in settled],
            **variety(texts),
        }


def load_base(folder: Path) -> transformers.PreTrainedModel:
    """A base in float32, in eval mode."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# Summary


def hierarchical(values: Sequence[Sequence[Sequence[Sequence[float]]]], statistic: Callable[..., float]) -> dict:
    """A statistic of sums, and its 95 % interval over start pairs, the orders of each, and prompts.

    Start pairs are drawn with replacement, for each of them its orders, and the prompts once for all of them: every
    pair answers the same prompts.

    Args:
        values: ``[start][order][quantity][prompt]``.
        statistic: of one sum for each quantity, over all that was drawn.

    Returns:
        ``value``, ``low`` and ``high``; these are None where there is one start pair, which has no spread.
    """
    data = np.array(values, dtype=np.float64)  # [S, O, C, P]
    starts, orders, _, prompts = data.shape
    value = float(statistic(*data.sum((0, 1, 3))))
    if starts < 2:
        return {"value": value, "low": None, "high": None}
    rng, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(prompts, size=prompts), minlength=prompts)
        of_pairs = data @ times  # [S, O, C]
        drawn = rng.integers(starts, size=starts)
        sums = of_pairs[drawn[:, None], rng.integers(orders, size=(starts, orders))].sum((0, 1))
        found.append(statistic(*sums))
    low, high = np.quantile(found, (0.025, 0.975))
    return {"value": value, "low": float(low), "high": float(high)}


Measured = list[list[list[dict[str, Any]]]]  # [start][order][release]


def summary(found: dict[str, Measured]) -> list[dict[str, Any]]:
    """A row for each arm and release."""
    rows = []
    for arm, measured in found.items():
        releases = len(measured[0][0])
        for release in range(releases):

            def columns(*names: str, of: tuple[str, ...] = (arm,), release: int = release) -> list:
                starts = zip(*(found[one] for one in of), strict=True)
                return [
                    [[one[release][name] for one in orders for name in names] for orders in zip(*start, strict=True)]
                    for start in starts
                ]

            every = [order[release] for start in measured for order in start]
            lengths, decoded = ("lengths", "rows"), ("settled", "verifications")
            row: dict[str, Any] = {
                "arm": arm,
                "release": str(release + 1) if releases > 1 else None,
                "starts": len(measured),
                "orders": len(measured[0]),
                "base_loss": hierarchical(columns("loss", "targets"), lambda loss, n: loss / n)["value"],
                "expected_length": hierarchical(columns(*lengths), lambda length, n: length / n),
                "tokens_per_forward": hierarchical(columns(*decoded), lambda s, v: s / v),
                "kl_from_base_only": hierarchical(columns("kl", "targets"), lambda kl, n: kl / n)["value"],
                **{n: sum(one[n] for one in every) / len(every) for n in ("cost", "distinct_2", "repeated_4")},
            }
            if REFERENCE in found:  # whose base is the one that was trained without a drafter
                both = (arm, REFERENCE)
                row["base_loss_change"] = hierarchical(columns("loss", of=both), lambda a, b: a / b - 1)
                for name, sums in (("gain", lengths), ("gain_decoded", decoded)):
                    paired = columns(*sums, of=both)
                    row[name] = hierarchical(paired, lambda a, m, b, n: (a / m) / (b / n) - 1)
                    row[f"{name}_of_each_start"] = [
                        hierarchical([start], lambda a, m, b, n: (a / m) / (b / n) - 1)["value"] for start in paired
                    ]
            rows.append(row)
    return rows


def plot(rows: list[dict[str, Any]]) -> str:
    """SVG: expected length over the base's loss, an arm a point."""

    def draw(axes) -> None:
        drawn = set()
        for row in rows:
            arm = row["arm"]
            family = [name for name in FAMILIES if name in arm][-1]
            colour = f"C{FAMILIES.index(family)}"
            x, y = row["base_loss"], row["expected_length"]
            error = None if y["low"] is None else [[y["value"] - y["low"]], [y["high"] - y["value"]]]
            label = None if family in drawn else family
            axes.errorbar(x, y["value"], yerr=error, fmt="o", markersize=4, color=colour, linewidth=1, label=label)
            drawn.add(family)
            name = f"{arm}, release {row['release']}" if row["release"] else arm
            axes.annotate(name, (x, y["value"]), xytext=(4, 3), textcoords="offset points", fontsize=5)

    return figure(draw, "base loss on held-out text, nats a token", "expected length, sampled")


def check_settings(options: argparse.Namespace) -> None:
    """All that is in a folder was made with the same settings.

    Raises:
        ConfigError: the folder's differ from the options.
    """
    names = ("ratio_of", "setting", "steps", "start_steps", "prompts", "decoded", "max_new_tokens", "set")
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
    parser.add_argument(
        "--ratio-of", default="gemma4_31b", metavar="PAIR",
        help="whose steps say what costs the same: gemma4_31b, gemma4_e4b, another of conf/model, or toy",
    )  # fmt: skip
    parser.add_argument("--setting", choices=SETTINGS, default="shift")
    parser.add_argument("--starts", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="start pairs")
    parser.add_argument("--orders", type=int, nargs="+", default=[0], help="data orders of each")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(FIRST), metavar="ARM", help="; ".join(ARMS))
    parser.add_argument("--steps", type=int, default=300, help="steps of the base in a domain")
    parser.add_argument("--start-steps", type=int, default=1000, help="steps on docstrings")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts; there are 200")
    parser.add_argument("--decoded", type=int, default=200, help="those of them that are answered greedily as well")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every run in a domain")
    options = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()

    def run() -> None:
        check_settings(options)
        found: dict[str, Measured] = {arm: [] for arm in options.arms}
        for number in options.starts:
            starts = [Start(options, number, order) for order in options.orders]
            for arm in options.arms:
                found[arm].append([one.measure(arm) for one in starts])
        rows = summary(found)
        replace(options.work_dir / "joint.svg", plot(rows))
        details = {"ratio_of": options.ratio_of, "setting": options.setting, "costs": asdict(starts[0].costs)}
        columns = {name: of for name, of in COLUMNS.items() if any(row.get(name) is not None for row in rows)}
        results.finish(results.record("joint", columns, rows, **details), options.work_dir / "joint.json")

    return start("benchmarks.joint", run)


if __name__ == "__main__":
    sys.exit(main())
