"""``optim.name=muon``: torch's Muon for matrices and AdamW for the rest, on any ranks; steps left out; resumes."""

import math

import pytest
import torch
from checkpoint_run import config
from pairs import build_pair
from ranks import run_ranks
from test_checkpoint import same
from test_checkpoint_resume import resume_all, save_twice
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW

from joint_train.config import validate
from joint_train.distributed.mesh import init_mesh
from joint_train.distributed.moments import moved_by_muon, state_bytes
from joint_train.distributed.parallelize import parallelize, prepare
from joint_train.errors import ConfigError
from joint_train.train.optim import build_optimizer, update
from joint_train.weights.composite import Gemma4WithDrafter

SETTINGS = {"optim.name": "muon", "optim.lr": 0.02, "optim.drafter_lr": 0.01, "optim.weight_decay": 0.1}


def build(**more):
    cfg = config(SETTINGS | more)
    model = Gemma4WithDrafter(*build_pair("e2b"), drafter_num_steps=2, loss=cfg.loss)
    prepare(model, cfg)
    return model.train(), cfg


def set_gradients(model, step: int) -> None:
    """The same on any mesh."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        if p.requires_grad:
            whole = torch.randn(p.shape, generator=generator)
            sharded = isinstance(p, DTensor)
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None) if sharded else whole


def steps(model, cfg):
    """Two steps, and between them one that isn't taken; what is there after each, whole."""
    optimizer, found = build_optimizer(model, cfg.optim), []
    for step in range(3):
        set_gradients(model, step)
        if step == 1:
            gradient = model.drafter.pre_projection.weight.grad
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient)[:1] = math.nan
        update(optimizer, model, 0.0, 1.0)
        tensors = {n: p.detach() for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            tensors |= {f"{n}/{entry}": x for entry, x in optimizer.state.get(p, {}).items()}
        found.append({n: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for n, x in tensors.items()})
    return found


def sharded_steps(rank: int, more: dict):
    model, cfg = build(**more)
    parallelize(model, init_mesh(cfg.parallel), cfg)
    return steps(model, cfg)


def test_matrices_move_by_torchs_muon_and_the_rest_by_adamw():
    model, cfg = build()
    first, skipped, second = steps(model, cfg)
    same(first, skipped)
    model, _ = build()
    references = []
    for module, lr in ((model.base, 0.02), (model.drafter, 0.01)):
        trained = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for n, p in module.named_parameters() if any(p is x for x in trained) and "embed_tokens" not in n
                    and p.ndim == 2 and "lm_head" not in n and "centroids" not in n]  # fmt: skip
        tables = [m.weight for m in module.modules() if isinstance(m, torch.nn.Embedding)]
        rest = [p for p in trained if not any(p is x for x in matrices)]
        decayed = [p for p in rest if p.ndim > 1 and not any(p is x for x in tables)]
        spared = [p for p in rest if not any(p is x for x in decayed)]
        references.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        references.append(AdamW(groups, lr=lr, betas=tuple(cfg.optim.betas), eps=cfg.optim.eps))
        assert len(matrices) > 10 and {id(p) for p in matrices} == {id(p) for p in moved_by_muon(module)}
    for step, expected in ((0, first), (2, second)):
        set_gradients(model, step)
        for optimizer in references:
            optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(expected[name], p.detach(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("ranks, more", [(2, {}), (4, {"parallel.dp_replicate": 2})], ids=["fsdp", "hsdp"])
def test_sharded_steps_are_those_of_one_process(ranks, more):
    expected = steps(*build())
    for found in run_ranks(sharded_steps, ranks, more):
        for there, here in zip(found, expected, strict=True):
            assert there.keys() == here.keys()
            for name, value in here.items():
                torch.testing.assert_close(there[name], value, rtol=1e-5, atol=1e-6, msg=name)


def batch(rank: int) -> torch.Tensor:
    return torch.randint(3, 240, (1, 24), generator=torch.Generator().manual_seed(100 + rank))


def move(rank: int | None, name: str) -> dict[str, torch.Tensor]:
    """How far one step on real gradients moves each weight: of two batches at once, or on two ranks of one each."""
    model, cfg = build(**{"optim.name": name, "optim.weight_decay": 0.0})
    if rank is not None:
        parallelize(model, init_mesh(cfg.parallel), cfg)
    before = {n: whole(p) for n, p in model.named_parameters() if p.requires_grad}
    ids = torch.cat([batch(0), batch(1)]) if rank is None else batch(rank)
    model(input_ids=ids, labels=ids).loss.backward()
    update(build_optimizer(model, cfg.optim), model, 0.0, 1.0)
    return {n: whole(p) - before[n] for n, p in model.named_parameters() if p.requires_grad}


def whole(p: torch.Tensor) -> torch.Tensor:
    p = p.detach()
    return (p.full_tensor() if isinstance(p, DTensor) else p).clone()


def test_real_gradients_of_other_ranks_move_a_matrix_nearly_alike():
    """Their sums differ in the last bits, which roundings inside the iteration amplify; docs/memory.md says so."""
    alone, (sharded, _) = move(None, "muon"), run_ranks(move, 2, "muon")
    differences = {n: ((sharded[n] - x).norm() / x.norm()).item() for n, x in alone.items() if x.norm() > 0}
    assert len(differences) > 20
    assert max(differences.values()) < 0.1
    assert max(x for n, x in differences.items() if "proj" in n) > 1e-4  # more than the last bits


def test_tables_and_heads_of_their_own_are_not_muons():
    """An untied head moves by AdamW, with decay; an image's table of positions without."""
    from joint_train.distributed.moments import weights_without_decay

    for shape in ("e2b", "multimodal"):
        base, _ = build_pair(shape)
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())  # untied
        spared, by_muon = weights_without_decay(base), {id(p) for p in moved_by_muon(base)}
        assert id(base.lm_head.weight) not in by_muon | spared
        named = base.named_parameters()
        tables = [p for n, p in named if "position_embedding_table" in n or n.endswith("embed_tokens.weight")]
        assert len(tables) == {"e2b": 1, "multimodal": 2}[shape]
        assert all(id(p) in spared and id(p) not in by_muon for p in tables)


def test_a_checkpoint_goes_on_with_other_ranks(tmp_path):
    overrides = {"optim.name": "muon"}
    _, second = run_ranks(save_twice, 2, tmp_path / "run", overrides)[0]
    assert {"momentum_buffer", "exp_avg"} <= {key.rpartition("/")[2] for key in second}
    for ranks, more in ((1, {}), (4, {"parallel.dp_replicate": 2})):
        for ((_, state, loaded, said, _),) in run_ranks(resume_all, ranks, [tmp_path / "run"], {**overrides, **more}):
            assert state == {"step": 2} and "damaged" not in said
            same(second, loaded)
    (problem, state, *_) = run_ranks(resume_all, 1, [tmp_path / "run"], {"optim.name": "adamw"})[0][0]
    assert state is None and "set optim.name" in problem


def test_a_matrix_has_one_moment_and_offload_is_refused():
    assert state_bytes("momentum", (8, 6), 48, torch.float32) == 4 * 48
    assert state_bytes("muon", (8,), 8, torch.float32) == 8 * 8
    base = {"data.train": [{"path": "unused"}], "optim.name": "muon"}
    validate(config(base))
    with pytest.raises(ConfigError, match="cpu_offload=none"):
        validate(config({**base, "parallel.cpu_offload": "all", "eval.prompts": 0}))
