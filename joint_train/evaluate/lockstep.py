"""Ranks that decode different prompts with one sharded base, each of whose forwards is a collective."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

T = TypeVar("T")


class Lockstep:
    """While it is entered, every forward of the base waits until every rank has reached one; a rank with nothing left
    to
    decode joins in with a forward of one token, until none has.

    Args:
        base, drafter: FSDP2 roots that stay gathered after a forward, or plain modules. The drafter, a unit of its own,
            is gathered here once: a rank may have no prompt to use it for.
        progress: called before each forward of the base, on all ranks as often: it may be collective, and raise.
    """

    def __init__(self, base: nn.Module, drafter: nn.Module, progress: Callable[[], None]) -> None:
        self.base, self.drafter, self.progress, self.idle = base, drafter, progress, False

    def __enter__(self) -> "Lockstep":
        for root in (self.base, self.drafter):
            if isinstance(root, FSDPModule):
                root.unshard()
        self.hook = self.base.register_forward_pre_hook(self._before, prepend=True)
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            if kind is None:
                self._keep_pace()
        finally:
            self.hook.remove()

    def _before(self, module: nn.Module, args: tuple) -> None:
        if not self.idle:
            self._all_at_one(True)

    def _all_at_one(self, working: bool) -> bool:
        """Whether any rank is about to decode."""
        self.progress()
        flag = torch.tensor(int(working))
        if dist.is_initialized():
            dist.all_reduce(flag)
        return bool(flag)

    def _keep_pace(self) -> None:
        self.idle = True
        device = next(self.base.parameters()).device
        while self._all_at_one(False):
            self.base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)


def share_of(items: Sequence[T]) -> list[tuple[int, T]]:
    """This rank's items, with their numbers."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return list(enumerate(items))[rank::size]


def gather_in_order(mine: dict[int, T]) -> list[T]:
    """All ranks' items in the order of their numbers, on every rank."""
    of_ranks: list[dict[int, T]] = [mine]
    if dist.is_initialized():
        of_ranks = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_ranks, mine)
    every = {number: item for of_rank in of_ranks for number, item in of_rank.items()}
    return [every[number] for number in sorted(every)]
