"""An exponential moving average of the drafter's weights: ``optim.drafter_ema``.

It is sharded as the weights are, kept in float32, saved in a checkpoint's ``drafter/ema``, and what a validation
measures and an export writes as the drafter. The arithmetic is ``torch.optim.swa_utils``'; torch's ``AveragedModel``
can't be used, because it copies modules and FSDP2's refuse that.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from joint_train.checkpoint.state import named_tensors
from joint_train.distributed.parallelize import reshard
from joint_train.distributed.placement import local_tensor, sharded_like
from joint_train.pair.model import JointModel


@torch.no_grad()
def start_average(model: JointModel) -> None:
    """Let the average begin as the drafter is now. Weights that aren't trained are in it as they are, not copied."""
    average: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model.drafter).items():
        average[name] = tensor
        if tensor.requires_grad:
            copy = local_tensor(tensor).detach().to(torch.float32, copy=True)
            average[name] = sharded_like(copy, tensor) if isinstance(tensor, DTensor) else copy
    model.drafter_average = average


@torch.no_grad()
def update_average(model: JointModel, decay: float) -> None:
    """``average = decay * average + (1 - decay) * weights``, after a step. No communication, and nothing waits."""
    averages, weights = _pairs(model)
    get_ema_multi_avg_fn(decay)(averages, [weight.float() for weight in weights], None)


@contextlib.contextmanager
def averaged(model: JointModel) -> Iterator[None]:
    """Give the drafter its average, if there is one, and its own weights again afterwards, bit for bit."""
    averages, weights = _pairs(model)
    kept = [weight.clone() for weight in weights]
    _copy(model, weights, averages)
    try:
        yield
    finally:
        _copy(model, weights, kept)


@torch.no_grad()
def _copy(model: JointModel, weights: list[Tensor], values: list[Tensor]) -> None:
    if weights:
        reshard(model)  # or a forward would read what was gathered of the others
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def _pairs(model: JointModel) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's shards of the average and of the weights that it is of."""
    average = model.drafter_average or {}
    pairs = [(average[name], w) for name, w in named_tensors(model.drafter).items() if average.get(name, w) is not w]
    return [local_tensor(a).detach() for a, _ in pairs], [local_tensor(w).detach() for _, w in pairs]
