"""The main job with two adapters on the starter pair's base: metrics by adapter, an exact resume, the export."""

import json

import torch
from adapters import make_adapter
from ranks import run_ranks
from safetensors.torch import load_file
from test_parallel import full

from joint_train.config import load
from joint_train.distributed.preemption import Preemption
from joint_train.train import trainer


def finished(rank: int, overrides: list[str]):
    """The job on one rank; the drafter's weights at its end, whole, and the adapters of its batches' documents."""
    run, found, seen = trainer.Trainer(load(overrides), Preemption(60)), {}, []
    save, prepare = run.save, run.prepare

    def kept(block):
        found.update({name: full(p.detach()).clone() for name, p in run.model.drafter.named_parameters()})
        save(block)

    def prepared(batch, sources):
        if "source" in batch:  # the base's own text has none
            pairs = torch.stack([batch["source"], batch["adapter_ids"]]).flatten(1).unique(dim=1)
            seen.append({tuple(pair) for pair in pairs.T.tolist()})
        return prepare(batch, sources)

    run.save, run.prepare = kept, prepared
    run.train()
    return found, seen


def test_a_run_with_many_adapters_is_trained_resumed_and_exported(starter_dir, tmp_path):
    out, lines = tmp_path / "run", (starter_dir / "train.jsonl").read_text().splitlines()
    for number, name in enumerate(("math", "law", "plain")):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines[20 * number : 20 * number + 20]))
    one = make_adapter(starter_dir / "base", tmp_path / "math")
    other = make_adapter(starter_dir / "base", tmp_path / "other", seed=1, r=2, target_modules=["q_proj", "up_proj"])
    source = "{{path: {}/{}.jsonl, adapter: {}}}".format
    sources = [source(tmp_path, "math", one), source(tmp_path, "law", "law"), source(tmp_path, "plain", "null")]
    overrides = [
        "+experiment=starter", f"pair={starter_dir}", f"output_dir={out}", "freeze.base=true",
        f"model.adapters=[{one}, {{path: {other}, name: law}}]", f"data.train=[{', '.join(sources)}]",
        f"data.val=[{', '.join(sources)}]", "data.max_length=160", "data.micro_batch_size=2", "data.num_workers=0",
        "optim.warmup_steps=0", "drafter.num_steps=2", "eval.prompts=3", "eval.batches=2", "eval.max_new_tokens=4",
        "tracking.wandb=disabled", "checkpoint.every=2", "checkpoint.keep_last=0", "max_steps=3",
    ]  # fmt: skip
    (whole, seen), (_, others) = run_ranks(finished, 2, overrides)
    assert set().union(*seen, *others) == {(0, 0), (1, 1), (2, -1), (-1, -1)}
    assert any(len(batch) > 2 for batch in seen)
    last = [json.loads(line) for line in (out / "metrics.jsonl").open()][-1]
    for of in ("", "val/"):
        for adapter, of_source in (("math", "math"), ("law", "law")):
            for metric in ("base_ce", "drafter_ce", "agreement", "targets"):
                assert last[f"{of}adapter/{adapter}/{metric}"] == last[f"{of}{of_source}/{metric}"]
        assert 0 < last[f"{of}plain/agreement"] < 1 and f"{of}adapter/plain/targets" not in last
    generated = [last[f"val/adapter/{name}/tokens_per_forward"] for name in ("math", "law")]
    assert all(1 <= value <= 3 for value in generated)

    again = [*overrides, f"output_dir={tmp_path / 'again'}", f"resume={out}/checkpoints/step_00000002"]
    (resumed, _), _ = run_ranks(finished, 2, again)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())

    before, after = (load_file(path / "model.safetensors") for path in (starter_dir / "base", out / "export/base"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert sorted(path.name for path in (out / "export").iterdir()) == ["base", "drafter"]
    assert (
        "one at a time on the base | `math`, a folder, `other`, a folder |"
        in (out / "export/drafter/README.md").read_text()
    )
