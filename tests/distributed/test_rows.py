"""Row-sharded per-layer embeddings: rows and gradients are those of the whole table, and what is exchanged is small."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_parallel import all_counts, batch, config, gradients, sharded, step
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextScaledWordEmbedding

from joint_train.distributed.parallelize import look_up, per_layer_table
from joint_train.distributed.rows import RowShardedEmbedding, shard_rows

ROWS, WIDTH, PAD, SCALE = 11, 6, 2, 3.0


def table() -> Gemma4TextScaledWordEmbedding:
    torch.manual_seed(0)
    made = Gemma4TextScaledWordEmbedding(ROWS, WIDTH, PAD, SCALE)
    nn.init.normal_(made.weight)  # the padding's row too: what is read there is what is stored
    return made


def ids_of(rank: int, micro_batch: int) -> Tensor:
    """Some for every shard; with many of one row, some for one shard only, or nothing but padding."""
    generator = torch.Generator().manual_seed(7 * rank + micro_batch)
    ids = torch.randint(0, ROWS, (2, 9), generator=generator)
    ids[0, :4] = 5
    return [ids, ids.clamp(max=2), torch.full_like(ids, PAD)][(rank + micro_batch) % 3]


def upstream(rank: int, micro_batch: int) -> Tensor:
    return torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(100 + 7 * rank + micro_batch))


def exchanged(rank: int, replicas: int, told: bool, micro_batches: int):
    """Outputs of this rank's micro-batches, the table's whole gradient, and elements that were sent for rows."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("dp_replicate", "dp_shard"))
    made = table()
    shard_rows(made, mesh if replicas > 1 else mesh["dp_shard"], torch.float32, 60)
    outputs, sent, exchange = [], [], made.exchange
    made.exchange = lambda rows, *splits: sent.append(rows.numel()) or exchange(rows, *splits)
    for i in range(micro_batches):
        made.all_reduces = i == micro_batches - 1
        ids = ids_of(rank, i)
        if told:
            made.lookup = made.look_up(ids)
        out = made(ids)
        out.backward(upstream(rank, i))
        outputs.append(out.detach())
    assert made.partial is None
    return outputs, made.weight.grad.full_tensor(), sent


@pytest.mark.parametrize(
    "ranks, replicas, told",
    [(1, 1, True), (2, 1, False), (4, 1, True), (4, 2, True)],
    ids=["1 rank", "2 that weren't told", "4", "2 x 2"],
)
def test_rows_and_gradients_are_those_of_the_whole_table(ranks, replicas, told):
    whole, micro_batches = table(), 3
    found = run_ranks(exchanged, ranks, replicas, told, micro_batches)
    for rank, (outputs, _, _) in enumerate(found):
        for i, out in enumerate(outputs):
            expected = whole(ids_of(rank, i))
            expected.backward(upstream(rank, i))
            assert torch.equal(out, expected)
    assert whole.weight.grad[PAD].abs().max() == 0 < whole.weight.grad.abs().max()
    for _, gradient, sent in found:
        torch.testing.assert_close(gradient, whole.weight.grad, rtol=1e-5, atol=1e-5)
        assert max(sent) <= ranks * ROWS * WIDTH  # a row goes to each rank at most once


def test_every_backward_of_hsdp_may_be_the_last():
    """Two backwards that both reduce over the replicas add up; what was reduced before isn't reduced again."""
    (_, once, _), *_ = run_ranks(twice, 4, False)
    (_, both, _), *_ = run_ranks(twice, 4, True)
    torch.testing.assert_close(both, once)


def twice(rank: int, each: bool):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    made = table()
    shard_rows(made, mesh, torch.float32, 60)
    for i in range(2):
        made.all_reduces = each or i == 1
        made(ids_of(rank, i)).backward(upstream(rank, i))
    return None, made.weight.grad.full_tensor(), None


def other_ids(rank: int):
    made = table()
    shard_rows(made, init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",)), torch.bfloat16, 60)
    made.lookup = made.look_up(torch.tensor([[1, 7]]))
    out = made(torch.tensor([[1, 4, 7, PAD]]))
    try:
        made.look_up(torch.tensor([[ROWS]]))
    except ValueError as error:
        return out, str(error)


def test_an_id_that_was_not_asked_for_is_nan_and_one_that_is_not_there_an_error():
    for out, message in run_ranks(other_ids, 2):
        assert out.dtype == torch.bfloat16
        assert out.isnan().all(-1).tolist() == [[False, True, False, False]]
        torch.testing.assert_close(out[0, ::2], table()(torch.tensor([1, 7])).bfloat16(), rtol=2**-7, atol=0)
        assert f"a table of {ROWS} rows" in message


def pair_steps(rank: int, told: bool):
    """Gradients of two micro-batches of the pair, and how often ids were exchanged inside of a forward."""
    model, index, size = sharded("e2b", config(activation_checkpointing__base="full"))
    made, asked = per_layer_table(model.base), []
    assert isinstance(made, RowShardedEmbedding) and not isinstance(made, FSDPModule)
    assert isinstance(made.weight, DTensor) and made.weight.to_local().shape[0] * size == made.weight.shape[0]
    find = made.look_up
    for i in range(2):
        rows = {name: x.chunk(2 * size)[2 * index + i] for name, x in batch().items()}
        if told:
            rows |= look_up(model, rows["input_ids"], torch.device("cpu"))
        made.look_up = lambda ids: asked.append(ids) or find(ids)
        step(model, rows, all_counts(batch()))
        del made.look_up
    return gradients(model), len(asked)


def test_a_pair_whose_look_ups_are_known_before_asks_for_none_in_its_forward():
    (known, none), (found, twice_asked) = run_ranks(pair_steps, 2, True)[0], run_ranks(pair_steps, 2, False)[0]
    assert none == 0 and twice_asked == 2
    assert known.keys() == found.keys() and all(torch.equal(known[name], x) for name, x in found.items())


def frequent(rank: int, replicas: int) -> Tensor:
    """The gradient of a table of which one id is read 4,000 times, in bfloat16."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("dp_replicate", "dp_shard"))
    made = Gemma4TextScaledWordEmbedding(ROWS, WIDTH, PAD, 1.0)
    shard_rows(made, mesh if replicas > 1 else mesh["dp_shard"], torch.bfloat16, 60)
    ids = torch.full((4, 1000), 5)
    ids[0, :2], ids[0, 2] = 1, PAD
    made(ids).backward(torch.ones(4, 1000, WIDTH, dtype=torch.bfloat16))
    return made.weight.grad.full_tensor()


def test_a_frequent_ids_gradient_is_summed_in_fp32():
    """In bfloat16 a sum of ones stops growing at 256; what two ranks send is rounded once, by at most 2^-9."""
    for gradient in run_ranks(frequent, 2, 1):
        expected = torch.zeros(ROWS)
        expected[1], expected[5] = 2 * 2, 2 * 3997
        torch.testing.assert_close(gradient, expected[:, None].expand(-1, WIDTH), rtol=2**-8, atol=0)
