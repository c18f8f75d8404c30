"""The rows at which decoding of a text would stop to verify drafts: those inside an accepted run are skipped."""

import torch
from torch import Tensor


def decoding_rows(rows: Tensor, accepted: Tensor) -> Tensor:
    """Which rows the decoding of each run of targets visits, if it follows the text.

    It starts at the row before a run's first target, where the first new token is known and the first drafts are made.
    With ``a`` drafts accepted there, the verification settles them and a token of the base's own, so the next row is
    ``a + 1`` further; a row that predicts no target ends the walk. Documents don't run into each other: the first token
    of one is never a target. The walk takes log2(R) rounds of doubled jumps, and the host doesn't wait.

    Args:
        rows: int64 ``[P]``, the base rows of the targets, out of R = B*S.
        accepted: int64 ``[R]``, drafts accepted in a row by each row.

    Returns:
        bool ``[R]``.
    """
    count = accepted.shape[0]
    target = torch.zeros(count + 1, dtype=torch.bool, device=accepted.device)  # the last row ends every walk
    target.index_fill_(0, rows, True)  # by index, True would be copied to the device: a wait
    visited = target.clone()
    visited[1:] &= ~target[:-1]
    here = torch.arange(count, device=accepted.device)
    jump = torch.full((count + 1,), count, device=accepted.device)
    jump[:-1] = (here + accepted + 1).clamp(max=count)
    jump = torch.where(target[jump], jump, count)
    for _ in range(count.bit_length()):  # after round i every row within 2**i stops is visited; jump is 2**i stops far
        visited.index_fill_(0, torch.where(visited, jump, count), True)
        jump = jump[jump]
    return visited[:-1]
