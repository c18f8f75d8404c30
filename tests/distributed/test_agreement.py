"""Ranks that were not started alike, or don't see the same files, are refused before they train, on every rank."""

import hashlib
import json
import os
import shutil
import socket

import pytest
from pairs import make_pair
from ranks import run_ranks

from joint_train.errors import ConfigError

SMALL = [
    "data.max_length=48", "data.micro_batch_size=1", "data.num_workers=0", "drafter.num_steps=2", "eval.every=0",
    "eval.batches=1", "eval.prompts=0", "tracking.wandb=disabled", "max_steps=1", "model.export.at_end=false",
]  # fmt: skip


def refusal(rank, overrides_of_rank):
    """What the job says that the ranks start, each with its own command."""
    from joint_train.config import load
    from joint_train.train import trainer

    try:
        trainer.run(load(overrides_of_rank[rank]))
    except ConfigError as error:
        return str(error)


def data_alone(rank, overrides):
    from transformers import AutoTokenizer

    from joint_train.config import load
    from joint_train.data import build_loader
    from joint_train.distributed.ranks import Ranks
    from joint_train.train.agreement import agree_on_data

    cfg = load(overrides)
    loader = build_loader(cfg, AutoTokenizer.from_pretrained(cfg.model.base), "train", rank, 2)
    agree_on_data(cfg, "train", loader, Ranks(30))


def test_a_run_whose_ranks_read_other_rows_is_refused(starter_dir, tmp_path):
    """As where one node's copy of the data lacks a row: by path, and by the same path with other contents."""
    rows = (starter_dir / "train.jsonl").read_text().splitlines(keepends=True)
    for rank in range(2):
        (tmp_path / f"node{rank}.jsonl").write_text("".join(rows[: 200 - rank]))
    source = f"data.train=[{{path: '{tmp_path}/node${{oc.env:RANK}}.jsonl', name: mine}}]"
    common = ["+experiment=starter", f"pair={starter_dir}", f"output_dir={tmp_path}/run", source, *SMALL]
    first, second = (hashlib.sha256((tmp_path / f"node{rank}.jsonl").read_bytes()).hexdigest()[:8] for rank in range(2))
    for said in run_ranks(refusal, 2, [common, common]):
        assert "not started with the same data: file 0 of data.train[0] mine differs" in said
        assert f"rank 0 has {first} ({tmp_path}/node0.jsonl on " in said
        assert f"rank 1 has {second} ({tmp_path}/node1.jsonl on " in said
    assert not (tmp_path / "run/metrics.jsonl").exists()
    shutil.copy(tmp_path / "node0.jsonl", tmp_path / "node1.jsonl")  # other paths, the same contents: node-local disks
    assert run_ranks(data_alone, 2, common) == [None, None]


def test_ranks_that_were_started_with_other_commands_are_refused(starter_dir, tmp_path):
    common = ["+experiment=starter", f"pair={starter_dir}", f"output_dir={tmp_path}/run", *SMALL]
    for said in run_ranks(refusal, 2, [common, [*common, "optim.lr=3e-5", "tracking.project=hf_secret"]]):
        assert "not started with the same configuration: optim.lr differs: rank 0 has" in said
        assert "tracking.project differs" in said and "hf_secret" not in said
    assert not (tmp_path / "run").exists()


def load(rank, folders):
    from joint_train.config import load as compose
    from joint_train.distributed.mesh import init_mesh
    from joint_train.weights.composite import load_pair

    folder = folders[rank]
    cfg = compose([f"model.base={folder}/base", f"model.drafter={folder}/drafter"], check=False)
    try:
        load_pair(cfg, init_mesh(cfg.parallel), "cpu")
    except ConfigError as error:
        return str(error)


def test_other_weights_on_one_node_are_refused(tmp_path):
    make_pair(tmp_path / "a", "e2b")
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for folder in folders[1:]:
        shutil.copytree(tmp_path / "a", folder)
    assert run_ranks(load, 3, [str(folder) for folder in folders]) == [None] * 3
    weights = tmp_path / "b/drafter/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    config = json.loads((tmp_path / "c/base/config.json").read_text())
    (tmp_path / "c/base/config.json").write_text(json.dumps(config | {"made": "elsewhere"}))
    for said in run_ranks(load, 3, [str(folder) for folder in folders]):
        assert "not started with the same weights: base/config.json differs: ranks 0-1 have" in said
        assert "rank 2 has" in said and f"({tmp_path}/c/base/config.json on {os.uname().nodename})" in said
    (tmp_path / "c/base/config.json").write_text((tmp_path / "a/base/config.json").read_text())
    for said in run_ranks(load, 3, [str(folder) for folder in folders]):
        assert "drafter/model.safetensors differs: ranks 0, 2 have" in said and "rank 1 has" in said


def compare(rank):
    from joint_train.distributed.agreement import differing
    from joint_train.distributed.ranks import Ranks

    return differing(Ranks(30), "things", {"a": "same", **({"b": "there"} if rank != 1 else {})})


@pytest.mark.parametrize("world", [4])
def test_what_a_rank_lacks_is_a_difference(world):
    for found in run_ranks(compare, world):
        assert found.keys() == {"b"} and "ranks 0, 2-3 have there" in found["b"] and "rank 1 has none" in found["b"]


def sizes_of_world(rank, environment):
    """What a rank that another launcher than torchrun started joins."""
    import torch.distributed as dist

    from joint_train.distributed.mesh import init_distributed

    dist.barrier()  # the other rank is connected, too
    dist.destroy_process_group()
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    try:
        init_distributed(30)
    except ConfigError as error:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the caller leaves one
        return str(error)
    return dist.get_world_size()


def test_ranks_of_another_launcher_train_together_or_not_at_all():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert run_ranks(sizes_of_world, 2, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) == [2, 2]
    for said in run_ranks(sizes_of_world, 2, {}):
        assert "WORLD_SIZE=2 is set without MASTER_ADDR, MASTER_PORT" in said
