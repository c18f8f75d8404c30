"""Which positions of a batch are targets, of the base and of each drafter round, and the weight of each loss sum."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class JointTargets:
    """The supervised positions of a batch, P of them, and which of the base and the K rounds each one counts for."""

    rows: Tensor  # int64 [P], base rows b*S + p - 1
    labels: Tensor  # int64 [P], target tokens
    valid: Tensor  # bool [P, 1+K], column 0 the base, column 1+k round k
    offset: int  # round k of a target is at row `rows - offset - k`
    batch_rows: int  # B*S
    left_out: Tensor  # int64 [], targets of rounds that aren't valid because decoding never visits their row
    token_weights: Tensor | None = None  # float32 [P], factors on the losses of each target; None: all are 1

    @property
    def counts(self) -> Tensor:
        """int64 `[1+K]`: targets of the base and of each round."""
        return self.valid.sum(0)

    @property
    def mass(self) -> Tensor:
        """`[1+K]`: the sums of their weights; :attr:`counts` where they have none."""
        if self.token_weights is None:
            return self.counts
        return (self.valid * self.token_weights[:, None]).sum(0)

    def to(self, device: torch.device | str) -> "JointTargets":
        """The same on a device; nothing waits for it."""
        tensors = (self.rows, self.labels, self.valid, self.left_out)
        rows, labels, valid, left_out = (send(x, torch.device(device)) for x in tensors)
        given = self.token_weights
        given = None if given is None else send(given, torch.device(device))
        return JointTargets(rows, labels, valid, self.offset, self.batch_rows, left_out, given)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting: a copy from memory that isn't pinned waits for all of the GPU's queued
    work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # itself, where it is already
    return tensor.to(device, non_blocking=True)


def joint_targets(
    labels: Tensor,
    document_ids: Tensor | None,
    num_steps: int,
    pairing: str,
    prompt_rows: bool | None = None,
    token_weights: Tensor | None = None,
) -> JointTargets:
    """Find the targets of a batch. Run it where the batch is made (CPU): P then is known without waiting for a device.

    Position p of a row is a target if ``labels[p] != -100`` and p-1 is in p's document. Round k predicts it from row
    ``p - 1 - offset - k`` (offset 1 for pairing "serving", 0 for "same_token"), if that row and all between are in p's
    document too: its rounds read those tokens.

    Decoding starts at the row before an answer's first token, the last of the prompt, and ends with the answer. So it
    comes to a row t and drafts p there only if all of the tokens t+1 … p are supervised; other rounds are left out, and
    counted, unless `prompt_rows` is True.

    Args:
        labels: int64 `[B, S]`, not shifted, -100 where nothing is supervised.
        document_ids: int64 `[B, S]`, 0 padding, else the documents of a row; None: one document a row.
        num_steps: K.
        pairing: ``serving`` or ``same_token``.
        prompt_rows: also train at rows that decoding never visits; by default only with ``same_token``, whose published
            recipe does.
        token_weights: float `[B, S]`, not below 0: a factor on the losses of the target at each position.

    Raises:
        ValueError: for another pairing, or weights of another shape than the labels.
    """
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(f"token_weights is {tuple(token_weights.shape)}, and labels are {tuple(labels.shape)}")
    if pairing not in ("serving", "same_token"):
        raise ValueError(f"drafter.pairing={pairing!r}: must be serving or same_token")
    offset = 1 if pairing == "serving" else 0
    documents = torch.ones_like(labels) if document_ids is None else document_ids

    prompt_rows = pairing == "same_token" if prompt_rows is None else prompt_rows

    def shift_right(x: Tensor, back: int, missing: int) -> Tensor:  # [B, S]: what x has `back` positions earlier
        return torch.nn.functional.pad(x, (back, 0), value=missing)[:, : x.shape[1]]

    def in_document(back: int) -> Tensor:  # [B, S]: is the row `back` positions earlier in the same document?
        return (documents > 0) & (documents == shift_right(documents, back, 0))

    base = (labels != -100) & in_document(1)
    rounds, valid = [], base
    for k in range(num_steps):  # every position between row and target: a mask may have holes
        valid = valid & in_document(1 + offset + k)
        rounds.append(valid)
    reached, answer = [], base
    for k, valid in enumerate(rounds):  # `answer`: all the tokens from that after the row to the target are supervised
        answer = answer & (shift_right(labels, offset + k, -100) != -100)
        reached.append(valid & answer)
    left_out = sum((x.sum() for x in rounds), torch.zeros((), dtype=torch.int64, device=labels.device))
    rounds = rounds if prompt_rows else reached
    left_out = left_out - sum(x.sum() for x in rounds)
    positions = base.flatten().nonzero().squeeze(1)
    valid = torch.stack([base, *rounds], dim=-1).flatten(0, 1)[positions]
    given = None if token_weights is None else token_weights.float().flatten()[positions]
    return JointTargets(positions - 1, labels.flatten()[positions], valid, offset, labels.numel(), left_out, given)


def sum_weights(counts: Tensor, rounds: Sequence[float], loss_weight: float) -> Tensor:
    """What each of the 1+K loss sums is multiplied by: 1/N_0 for the base, lambda·w_k/N_k for round k.

    Args:
        counts: `[1+K]` targets of the whole step (all ranks, all micro-batches), or the sums of their weights. A count
            of 0 gives a weight of 0.
        rounds: w_k, from :func:`round_weights`.
        loss_weight: lambda.

    Returns:
        float32 `[1+K]`, on the device of `counts`.
    """
    scale = torch.tensor([1.0, *(loss_weight * w for w in rounds)], dtype=torch.float32)
    scale = send(scale, counts.device)
    return torch.where(counts > 0, scale / torch.where(counts > 0, counts, 1), 0.0)
