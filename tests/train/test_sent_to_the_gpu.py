"""What a step copies to a GPU comes from pinned memory, and the chunks of its loss don't follow the allocator."""

from types import SimpleNamespace

import pytest
import torch

from joint_train.distributed.rows import even_lookup
from joint_train.pair.loss import compiles, run_budget_mb
from joint_train.pair.targets import sum_weights
from joint_train.train.trainer import Trainer

GPU = torch.device("cuda", 0)


@pytest.fixture
def copies(monkeypatch):
    """Copies to a GPU that isn't there: (bytes, whether from pinned memory)."""
    made, pinned, to = [], set(), torch.Tensor.to

    def pin(tensor):
        pinned.add(tensor.data_ptr())
        return tensor

    def send(tensor, *args, **kwargs):
        device = args[0] if args else kwargs.get("device")
        if str(device).startswith("cuda"):
            assert kwargs.get("non_blocking")
            made.append((tensor.nbytes, tensor.data_ptr() in pinned))
            return tensor
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", send)
    return made


def test_a_batch_is_sent_from_pinned_memory(copies):
    drafter = SimpleNamespace(num_steps=2, pairing="serving", prompt_rows=None)
    trainer = SimpleNamespace(cfg=SimpleNamespace(drafter=drafter), device=GPU, model=SimpleNamespace(base=None))
    ids = torch.arange(24).view(2, 12)
    batch = {"input_ids": ids, "labels": ids, "position_ids": ids, "source": ids % 2}
    batch["document_ids"] = torch.ones_like(ids) + (ids % 12 > 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("joint_train.train.trainer.parallelize.look_up", lambda model, ids, device: {})
        inputs, targets, counts = Trainer.prepare(trainer, batch, ["one", "two"])
    assert {"input_ids", "document_ids", "position_ids", "groups", "num_groups"} == inputs.keys()
    assert len(copies) == 4 + 4  # the inputs, and the targets' tensors
    assert all(pinned for _, pinned in copies), copies


def test_so_are_the_ids_of_the_row_sharded_table_and_the_weights_of_the_loss(copies):
    even_lookup(6, 2, "cpu").to(GPU)
    weights = sum_weights(torch.tensor([3, 2, 2]), [1.0, 0.5], 0.1)
    assert weights.tolist() == pytest.approx([1 / 3, 0.1 / 2, 0.05 / 2])
    assert len(copies) == 2 and all(pinned for _, pinned in copies), copies


def test_the_budget_of_a_run_is_that_of_its_plan():
    unset, given = SimpleNamespace(memory_budget_mb=None), SimpleNamespace(memory_budget_mb=77)
    assert run_budget_mb(given, "cuda", 80e9) == 77 and run_budget_mb(unset, "cpu", 80e9) == 384
    for gib, expected in ((-3, 1024), (4, 1024), (16, 2048), (60, 4096)):
        assert run_budget_mb(unset, "cuda", gib * 2**30) == expected


def test_auto_compiles_the_loss_on_a_gpu_with_triton(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr("joint_train.pair.loss.has_triton", lambda there=there: there)
        assert compiles(SimpleNamespace(compile="auto"), "cuda") is there
        assert not compiles(SimpleNamespace(compile="auto"), "cpu")
    assert compiles(SimpleNamespace(compile=True), "cpu") and not compiles(SimpleNamespace(compile=False), "cuda")
