"""``plan --suggest``: what it names fits, nothing cheaper does, and it is ordered."""

from itertools import product

import pytest
from pairs import make_pair
from test_plan import configure

from joint_train.config import with_overrides
from joint_train.plan.__main__ import main
from joint_train.plan.planner import GIB, Machine, make_plan
from joint_train.plan.suggest import suggest


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suggest") / "text"
    make_pair(folder, "text")
    return folder


def machine(peak):
    return Machine(gpus=2, gpu_memory_gb=peak / GIB, reserve=0.0)


def test_the_cheapest_comes_first(pair):
    cfg = configure(pair, **{"activation_checkpointing.base": "none", "data.micro_batch_size": 4})

    def peak(**changes):
        return make_plan(
            with_overrides(cfg, {k.replace("__", "."): v for k, v in changes.items()}), Machine(gpus=2)
        ).peak

    time = {"activation_checkpointing__base": "full", "activation_checkpointing__drafter": "full"}
    time |= {"data__micro_batch_size": 1, "optim__grad_accum": 4 * cfg.optim.grad_accum}
    by_name = {name: peak(**time, optim__name=name) for name in ("adamw", "adamw_bf16", "adamw_8bit")}
    assert by_name["adamw"] > by_name["adamw_bf16"] > by_name["adamw_8bit"]

    assert [one.changes for one in suggest(cfg, machine(peak()))] == [{}]  # it fits as it is

    first = suggest(cfg, machine(by_name["adamw"]))[0]  # time alone, with no change of the training
    assert set(first.changes) <= {key.replace("__", ".") for key in time} and first.plan.peak <= by_name["adamw"]
    for key in first.changes:  # nothing that isn't needed; rows and grad_accum go together
        if key.startswith("activation"):
            fewer = {k.replace(".", "__"): v for k, v in first.changes.items() if k != key}
            assert peak(**fewer) > by_name["adamw"]

    for name, fewer_names in (("adamw_bf16", ["adamw"]), ("adamw_8bit", ["adamw", "adamw_bf16"])):
        found = suggest(cfg, machine(by_name[name]))
        assert found[0].changes["optim.name"] == name
        assert not {"precision.params", "freeze.base", "data.max_length"} & set(found[0].changes)
        assert all(one.plan.peak <= by_name[name] for one in found)
        assert all(peak(**time, optim__name=other) > by_name[name] for other in fewer_names)
        for one, other in product(found, found):  # each is a way of its own
            own = {k: v for k, v in one.changes.items() if k.replace(".", "__") not in time}
            assert one is other or not own.items() <= other.changes.items()
    assert suggest(cfg, machine(1)) == []


def test_the_command(pair, capsys):
    folders = [f"model.base={pair}/base", f"model.drafter={pair}/drafter", "data.max_length=64", "--suggest"]
    assert main(folders) == 0
    assert "1. " in capsys.readouterr().out
    assert main([*folders, "--gpu-memory-gb", "0.0001"]) == 3
    assert "Nothing that is known here fits" in capsys.readouterr().out
