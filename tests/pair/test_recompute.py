"""What a backward makes again changes no gradient; attention that is kept runs once; inputs wait on the host."""

import gc
import weakref

import pytest
import torch
from omegaconf import OmegaConf
from pairs import build_pair
from torch import nn

from joint_train.config import Config
from joint_train.distributed.parallelize import recompute, text_model
from joint_train.pair import recompute as module
from joint_train.pair.fused import fuse
from joint_train.pair.recompute import HostCopies, checkpointed, run_or_replay
from joint_train.weights.composite import Gemma4WithDrafter

K = 2
WAYS = [
    {"base": "every_n", "every_n": 2, "drafter": "full"},
    {"base": "selective", "drafter": "layers"},
    {"base": "full", "drafter": "layers", "offload": True},
    {"base": "selective", "drafter": "full", "offload": True},
    {"base": "auto", "drafter": "auto"},  # nobody has planned: everything
]


@pytest.fixture
def calls(monkeypatch):
    """How often attention is computed."""
    found, attention = [], nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        found.append(torch.is_grad_enabled())
        return attention(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(module, "SMALL", 1)
    return found


def gradients(shape: str, calls: list, frozen: bool = False, **settings) -> tuple[dict, int, Gemma4WithDrafter]:
    base, drafter = build_pair(shape)
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=K).train()
    if frozen:  # but one weight, so that attention's output needs a gradient and what it meets has none
        base.requires_grad_(False)
        getattr(base.model, "language_model", base.model).layers[0].self_attn.q_proj.weight.requires_grad_(True)
    cfg = OmegaConf.structured(Config).activation_checkpointing
    for name, value in settings.items():
        cfg[name] = value
    for part in (text_model(base), drafter.model):
        fuse(part)
    recompute(model, cfg)
    ids = torch.randint(3, 240, (2, 24), generator=torch.Generator().manual_seed(0))
    calls.clear()
    for _ in range(2):  # buffers on the host are used again
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(calls) // 2, model


@pytest.mark.parametrize("shape", ["e2b", "26b_a4b", "31b"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_the_same_to_the_last_bit(shape, frozen, calls):
    expected, once, model = gradients(shape, calls, frozen, base="none", drafter="none")
    layers = len(model.base.model.language_model.layers), len(model.drafter.model.layers)
    assert once == layers[0] + K * layers[1]
    rounds = K * layers[1]
    again = {"every_n": -(-layers[0] // 2) + rounds, "selective": rounds, "full": layers[0] + rounds}
    again["auto"] = again["full"]
    for way in WAYS:
        found, computed, model = gradients(shape, calls, frozen, **way)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), (way, name)
        if not frozen:  # a layer whose inputs need no gradient has nothing to compute again
            assert computed == once + again[way["base"]], way
        if way.get("offload"):
            gc.collect()
            # Each buffer is free again, and there are no more of them than one forward fills.
            assert sum(map(len, model.host_copies.buffers.values())) >= layers[0]


def test_what_attention_keeps_is_freed_with_its_layer():
    x = torch.ones(4, 8, requires_grad=True)
    storages = []

    def layer(x):
        out = run_or_replay(lambda x: x.exp() * 2, x.sin())
        storages.append(weakref.ref(out.untyped_storage()))
        return out.cos()

    (expected,) = torch.autograd.grad(((x.sin().exp() * 2).cos()).sum(), x)
    out = checkpointed(layer, x, keep_attention=True)
    assert storages[0]() is not None
    out.sum().backward(retain_graph=True)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)
    out.sum().backward()  # a graph that is retained replays twice
    torch.testing.assert_close(x.grad, 2 * expected, rtol=0, atol=0)
    assert len(storages) == 3 and all(storage() is None for storage in storages)


def test_inputs_on_the_host_come_back_in_order_and_one_function_ahead(monkeypatch):
    """In a backward, the inputs of the function before are fetched when those of one are taken."""
    monkeypatch.setattr(module, "SMALL", 1)
    events = []

    class Recorded(HostCopies):
        def to_host(self, tensor):
            events.append(("out", round(float(tensor[0].detach()), 3)))
            return super().to_host(tensor)

        def to_device(self, buffer, device):
            events.append(("back", round(float(buffer[0]), 3)))
            return super().to_device(buffer, device)

    def function(x, y):
        events.append("run")
        return (x * y).sin() + 1, y + 10

    host = Recorded()
    x, y = torch.full((3,), 1.0, requires_grad=True), torch.full((3,), 2.0)
    a, b = x, y
    for _ in range(3):
        a, b = checkpointed(function, a, b, host=host)
    out = [value for name, value in (e for e in events if e != "run")]
    assert len(out) == 6 and events.count("run") == 3
    events.clear()
    a.sum().backward()
    expected = x.detach().clone().requires_grad_()
    z, w = expected, y
    for _ in range(3):
        z, w = (z * w).sin() + 1, w + 10
    z.sum().backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=0, atol=0)
    back = [e[1] for e in events if e != "run"]
    assert sorted(back) == sorted(out)  # each once
    runs = [i for i, e in enumerate(events) if e == "run"]
    # Before the last function runs again, its own inputs and those of the second are on their way; and so on.
    assert set(back[:4]) == set(out[2:]) and len([e for e in events[: runs[0]] if e != "run"]) == 4
    assert len([e for e in events[: runs[1]] if e != "run"]) == 6
