"""What a validation measures: losses on the validation data, assisted generation, the drafter on the base's text."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from joint_train.config import Config
from joint_train.data import BatchLoader
from joint_train.distributed import parallelize
from joint_train.evaluate import accepted_length, validation_prompts
from joint_train.pair.model import JointModel
from joint_train.pair.stats import JointStats
from joint_train.pair.targets import JointTargets
from joint_train.train.own_text import OwnText

Prepared = tuple[dict[str, Any], JointTargets, Tensor]


class Validation:
    """The validations of a run. All ranks together.

    Args:
        model: the pair, sharded or not.
        loader: of the validation data.
        prompts: how many an assisted generation answers.
        share: this rank, and how many there are.
        answers: what the base wrote in the last assisted generation before a resume, as :attr:`answers` gives it.
    """

    def __init__(
        self,
        cfg: Config,
        model: JointModel,
        tokenizer: PreTrainedTokenizerBase,
        loader: BatchLoader,
        prompts: int,
        share: tuple[int, int],
        answers: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.cfg, self.model, self.tokenizer, self.loader = cfg, model, tokenizer, loader
        self.prompts, self.share, self.own_text = prompts, share, None
        if cfg.eval.own_text:
            self.own_text = OwnText.saved(answers, cfg.data, tokenizer, model.adapters)

    @property
    def answers(self) -> list[list[int]] | None:
        """The tokens of each text that the base wrote in the last assisted generation."""
        return None if self.own_text is None else self.own_text.answers

    @torch.no_grad()
    def measure(
        self,
        generate: bool,
        prepare: Callable[[dict[str, Tensor], list[str]], Prepared],
        progress: Callable[[], None],
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Validation losses, with ``generate`` also assisted generation, and the drafter on what the base wrote last.

        Args:
            prepare: makes a batch of a loader with these sources what the model takes, its targets and their counts.
            progress: called before each batch and each forward of a generation; it may be collective, and raise.

        Returns:
            The metrics, and generated texts as rows of a table.
        """
        examples: list[dict[str, Any]] = []

        def stats_of(batch: dict[str, Tensor], *sources: str) -> JointStats:
            progress()
            inputs, targets, _ = prepare(batch, list(sources))
            return self.model(**inputs, targets=targets).stats

        self.model.eval()
        try:
            measured = self._losses(stats_of)
            if generate and self.prompts > 0:
                generated, examples = self._generation(progress)
                measured |= generated
            if self.own_text is not None:
                measured |= self.own_text.measure(stats_of, dist.all_reduce, *self.share)
        finally:
            parallelize.reshard(self.model)
            self.model.train()
        return measured, examples

    def _losses(self, stats_of: Callable[..., JointStats]) -> dict[str, float]:
        stats: JointStats | None = None
        with torch.random.fork_rng(devices=[]):  # making an iterator draws from it
            for i, batch in enumerate(self.loader):
                if i == self.cfg.eval.batches:
                    break
                found = stats_of(batch, *self.loader.source_names)
                stats = found if stats is None else stats + found
        assert stats is not None, "every rank has a batch of validation"
        means = stats.reduced(dist.all_reduce).means(self.loader.source_names, self.loader.source_adapters)
        return {f"val/{name}": value for name, value in means.items()}

    def _generation(self, progress: Callable[[], None]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        cfg, model = self.cfg, self.model
        prompts = validation_prompts(cfg.data, self.tokenizer, self.prompts)
        accepted = accepted_length(
            model.base, model.drafter, self.tokenizer, prompts, cfg.drafter.num_steps, cfg.eval.max_new_tokens,
            progress, model.adapters, cfg.drafter.rope_position == "last_kv",
        )  # fmt: skip
        if cfg.eval.own_text:
            self.own_text = OwnText(prompts, accepted["answers"], cfg.data, model.adapters)
        of = accepted["by_adapter"].items()
        measured = {f"val/adapter/{name}/tokens_per_forward": value for name, value in of}
        return measured | {"val/tokens_per_forward": accepted["tokens_per_forward"]}, accepted["examples"]
