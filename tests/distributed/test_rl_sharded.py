"""The drafter beside a sharded policy: from the policy's own states, losses, gradients and the step are those of one
process, which are the joint forward's; the policy's own gradient and weights stay as they were."""

import pytest
import torch
from configs import compose
from pairs import build_pair
from ranks import run_ranks
from torch import Tensor

from joint_train.distributed.mesh import data_rank, init_mesh
from joint_train.distributed.parallelize import parallelize, prepare, share_streams
from joint_train.pair.targets import joint_targets
from joint_train.weights.composite import Gemma4WithDrafter

K, ROWS, LENGTH = 3, 4, 16


def batch() -> dict[str, Tensor]:
    """Rollouts of different lengths, one of them without a token of the policy's, with weights of their tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 240, (ROWS, LENGTH), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(ROWS):
        labels[row, : 3 + 2 * row] = -100
        mask[row, LENGTH - row :] = 0
    labels[2], labels[mask == 0] = -100, -100
    weights = 2 * torch.rand(ROWS, LENGTH, generator=generator)
    weights[0, 9:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "token_weights": weights}


def build(shape: str, cfg) -> Gemma4WithDrafter:
    model = Gemma4WithDrafter(
        *build_pair(shape), drafter_num_steps=K, base_grad_scale=0, drafter_loss_weight=0.7, loss=cfg.loss
    )
    prepare(model, cfg)
    return model.train()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def named(model, of) -> dict[str, Tensor]:
    return {name: full(of(p)).clone() for name, p in model.named_parameters() if of(p) is not None}


def steps(model, rows: dict[str, Tensor], joint: bool = False) -> dict:
    """Two steps of the drafter on rollouts ``[B, S]``, each after a policy gradient that makes no step."""
    whole = batch()
    mass = joint_targets(whole["labels"], whole["attention_mask"], K, "serving", None, whole["token_weights"]).mass
    weights = model.loss_weights(mass)
    policy_optimizer = torch.optim.SGD(model.base.parameters(), lr=1)
    optimizer = torch.optim.SGD([p for p in model.drafter.parameters() if p.requires_grad], lr=0.3)
    losses = []
    for _ in range(2):
        forward = model.base(
            input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False,
            output_hidden_states=True, return_shared_kv_states=True,
        )  # fmt: skip
        policy_optimizer.zero_grad()
        labels = rows["labels"][:, 1:]
        log_p = forward.logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        (log_p * (labels != -100)).sum().backward()
        policy = named(model.base, lambda p: p.grad)
        states = {"hidden_states": forward.hidden_states[-1], "shared_kv_states": forward.shared_kv_states}
        optimizer.zero_grad()
        if joint:  # with the base's own loss left out
            states, weights[0] = {}, 0
        out = model(**rows, weights=weights, **states)
        out.loss.backward()
        grads = named(model.drafter, lambda p: p.grad)
        losses.append(out.loss.detach().clone())
        after = named(model.base, lambda p: p.grad)
        optimizer.step()
    weights_now = named(model, lambda p: p)
    return {"loss": losses, "grads": grads, "policy": policy, "after": after, "weights": weights_now}


def sharded_steps(rank: int, shape: str, options: dict) -> dict:
    cfg = compose(options)
    mesh = init_mesh(cfg.parallel)
    model = build(shape, cfg)
    parallelize(model, mesh, cfg)
    share_streams(model)
    index, size = data_rank(mesh)
    return steps(model, {name: x.chunk(size)[index] for name, x in batch().items()})


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name


@pytest.mark.parametrize("shape", ["e2b", "31b"])
def test_the_drafters_step_beside_a_sharded_policy_is_that_of_one_process_and_of_the_joint_forward(shape):
    options = {"drafter.num_steps": K, "loss.drafter": {"ce": 0.5, "kl": 0.5}}
    ranks = run_ranks(sharded_steps, 2, shape, options)
    cfg = compose(options)
    before = named(build(shape, cfg), lambda p: p)
    one, joint = steps(build(shape, cfg), batch()), steps(build(shape, cfg), batch(), joint=True)
    for step in range(2):
        assert sum(r["loss"][step] for r in ranks).item() == pytest.approx(one["loss"][step].item(), rel=1e-4)
        assert one["loss"][step].item() == pytest.approx(joint["loss"][step].item(), rel=1e-4)
    assert one["loss"][1] < one["loss"][0]
    assert_same(one["grads"], joint["grads"])
    for found in (one, *ranks):
        assert_same(found["grads"], one["grads"])
        assert_same(found["policy"], one["policy"])
        assert_same(found["after"], found["policy"])  # the drafter's loss adds nothing to it
        assert_same(found["weights"], one["weights"])
        moved = {name for name, value in found["weights"].items() if not torch.equal(value, before[name])}
        assert moved == {f"drafter.{name}" for name in one["grads"]}
