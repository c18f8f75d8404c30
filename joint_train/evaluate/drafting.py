"""How drafts are made in a measurement: what the drafter sees, which tokens it drafts, and where it stops.

transformers' generation verifies the drafts; :class:`Drafts` stands in for the candidate generator that it would make.

======== ================================ =======================================================================
way      draft                            accepted with probability
======== ================================ =======================================================================
argmax   the drafter's most likely token  p(draft): exact. vLLM's default (``draft_sample_method="greedy"``), SGLang's
sampled  a sample of its distribution q   min(1, p/q): exact. vLLM with ``draft_sample_method="probabilistic"``
biased   its most likely token            min(1, p/q), as if it were a sample: transformers 5.22. It favours the draft
======== ================================ =======================================================================

A rejection's token comes from max(0, p - q), so what is drafted doesn't change the distribution of the text (Leviathan
et al., arXiv 2211.17192, appendix A.1), but in `biased`. Greedy decoding accepts a draft that is the base's most likely
token.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

WAYS = ("argmax", "sampled", "biased")
Engine = bool | Literal["llamacpp"]
"""What the drafter sees: what vLLM and SGLang show it (True), llama.cpp, or transformers (False)."""
LLAMACPP_CANDIDATES = 10  # of llama.cpp's drafts: its q has no other token


@dataclass
class Drafting:
    """How to draft; and, after a generation, what was drafted.

    Attributes:
        num_steps: K, drafts for a verification.
        way: one of ``WAYS``.
        temperature: of the drafter's distribution; 0 is taken for 1.
        engine: what the drafter sees, see :func:`settled_states`.
        threshold: drafting stops before a token that is less probable: the largest probability of q, whatever is
            drafted (``p_min`` of llama.cpp, whose q has the ten most likely tokens and no temperature).
        scout: draft and keep the drafts from the base: decoding is plain, and has drafts at each of its tokens.
        confidences: for each verification, the largest probability of q for each draft.
        drafts: with ``scout`` the drafts themselves.
    """

    num_steps: int
    way: str = "argmax"
    temperature: float = 0.0
    engine: Engine = False
    threshold: float = 0.0
    scout: bool = False
    confidences: list[list[float]] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)


class Drafts(SinglePositionMultiTokenCandidateGenerator):
    """transformers' generator of Gemma 4 drafts with a :class:`Drafting`'s choices.

    Tokens in ``suppress_tokens`` of the drafter's generation configuration are never drafted, and of one with ordered
    embeddings only the candidates.
    """

    def __init__(self, drafting: Drafting, drafter: PreTrainedModel, **kwargs) -> None:
        super().__init__(drafter, **kwargs)
        self.drafting = drafting
        suppressed = self.assistant_generation_config.suppress_tokens
        self.suppressed = torch.tensor(suppressed, device=drafter.device) if suppressed else None
        self.window = drafter.config.get_text_config().sliding_window

    def get_candidates(  # type: ignore[override]  # transformers' own classes take these arguments as well
        self, input_ids, model_kwargs, model_outputs, is_first_iteration, n_last_matches, **kwargs
    ):
        """The text with its drafts ``[1, S + drafts]`` and the logits of q for each ``[1, drafts, V]``, or None."""
        if is_first_iteration:
            return input_ids, None
        drafting, length = self.drafting, input_ids.shape[1]
        states, position = model_outputs.shared_kv_states, length - 1
        if drafting.engine == "llamacpp":
            states = settled_states(states, length - 1, self.window - 1)
        elif drafting.engine:
            states, position = settled_states(states, length - 1, self.window), length - 2
        else:
            states = {kind: tuple(x[:, :, :length] for x in pair) for kind, pair in states.items()}
        # The base's state at the row that settled the newest token: the last of the prompt, or that of the last match.
        row = -1 if self.is_main_model_prefill else int(n_last_matches)
        self.is_main_model_prefill = False
        state, token = model_outputs.hidden_states[-1][:, row].unsqueeze(1), input_ids[:, -1:]
        position_ids = torch.tensor([[position]], device=self.assistant_model.device)

        tokens, logits, confidences = [], [], []
        for _ in range(min(drafting.num_steps, self.main_model_max_length - length - 1)):
            with torch.no_grad(), self.head():
                out = self.assistant_model(
                    inputs_embeds=torch.cat([self.target_model_input_embeddings(token), state], dim=-1),
                    attention_mask=model_kwargs.get("attention_mask"),
                    position_ids=position_ids,
                    shared_kv_states=states,
                    use_cache=False,
                )
            token, q, confidence = self.draft(out.logits[:, -1].float())
            if drafting.threshold and confidence < drafting.threshold:  # the only time that the device is waited for
                break
            state = out.last_hidden_state
            tokens.append(token)
            logits.append(q)
            confidences.append(confidence)
        drafting.confidences.append(torch.stack(confidences).tolist() if tokens else [])
        if drafting.scout:
            drafting.drafts.append(torch.cat(tokens, dim=1)[0].tolist() if tokens else [])
            return input_ids, None
        if not tokens:
            return input_ids, None
        return torch.cat([input_ids, *tokens], dim=1), torch.stack(logits, dim=1)

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """llama.cpp serves the dense head of a drafter with ordered embeddings."""
        config = self.assistant_model.config
        ordered = getattr(config, "use_ordered_embeddings", False)
        config.use_ordered_embeddings = ordered and self.drafting.engine != "llamacpp"
        try:
            yield
        finally:
            config.use_ordered_embeddings = ordered

    def draft(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A draft ``[1, 1]``, the logits ``[1, V]`` by which it is accepted, and q's largest probability ``[]``."""
        way, temperature = self.drafting.way, self.drafting.temperature or 1.0
        served, llamacpp = logits, self.drafting.engine == "llamacpp"
        if getattr(self.assistant_model, "masked_embedding", None) is not None and not llamacpp:
            # transformers gives all other tokens one value below the smallest candidate's.
            served = served.masked_fill(served == served.amin(-1, keepdim=True), -torch.inf)
        if self.suppressed is not None:
            served = served.index_fill(-1, self.suppressed, -torch.inf)
        if llamacpp:
            temperature, candidates = 1.0, served.topk(min(LLAMACPP_CANDIDATES, served.shape[-1]), dim=-1)
            served = torch.full_like(served, -torch.inf).scatter_(-1, candidates.indices, candidates.values)
        q, best = (served / temperature).softmax(-1), served.argmax(-1, keepdim=True)
        if way == "sampled":
            return torch.multinomial(q, num_samples=1), served / temperature, q.max()
        if way == "argmax":
            logits = torch.full_like(logits, -torch.inf).scatter_(-1, best, 0.0)
        return best, logits, q.max()


def settled_states(states: dict[str, tuple[Tensor, ...]], count: int, window: int) -> dict[str, tuple[Tensor, ...]]:
    """Of the base's keys and values those that vLLM and SGLang show the drafter, which is also trained on them.

    transformers 5.22 differs in three ways. After a rejection the keys and values end with those of the rejected draft
    (``[:current_length]`` keeps one position too many, and once the sliding window is full, all of the rejected ones
    in the sliding layers). Sliding layers see more than their window after a long prompt. And it rotates by the
    position of the token whose keys aren't there yet, t + 1, where engines rotate by the last one that is, t
    (``drafter.rope_position``).

    llama.cpp leaves the rejected ones out as well, rotates by t + 1, and its sliding layers see one position less than
    the window: it counts the newest token, whose keys aren't there yet.

    Args:
        count: positions before the newest token's, all that have keys. Those of rejected drafts lie behind them.
        window: how many of them sliding layers see.
    """
    rejected = states["full_attention"][0].shape[2] - count
    kept = {}
    for kind, pair in states.items():
        end = pair[0].shape[2] - rejected
        start = max(0, end - window) if kind == "sliding_attention" else 0
        kept[kind] = tuple(x[:, :, start:end] for x in pair)
    return kept


@contextlib.contextmanager
def drafts(base: PreTrainedModel, drafting: Drafting) -> Iterator[None]:
    """Let the base's assisted generation draft that way."""

    def make(generation_config, assistant_model, **kwargs) -> Drafts:
        return Drafts(
            drafting,
            assistant_model,
            target_model_input_embeddings=base.get_input_embeddings(),
            generation_config=generation_config,
        )

    base._get_candidate_generator = make  # type: ignore[assignment]  # transformers' own method again when it is gone
    try:
        yield
    finally:
        del base._get_candidate_generator
