"""Each recipe fits as its head says, and is a file to copy."""

import re
from pathlib import Path

import pytest

from benchmarks.recipes import PAIRS, head, recipes
from joint_train.config import choices, load
from joint_train.config.help import conf_dir
from joint_train.plan.planner import make_plan

FOLDER = conf_dir() / "recipe"
WRITTEN = {recipe.name: recipe for recipe in recipes() if (FOLDER / f"{recipe.name}.yaml").exists()}
ONE_OF_EACH = {pair: next(name for name, recipe in WRITTEN.items() if recipe.pair == pair) for pair in PAIRS}


def planned(name: str) -> None:
    """The plan of a recipe is within its memory, and what the head says of it, to 5 % (or to what is shown)."""
    recipe, lines = WRITTEN[name], (FOLDER / f"{name}.yaml").read_text().splitlines()
    cfg = load([f"+recipe={name}", "data.train=unused"], recipe.gpus, min(8, recipe.gpus))
    plan = make_plan(cfg, recipe.machine)
    assert plan.peak <= recipe.machine.usable
    for line in head(recipe, plan):
        written = next(one for one in lines if one.startswith(f"# {line[:14]}"))
        numbers = [
            [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?", text)] for text in (line, written)
        ]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=0.06), f"python -m benchmarks.recipes {name}"


@pytest.mark.parametrize("name", ONE_OF_EACH.values())
def test_a_recipe_of_each_pair_is_planned_as_its_head_says(name):
    planned(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WRITTEN.keys() - set(ONE_OF_EACH.values())))
def test_every_recipe_is_planned_as_its_head_says(name):
    planned(name)


def test_no_file_is_left_over_and_every_pair_has_the_drafter_on_one_gpu():
    assert set(choices()["+recipe"]) == set(WRITTEN) and len(WRITTEN) >= 45
    assert all(f"{pair}_drafter_1gpu" in WRITTEN for pair in PAIRS)


def test_a_copy_with_data_of_its_own_is_a_configuration_file(tmp_path):
    name = "gemma4_31b_lora_8gpu"
    text = (FOLDER / f"{name}.yaml").read_text()
    copy = tmp_path / "mine.yaml"
    copy.write_text(re.sub(r"# (train: \S+)", r"\1", text))
    mine, theirs = load(["--config", str(copy)]), load([f"+recipe={name}", "data.train=train.jsonl"])
    assert Path(mine.data.train[0].path).name == "train.jsonl"
    mine.interpolations = theirs.interpolations = {}
    assert mine == theirs and mine.lora.r == 16 and mine.model.base == "google/gemma-4-31B-it"
