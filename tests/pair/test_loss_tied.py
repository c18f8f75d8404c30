"""The shared gradient of a tied embedding and head against autograd's two."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextScaledWordEmbedding

from joint_train.pair.loss import joint_loss
from joint_train.pair.targets import joint_targets
from joint_train.pair.tied import TiedGradient

V, H, S = 11, 3, 40
CONFIG = SimpleNamespace(drafter="kl", temperature=1.0, teacher_grad=True, centroid_weight=0.0, memory_budget_mb=1,
                         compile=False)  # fmt: skip


def gradients(tied, dtype=torch.float32, frozen=False):
    """Gradients of the embedding and of what lies between it and the head, and the loss."""
    torch.manual_seed(0)
    embedding = Gemma4TextScaledWordEmbedding(V, H, padding_idx=0, embed_scale=1.7).to(dtype)
    between = torch.nn.Linear(H, H).to(dtype)
    embedding.requires_grad_(not frozen)
    ids = torch.randint(V, (2, S))
    ids[0, :5] = 0
    targets = joint_targets(ids, None, 2, "serving")
    if tied:
        with tied.lookups_of(embedding):
            embedded = embedding(ids)
        assert "forward" not in vars(embedding)
    else:
        embedded = embedding(ids)
    hidden = between(embedded).tanh()
    drafted = [between(embedded.roll(-1 - k, 1)) for k in range(2)]
    weights = torch.tensor([0.5, 0.2, 0.3])
    weight = embedding.weight
    loss, _ = joint_loss(hidden, weight, drafted, weight.detach(), targets, weights, CONFIG, softcap=5.0, tied=tied)
    (2 * loss).backward()
    return embedding.weight.grad, between.weight.grad, loss.detach()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_the_sum_that_autograd_makes(dtype, tolerance):
    tied = TiedGradient()
    torch.testing.assert_close(gradients(tied, dtype), gradients(None, dtype), rtol=tolerance, atol=tolerance)
    assert tied.waiting is None


def test_a_frozen_table_gets_none():
    ours, other = gradients(TiedGradient(), frozen=True), gradients(None, frozen=True)
    assert ours[0] is None and other[0] is None
    torch.testing.assert_close(ours[1:], other[1:])


def test_the_gradient_is_the_head_s_own_tensor():
    """No second table: what the look-up returns is the storage that waited."""
    tied, embedding = TiedGradient(), Gemma4TextScaledWordEmbedding(V, H, padding_idx=0)
    with tied.lookups_of(embedding):
        rows = embedding(torch.tensor([[1, 2, 2]]))
    tied.waiting = torch.ones(V, H)
    pointer = tied.waiting.data_ptr()
    rows.sum().backward()
    assert embedding.weight.grad.data_ptr() == pointer
    assert embedding.weight.grad[:, 0].tolist() == [1, 2, 3, *[1] * (V - 3)]


def test_without_a_waiting_gradient_it_is_an_ordinary_look_up():
    embedding = Gemma4TextScaledWordEmbedding(V, H, padding_idx=2, embed_scale=0.5)
    ids = torch.tensor([[1, 2, 1, 4]])
    with TiedGradient().lookups_of(embedding):
        rows = embedding(ids)
    (ours,) = torch.autograd.grad(rows.square().sum(), embedding.weight)
    expected = F.embedding(ids, embedding.weight, padding_idx=2) * 0.5
    (theirs,) = torch.autograd.grad(expected.square().sum(), embedding.weight)
    torch.testing.assert_close(ours, theirs)


class AddedByIndex(TorchDispatchMode):
    """The dtypes in which rows of one index are added up, where more than one of them isn't 0."""

    def __init__(self):
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.index_add_.default:
            total, _, index, rows = args
            used = index[rows.abs().sum(-1) > 0].tolist()
            if len(set(used)) < len(used):
                self.dtypes |= {total.dtype, rows.dtype}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("waits", [False, True])
def test_a_frequent_token_is_summed_in_fp32(waits):
    """1024 equal rows in bf16: added one by one to a bf16 total, as on a GPU, they would stop at 256. The CPU's kernel
    sums in fp32 itself, so what is checked besides is the dtype of what it is given."""
    embedding, tied = Gemma4TextScaledWordEmbedding(4, H, padding_idx=0).bfloat16(), TiedGradient()
    with tied.lookups_of(embedding):
        rows = embedding(torch.tensor([[1] * 1024 + [2, 3, 0]]))
    if waits:
        tied.waiting = torch.zeros(4, H, dtype=torch.bfloat16)
    with AddedByIndex() as added:
        rows.sum().backward()
    assert added.dtypes == {torch.float32}
    assert embedding.weight.grad.tolist() == [[0] * H, [1024] * H, [1] * H, [1] * H]
