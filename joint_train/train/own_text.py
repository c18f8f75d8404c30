"""The drafter on what the base itself writes: validation on text as serving has it, without decoding anything.

Validation data are somebody's text, and a drafter is served on its own base's. The two differ in how much of it is
accepted. So what the base wrote in the last assisted generation is kept, and every validation reads it once more, with
one joint forward: a greedy text's tokens are the base's most likely ones, and where the drafter's are too, decoding
accepts them. In the validation that generates, the accepted length found here is the decoded one; until the next it
follows the drafter, on what the base wrote then.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from joint_train.config import DataConfig
from joint_train.evaluate.prompts import Prompt, validation_prompts
from joint_train.pair.adapters import INPUT, Adapters
from joint_train.pair.stats import JointStats

log = logging.getLogger(__name__)


class OwnText:
    """Prompts with the base's own answers; the same on every rank.

    Args:
        prompts: those of the generation.
        answers: the tokens of each answer.
        data: rows longer than ``max_length`` are left out, as are prompts with pictures; a batch has
            ``micro_batch_size`` rows.
        adapters: that the base has on it, if any.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[int]],
        data: DataConfig,
        adapters: Adapters | None = None,
    ) -> None:
        self.answers, self.size = [list(answer) for answer in answers], data.micro_batch_size
        self.adapters = None if adapters is None else adapters.names
        pairs = list(zip(prompts, self.answers, strict=True))
        self.rows = [(p, a) for p, a in pairs if not p.inputs and a and len(p.ids) + len(a) <= data.max_length]
        if left_out := len(pairs) - len(self.rows):
            log.info(
                "val/own_…: %d of %d generated answers are left out, because they are empty, longer than "
                "data.max_length with their prompt, or about pictures", left_out, len(pairs),
            )  # fmt: skip

    @classmethod
    def saved(
        cls, answers: Sequence[Sequence[int]] | None, data: DataConfig, tokenizer: Any, adapters: Adapters | None
    ) -> "OwnText | None":
        """From a checkpoint's ``answers``; None without them, or if the data don't have as many prompts any more."""
        prompts = validation_prompts(data, tokenizer, len(answers or ()))
        return cls(prompts, answers, data, adapters) if answers and len(prompts) == len(answers) else None

    def batches(self, rank: int, ranks: int) -> Iterator[dict[str, Tensor]]:
        """This rank's share, as a loader makes batches: as many on every rank, since each forward is a collective. One
        without rows has a row without targets."""
        mine = self.rows[rank::ranks]
        most = -(-len(self.rows) // ranks)
        for first in range(0, most, self.size):
            yield self._batch(mine[first : first + self.size])

    def _batch(self, rows: Sequence[tuple[Prompt, list[int]]]) -> dict[str, Tensor]:
        width = max((len(prompt.ids) + len(answer) for prompt, answer in rows), default=2)
        shape = max(1, len(rows)), width
        ids, documents = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
        labels, of_adapter = torch.full_like(ids, -100), torch.full_like(ids, -1)
        for i, (prompt, answer) in enumerate(rows):
            start, end = len(prompt.ids), len(prompt.ids) + len(answer)
            ids[i, :end] = torch.tensor([*prompt.ids, *answer])
            labels[i, start:end] = ids[i, start:end]
            documents[i, end:] = 0
            if self.adapters is not None and prompt.adapter is not None:
                of_adapter[i] = self.adapters.index(prompt.adapter)
        positions = torch.arange(width).expand(shape).contiguous()
        batch = {"input_ids": ids, "labels": labels, "document_ids": documents, "position_ids": positions}
        return batch if self.adapters is None else {**batch, INPUT: of_adapter}

    def measure(
        self,
        stats_of: Callable[[dict[str, Tensor]], JointStats],
        all_reduce: Callable[[Tensor], Any],
        rank: int,
        ranks: int,
    ) -> dict[str, float]:
        """``val/own_agreement_{k}`` and ``val/own_accepted_length``, over all ranks; nothing without a row.

        Args:
            stats_of: a joint forward of a batch.
            all_reduce: as for :meth:`joint_train.pair.stats.Sums.reduced`.
        """
        stats: JointStats | None = None
        for batch in self.batches(rank, ranks):
            found = stats_of(batch)
            stats = found if stats is None else stats + found
        if stats is None:
            return {}
        means = stats.reduced(all_reduce).means()
        measured = {f"val/own_{name}": value for name, value in means.items() if name.startswith("agreement_")}
        return measured | {"val/own_accepted_length": means["accepted_length_walked"]}
