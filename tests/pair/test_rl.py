"""The drafter beside a policy: from the policy's own hidden states and keys, what the joint forward computes."""

import re
from pathlib import Path

import pytest
import torch
from pairs import build_pair, make_pair

import joint_train
from joint_train import Gemma4WithDrafter
from joint_train.pair.targets import joint_targets

K = 3
DOC = Path(joint_train.__file__).parent.parent / "docs/rl.md"


def batch(rows: int = 2, length: int = 20) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 240, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :6] = -100
    mask = torch.ones_like(ids)
    mask[1:, -4:], labels[1:, -4:] = 0, -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def policy_forward(model, rows: dict):
    return model.base(
        input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False,
        output_hidden_states=True, return_shared_kv_states=True,
    )  # fmt: skip


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.drafter.named_parameters() if p.grad is not None}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-9, name


@pytest.mark.parametrize("shape", ["e2b", "31b"])
@pytest.mark.parametrize("rope_position", ["last_kv", "next_token"])
def test_given_the_policys_states_the_drafter_gets_the_joint_forwards_gradients_and_the_policy_none(
    shape, rope_position
):
    model = Gemma4WithDrafter(
        *build_pair(shape), drafter_num_steps=K, base_grad_scale=0, rope_position=rope_position, drafter_loss_weight=0.7
    ).train()
    rows = batch()
    joint = model(**rows)
    joint.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.base_grad_scale = 1.0  # of no account: what is given has no graph

    ran = []
    forward = policy_forward(model, rows)
    hook = model.base.model.register_forward_hook(lambda *args: ran.append(1))
    states = {"hidden_states": forward.hidden_states[-1], "shared_kv_states": forward.shared_kv_states}
    out = model(**rows, **states)
    out.loss.backward()
    hook.remove()
    assert not ran  # no second forward of the base
    assert all(p.grad is None for p in model.base.parameters())
    assert_same(gradients(model), expected)
    of_base = joint.stats.loss[0] / joint.stats.count[0]
    assert out.loss.item() == pytest.approx((joint.loss - of_base).item(), rel=1e-5)
    for name, value in joint.stats.means().items():
        assert out.stats.means()[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name
    with torch.no_grad():
        whole = model(rows["input_ids"], attention_mask=rows["attention_mask"])
        given = model(rows["input_ids"], attention_mask=rows["attention_mask"], **states)
    valid = rows["attention_mask"].bool()
    assert torch.allclose(given.logits[valid], whole.logits[valid], atol=1e-4)
    for one, other in zip(given.drafter_logits, whole.drafter_logits, strict=True):
        assert torch.allclose(one[valid], other[valid], atol=1e-4)


@pytest.mark.parametrize("shape", ["e2b", "31b"])
def test_token_weights_weigh_each_targets_loss(shape):
    """Against the losses of each target alone: the loss and its gradient are their weighted means."""
    model = Gemma4WithDrafter(*build_pair(shape), drafter_num_steps=2).train()
    rows = batch(1, 12)
    weights = torch.rand(1, 12, generator=torch.Generator().manual_seed(1)) * 2
    weights[0, 8] = 0
    out = model(**rows, token_weights=weights)
    out.loss.backward()
    found = gradients(model)
    targets = joint_targets(rows["labels"], rows["attention_mask"], 2, "serving")
    columns = [[], [], []]  # (weight, loss, gradient) of each target, of the base and of each round
    for i in range(len(targets.rows)):
        position = int(targets.rows[i]) + 1
        for k in range(3):
            if not targets.valid[i, k]:
                continue
            alone = joint_targets(rows["labels"], rows["attention_mask"], 2, "serving")
            alone.valid = torch.zeros_like(alone.valid)
            alone.valid[i, [0, k]] = True  # the base's row is the teacher
            model.zero_grad()
            only = torch.eye(3)[k]
            one = model(rows["input_ids"], attention_mask=rows["attention_mask"], targets=alone, weights=only)
            one.loss.backward()
            columns[k].append((weights[0, position], one.loss.detach(), gradients(model)))
    loss, expected = 0.0, {}
    for column in columns:
        mass = sum(weight for weight, _, _ in column)
        loss += sum(weight * value for weight, value, _ in column) / mass
        for weight, _, grads in column:
            for name, grad in grads.items():
                expected[name] = expected.get(name, 0) + weight / mass * grad
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for name in found:
        assert (found[name] - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-8, name
    assert out.stats.count.tolist() == targets.counts.tolist()  # measures count targets


def test_the_pages_code_runs_and_steps_the_drafter_alone(tmp_path):
    base, drafter = make_pair(tmp_path, "e2b")
    rollout = batch() | {"token_weights": torch.ones(2, 20)}
    rollout["token_weights"][0, 10:] = 0
    namespace = {
        "torch": torch,
        "base": base,
        "drafter": drafter,
        "rollouts": [(rollout, torch.tensor([1.0, -0.5]))] * 2,
    }
    code = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert len(code) == 2
    for block in code:
        exec(block, namespace)
    pair, step = namespace["pair"], namespace["drafter_step"]
    before = {name: p.detach().clone() for name, p in pair.named_parameters()}
    with torch.no_grad():
        forward = policy_forward(pair, rollout)
    losses = [step(pair, namespace["drafter_optimizer"], rollout, forward).loss.item() for _ in range(8)]
    assert losses[-1] < losses[0]
    moved = {name.partition(".")[0] for name, p in pair.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"drafter"}


def test_states_of_half_a_forward_are_refused():
    model = Gemma4WithDrafter(*build_pair("31b"), drafter_num_steps=1)
    rows = batch()
    forward = policy_forward(model, rows)
    hidden, shared = forward.hidden_states[-1], forward.shared_kv_states
    with pytest.raises(ValueError, match="give both"):
        model(**rows, hidden_states=hidden)
    with pytest.raises(ValueError, match="pixel_values: the base doesn't run"):
        model(**rows, hidden_states=hidden, shared_kv_states=shared, pixel_values=torch.zeros(1))
    with pytest.raises(ValueError, match="token_weights are of the labels"):
        model(rows["input_ids"], token_weights=torch.ones(2, 20))
    with pytest.raises(ValueError, match=r"token_weights is \(2, 3\)"):
        model(**rows, token_weights=torch.ones(2, 3))
