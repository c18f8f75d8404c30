"""Decoding with transformers' own generation, plain and assisted, and counting what it does.

Everything is counted from outside: a hook sees each forward of the base and how many tokens it is given, a streamer
sees the tokens that each of them settles. ``tokens_per_forward`` leaves the prompt's own forward out, which settles one
token with any drafter: it is the mean number of tokens of a verification, 1 without a drafter and at most K + 1.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from joint_train.evaluate.drafting import Drafting, Engine, drafts
from joint_train.evaluate.lockstep import Lockstep, gather_in_order, share_of
from joint_train.evaluate.prompts import Prompt
from joint_train.pair.adapters import Adapters
from joint_train.pair.halves import input_embedding

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel


@dataclass
class Decoded:
    """One prompt decoded.

    Attributes:
        ids: the new tokens, with the end token if there is one.
        drafted: for each verification (each base forward after the prompt's), the number of drafts it was given.
        settled: for each verification, the tokens it settled: the accepted drafts and one of the base's own.
        confidences: for each verification, the drafter's largest probability for each of its drafts.
        ended: whether it ended with an end token, rather than with its budget.
        seconds: of the whole generation, the prompt's forward included.
        drafts: for each verification, what was drafted, with ``scout`` alone.
    """

    ids: list[int]
    drafted: list[int] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)
    confidences: list[list[float]] = field(default_factory=list)
    ended: bool = False
    seconds: float = 0.0
    drafts: list[list[int]] = field(default_factory=list)


class SettledTokens(BaseStreamer):
    """Records how many tokens each step of a generation settles; the first record is the prompt."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def put(self, value: Tensor) -> None:
        self.counts.append(value.numel())

    def end(self) -> None:
        pass


def decode(
    base: PreTrainedModel,
    drafter: PreTrainedModel | None,
    prompt_ids: Sequence[int],
    num_steps: int,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    ignore_eos: bool = False,
    engine: Engine = False,
    way: str | None = None,
    threshold: float = 0.0,
    scout: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
) -> Decoded:
    """Decode one prompt. ``suppress_tokens`` of both generation configurations hold.

    Args:
        drafter: ``None`` for plain decoding.
        num_steps: K, drafts for a verification.
        temperature: 0 for greedy decoding; else of sampling from the base's whole distribution.
        ignore_eos: go on to ``max_new_tokens``.
        engine: what the drafter sees: what transformers, vLLM and SGLang (True) or llama.cpp (``"llamacpp"``) show it,
            see :func:`joint_train.evaluate.drafting.settled_states`.
        way: what is drafted, and how accepted, see :mod:`joint_train.evaluate.drafting`; by default as it is served:
            ``argmax`` with ``engine``, else ``biased``. Of no account to greedy decoding.
        threshold: stop drafting where the drafter's confidence is below it.
        scout: draft at each token of plain decoding, and verify nothing.
        inputs: of the base's first forward, for the prompt's pictures.
    """
    device = input_embedding(base).weight.device
    ids = torch.tensor([list(prompt_ids)], device=device)
    ends = [] if ignore_eos else end_tokens(base)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=ends or None,
        pad_token_id=base.config.get_text_config().pad_token_id,
        suppress_tokens=base.generation_config.suppress_tokens,
    )
    if temperature > 0:
        config.temperature, config.top_k, config.top_p = temperature, 0, 1.0
    lengths: list[int] = []
    streamer = SettledTokens()
    drafting = Drafting(num_steps, way or ("argmax" if engine else "biased"), temperature, engine, threshold, scout)
    assisted: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if drafter is not None:
            stack.enter_context(drafts(base, drafting))
            assisted["assistant_model"] = drafter
        hook = base.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        stack.callback(hook.remove)
        stack.enter_context(own_generation_config(base, config))
        synchronize(device)
        started = time.perf_counter()
        generate = cast("GenerativePreTrainedModel", base).generate
        for name, value in (inputs or {}).items():
            assisted[name] = value.to(device, base.dtype if value.is_floating_point() else None)
        out = generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, synced_gpus=False, **assisted)
        synchronize(device)
        seconds = time.perf_counter() - started
    new = out[0, ids.shape[1] :].tolist()
    return Decoded(
        ids=new,
        drafted=[length - 1 for length in lengths[1:]],
        settled=streamer.counts[2:],
        confidences=drafting.confidences,
        drafts=drafting.drafts,
        ended=bool(new) and new[-1] in ends,
        seconds=seconds,
    )


def pictures_of(prompt: Prompt) -> dict[str, Any]:
    """:func:`decode`'s ``inputs`` of a prompt that has pictures."""
    return {"inputs": prompt.inputs} if prompt.inputs else {}


def end_tokens(base: PreTrainedModel) -> list[int]:
    """The tokens that end a text, by the base's generation configuration."""
    ends = base.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


@contextlib.contextmanager
def own_generation_config(base: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the base's generation configuration: what isn't set in one that is only passed is filled in from it."""
    before, base.generation_config = base.generation_config, config
    try:
        yield
    finally:
        base.generation_config = before


def synchronize(device: torch.device) -> None:
    """Wait for the device's work, so that a clock read next to it means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tokens_per_forward(decoded: Sequence[Decoded]) -> float:
    """Mean number of tokens that a verification settles, over all of them; NaN if there was none."""
    verifications = sum(len(d.settled) for d in decoded)
    return sum(sum(d.settled) for d in decoded) / verifications if verifications else float("nan")


def acceptance_steps(decoded: Decoded) -> list[tuple[int, int]]:
    """(drafts, accepted drafts) of each verification.

    One that an end token cut short doesn't say what became of the drafts after it, and is left out.
    """
    steps = list(zip(decoded.drafted, decoded.settled, strict=True))
    return [(drafts, settled - 1) for drafts, settled in (steps[:-1] if decoded.ended else steps)]


@torch.no_grad()
def accepted_length(
    base: PreTrainedModel,
    drafter: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    num_steps: int,
    max_new_tokens: int,
    progress: Callable[[], None] = lambda: None,
    adapters: Adapters | None = None,
    engine: bool = False,
) -> dict[str, Any]:
    """Tokens per base forward in greedy assisted generation, with models that may be sharded.

    Under a process group every rank calls it with the same prompts and decodes its share of them, all in lockstep: each
    forward of the base is then a collective that all ranks enter, and no rank ever holds a whole model.

    Args:
        base, drafter: plain modules or FSDP2 roots (the base's root must stay gathered after its forward).
        num_steps: K, drafts for a verification.
        progress: is called before each forward of the base, on all ranks as often; it may be collective, and raise.
        adapters: on the base; each prompt is decoded under its own.
        engine: as for :func:`decode`.

    Returns:
        ``tokens_per_forward``; ``by_adapter``: that over the prompts of each adapter, by its name; ``accepted_{k}``:
        share of verifications whose draft k was accepted, with all before it; ``answers``: the tokens of each prompt's
        text; ``examples``: dictionaries of prompt, text and tokens per forward, for a table.
    """
    training = {model: model.training for model in (base, drafter)}
    mine = {}
    try:
        for model in training:
            model.eval()
        with Lockstep(base, drafter, progress):
            for number, prompt in share_of(prompts):
                with contextlib.nullcontext() if adapters is None else adapters.alone(prompt.adapter):
                    how = {"engine": True} | pictures_of(prompt) if engine else pictures_of(prompt)
                    mine[number] = decode(base, drafter, prompt.ids, num_steps, max_new_tokens, **how)
    finally:
        for model, mode in training.items():
            model.train(mode)
    decoded = gather_in_order(mine)
    of_adapters: dict[str, list[Decoded]] = {}
    for prompt, d in zip(prompts, decoded, strict=True):
        if adapters is not None and prompt.adapter is not None:
            of_adapters.setdefault(prompt.adapter, []).append(d)
    steps = [step for d in decoded for step in acceptance_steps(d)]
    drafted = [max(1, sum(drafts > k for drafts, _ in steps)) for k in range(num_steps)]
    return {
        "tokens_per_forward": tokens_per_forward(decoded),
        "by_adapter": {name: tokens_per_forward(of) for name, of in of_adapters.items()},
        **{f"accepted_{k}": sum(accepted > k for _, accepted in steps) / drafted[k] for k in range(num_steps)},
        "answers": [d.ids for d in decoded],
        "examples": [
            {
                "prompt": prompt.text,
                "text": tokenizer.decode(d.ids, skip_special_tokens=True),
                "tokens_per_forward": round(tokens_per_forward([d]), 3),
            }
            for prompt, d in zip(prompts, decoded, strict=True)
        ],
    }
