"""A Gemma 4 base and its multi-token-prediction drafter as one module with a joint forward.

The base runs once. Its keys and values, its input embeddings and its final hidden state then feed K rounds of the
drafter at every row of the sequence at once, and one pass over the targets makes all the losses.

Each model is an FSDP2 root of its own. The loss reads both heads and the drafter reads the base's embedding, so all of
it runs inside a forward of the base's root and, within that, of the drafter's: :meth:`JointModel.forward` enters
both through ``within``, which ``parallelize`` registers with FSDP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gemma4.modeling_gemma4 import get_block_sequence_ids_for_mask

from joint_train.config import LossConfig, round_weights
from joint_train.errors import ConfigError
from joint_train.pair.adapters import Adapters
from joint_train.pair.centroids import Centroids, token_centroids
from joint_train.pair.compatibility import check_pair
from joint_train.pair.halves import input_embedding
from joint_train.pair.loss import joint_loss
from joint_train.pair.recompute import REPLAYED, HostCopies, TrainableKernels, checkpointed
from joint_train.pair.scaled import scale_gradient
from joint_train.pair.stats import JointStats
from joint_train.pair.targets import JointTargets, joint_targets, sum_weights
from joint_train.pair.tied import TiedGradient
from joint_train.pair.visibility import Masks, attention_masks

if TYPE_CHECKING:
    from joint_train.pair.halves import Base, Drafter

FIRST_TOKEN = {"serving": 1, "same_token": 0}  # round k of row t reads the token at t + FIRST_TOKEN + k


@dataclass
class Gemma4JointOutput:
    """Output of :class:`JointModel`.

    Attributes:
        logits: base logits ``[B, S, V]``, when asked for.
        drafter_logits: K tensors ``[B, S, V]``, when asked for. Row t of round k predicts the token after the one that
            round k reads. Rows so near the end that this token is past it carry no meaning.
        drafter_loss_weight: lambda, the weight of the drafter's loss in ``loss``.
        hidden_states: the base's hidden states, of which ``[-1]`` is the final one after the norm, ``[B, S, H_b]``;
            the others only with ``output_hidden_states=True``.
        loss: scalar, ``L_base + lambda * sum_k w_k * L_k``, when labels are given.
        stats: the sums behind the loss and its metrics, detached, when labels are given.
        targets: what the sums were taken over; ``targets.counts`` are their denominators.
    """

    logits: Tensor | None = None
    drafter_logits: list[Tensor] = field(default_factory=list)
    drafter_loss_weight: float = 1.0
    hidden_states: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None
    stats: JointStats | None = None
    targets: JointTargets | None = None


def _within(module: nn.Module, function, *args):
    """Run a function as a forward of ``module``: under FSDP2 its root's weights are gathered meanwhile."""
    return function(*args)


class JointModel(nn.Module):
    """A base and its drafter, trained together: the mathematics of
    :class:`joint_train.weights.composite.Gemma4WithDrafter`, which adds reading and writing.

    Args:
        base: ``Gemma4ForConditionalGeneration`` or ``Gemma4ForCausalLM`` (or their unified counterparts).
        drafter: ``Gemma4AssistantForCausalLM`` with ``backbone_hidden_size`` equal to the base's hidden size.
        drafter_loss_weight: lambda.
        drafter_num_steps: K, rounds of the drafter for each row.
        freeze_base_for_drafter: train the drafter alone.
        share_embedding_with_base: copy the base's input embedding into the drafter's, once, now.
        base_activation_checkpointing: recompute the base's layers in the backward.
        drafter_activation_checkpointing: recompute the drafter's rounds in the backward.
        pairing: ``serving`` or ``same_token``: which token meets which state in a round.
        rope_position: ``last_kv``: row t rotates at its own position; ``next_token``: at the next.
        base_grad_scale: what the drafter's gradient is multiplied by where it enters the base: at its keys and values,
            its input embeddings and its final hidden state. The drafter's own gradient doesn't depend on it.
        prompt_rows: as for :func:`joint_train.pair.targets.joint_targets`; by default only with ``same_token``.
        loss: the ``loss`` configuration group; its defaults otherwise.

    Raises:
        ValueError: for K < 1, a pair that doesn't fit together, or embeddings of different shapes to share.
    """

    supports_gradient_checkpointing = True
    frozen_base: dict[str, str] | None = None  # what checkpoints without the base's weights name the base by
    read_base: Callable[[], None] | None = None  # reads the base's weights from its folder again
    base_stays: bool = False  # the base's weights are those of its folder, to the end: checkpoints don't hold them
    adapters: Adapters | None = None  # that the base has on it one at a time, for each document its own
    drafter_average: dict[str, Tensor] | None = None  # of its weights over the steps, by name: optim.drafter_ema

    def __init__(
        self,
        base: PreTrainedModel,
        drafter: PreTrainedModel,
        *,
        drafter_loss_weight: float = 1.0,
        drafter_num_steps: int = 1,
        freeze_base_for_drafter: bool = False,
        share_embedding_with_base: bool = False,
        base_activation_checkpointing: bool = False,
        drafter_activation_checkpointing: bool = False,
        pairing: str = "serving",
        rope_position: str = "last_kv",
        base_grad_scale: float = 1.0,
        prompt_rows: bool | None = None,
        loss: LossConfig | None = None,
    ) -> None:
        super().__init__()
        if drafter_num_steps < 1:
            raise ValueError(f"drafter_num_steps={drafter_num_steps}: the drafter needs at least one round.")
        if pairing not in FIRST_TOKEN:
            raise ValueError(f"pairing={pairing!r}: choose one of {', '.join(FIRST_TOKEN)}.")
        if rope_position not in ("last_kv", "next_token"):
            raise ValueError(f"rope_position={rope_position!r}: choose last_kv or next_token.")
        if not 0 <= base_grad_scale <= 1:
            raise ValueError(f"base_grad_scale={base_grad_scale}: give a number from 0 to 1.")
        self.base = cast("Base", base)
        self.drafter = cast("Drafter", drafter)
        self.drafter_loss_weight = float(drafter_loss_weight)
        self.drafter_num_steps = int(drafter_num_steps)
        self.freeze_base_for_drafter = bool(freeze_base_for_drafter)
        self.share_embedding_with_base = bool(share_embedding_with_base)
        self.drafter_recompute = "full" if drafter_activation_checkpointing else "none"  # or layers: one at a time
        self.host_copies: HostCopies | None = None  # of the inputs of what is recomputed
        self.pairing = pairing
        self.rope_position = rope_position
        self.base_grad_scale = float(base_grad_scale)
        self.prompt_rows = prompt_rows
        self._token_centroid: tuple[int, Tensor] | None = None  # and the version of the ordering that it is made of
        self.loss_budget_mb: int | None = None  # of a run, where one is decided for all of it
        self.loss = loss if loss is not None else LossConfig()
        check_pair(base.config, drafter.config)

        if freeze_base_for_drafter:
            base.requires_grad_(False)
        # A parameter that never gets a gradient never gets optimizer state, and then a resume can't find it.
        drafter.requires_grad_(True)
        self.drafter.post_projection.requires_grad_(self.drafter_num_steps > 1)
        if self.drafter.masked_embedding is not None:
            self.drafter.masked_embedding.centroids.requires_grad_(self.loss.centroid_weight > 0)
        if base_activation_checkpointing:
            base.gradient_checkpointing_enable(REPLAYED)
        if share_embedding_with_base and not input_embedding(base).weight.is_meta:
            self.share_embedding()
        for model in (self.base, self.drafter):
            model.within = MethodType(_within, model)

    @torch.no_grad()
    def share_embedding(self) -> None:
        """Copy the base's input embedding into the drafter's (and the head tied to it).

        Raises:
            ConfigError: if the two tables differ in shape.
        """
        source, target = input_embedding(self.base).weight, input_embedding(self.drafter).weight
        if source.shape != target.shape:
            raise ConfigError(
                f"share_embedding_with_base=True needs tables of one shape; the base's is {tuple(source.shape)}, the "
                f"drafter's {tuple(target.shape)}. Set drafter.share_embedding_with_base=false."
            )
        target.copy_(source)

    def freeze_base(self) -> None:
        """Train the drafter alone from now on, as with ``freeze_base_for_drafter``; under FSDP2 between two steps."""
        self.freeze_base_for_drafter = True
        for parameter in self.base.parameters():
            parameter.grad = None
        self.base.requires_grad_(False)

    def parts(self) -> tuple[tuple[str, PreTrainedModel], tuple[str, PreTrainedModel]]:
        """Both models with their names."""
        return ("base", self.base), ("drafter", self.drafter)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        targets: JointTargets | None = None,
        weights: Tensor | None = None,
        groups: Tensor | None = None,
        num_groups: int = 0,
        return_logits: bool | None = None,
        output_hidden_states: bool = False,
        token_weights: Tensor | None = None,
        hidden_states: Tensor | None = None,
        shared_kv_states: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        **base_inputs: Any,
    ) -> Gemma4JointOutput:
        """Base once, drafter K times, all losses in one pass.

        With ``hidden_states`` and ``shared_kv_states``, of a forward that was made elsewhere, the base doesn't run. The
        loss is then the drafter's, ``lambda * sum_k w_k * L_k``, with the base as a constant: it gets no gradient.

        Args:
            input_ids: ``[B, S]`` int64.
            attention_mask: ``[B, S]``, 1 for tokens and 0 for padding on either side or in between; not needed for
                padding on the right, which causality hides.
            position_ids: ``[B, S]`` int64; 0, 1, … in every row by default.
            labels: ``[B, S]`` int64, the token itself where it is a target and -100 elsewhere; not shifted.
            document_ids: ``[B, S]`` int64 for rows of several documents, 0 for padding; replaces ``attention_mask``.
            targets: what :func:`joint_targets` makes of the labels; a training loop makes it before the batch goes to
                the GPU, so that nothing waits here.
            weights: ``[1 + K]`` float, the coefficient of each sum of losses: 1 over the targets of the whole step, and
                lambda w_k over those of round k; by default those of this batch.
            groups, num_groups: per-source sums, see :func:`joint_loss`.
            return_logits: also return full-vocabulary logits; by default only without labels.
            output_hidden_states: also return the hidden state of every base layer.
            token_weights: ``[B, S]`` float, not below 0, with labels: a factor on the losses of the target at each
                position. The loss is then a weighted mean.
            hidden_states: ``[B, S, H_b]``, the base's final hidden state of ``input_ids`` (``hidden_states[-1]``).
            shared_kv_states: the keys and values of the same forward (``return_shared_kv_states=True``), of each layer
                type ``[B, heads, S, size]`` each.
            inputs_embeds: ``[B, S, H_b]``, its input embeddings, for pictures; by default looked up.
            **base_inputs: ``pixel_values``, ``mm_token_type_ids``, ``input_features``, … go to the base untouched, and
                never to the drafter.

        Raises:
            ValueError: without ``input_ids``, or for arguments that don't go together, which it names.
        """
        if input_ids is None:
            raise ValueError("Gemma4WithDrafter needs input_ids: the drafter reads the tokens' embeddings.")
        given = None
        if token_weights is not None and labels is None:
            raise ValueError("token_weights are of the labels' targets: give labels, or targets that have them.")
        if hidden_states is not None or shared_kv_states is not None or inputs_embeds is not None:
            if hidden_states is None or not shared_kv_states:
                raise ValueError("give both hidden_states and shared_kv_states of one forward of the base.")
            if unread := [*base_inputs, *["output_hidden_states"] * output_hidden_states]:
                raise ValueError(f"{', '.join(unread)}: the base doesn't run where its hidden_states are given.")
            given = hidden_states, dict(shared_kv_states), inputs_embeds
        if document_ids is None and attention_mask is not None:
            document_ids = attention_mask.long()
        if labels is not None and targets is None:
            how = self.drafter_num_steps, self.pairing, self.prompt_rows, token_weights
            targets = joint_targets(labels, document_ids, *how)
        if targets is not None and weights is None:
            weights = self.loss_weights(targets.mass)
        if weights is not None and given is not None:  # the policy's own loss is elsewhere
            weights = torch.cat([torch.zeros_like(weights[:1]), weights[1:]])
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if return_logits is None:
            return_logits = targets is None
        loss_inputs = None if targets is None else (targets, weights, groups, num_groups)
        # Bound to the function, not passed: FSDP rounds a forward's arguments to the dtype of compute.
        joint = partial(self._joint, loss_inputs)
        if given is not None:
            joint = partial(self._given, loss_inputs, given)
        with TrainableKernels():
            outputs = self.base.within(
                joint, input_ids, position_ids, document_ids, base_inputs, return_logits, output_hidden_states
            )
        return Gemma4JointOutput(**outputs, drafter_loss_weight=self.drafter_loss_weight, targets=targets)

    def loss_weights(self, counts: Tensor) -> Tensor:
        """Coefficients of the 1 + K loss sums, ``[1 + K]``, for ``counts`` ``[1 + K]`` targets in the whole step."""
        return sum_weights(counts, round_weights(self.loss, self.drafter_num_steps), self.drafter_loss_weight)

    def centroids(self) -> Centroids | None:
        """The routing of a drafter with ordered embeddings."""
        routing = self.drafter.masked_embedding
        if routing is None:
            return None
        ordering = routing.token_ordering
        if self._token_centroid is None or self._token_centroid[0] != ordering._version:  # loaded since
            self._token_centroid = ordering._version, token_centroids(ordering, routing.num_centroids)
        return Centroids(routing.centroids.weight, self._token_centroid[1], routing.centroid_intermediate_top_k)

    def _joint(
        self, loss_inputs, input_ids, position_ids, document_ids, base_inputs, return_logits, output_hidden_states
    ) -> dict[str, Any]:
        """The joint forward, inside the base's FSDP forward. Only tensors leave it, so that FSDP sees its outputs."""
        base_text, drafter_text = self.base.config.get_text_config(), self.drafter.config.get_text_config()
        embedding = input_embedding(self.base)
        shape, dtype, device = input_ids.shape, embedding.weight.dtype, input_ids.device
        masks = attention_masks(base_text, shape, dtype, device, document_ids)
        drafter_masks = masks
        if base_text.sliding_window != drafter_text.sliding_window:
            drafter_masks = attention_masks(drafter_text, shape, dtype, device, document_ids)
        if base_text.use_bidirectional_attention == "vision" and base_inputs.get("mm_token_type_ids") is not None:
            images = get_block_sequence_ids_for_mask(base_inputs["mm_token_type_ids"], device)
            masks = attention_masks(base_text, shape, dtype, device, document_ids, images)

        embedded = []
        # The base looks its embeddings up once; a second look-up would make a second gradient of the whole table.
        hook = embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
        tied = None
        if loss_inputs is not None and embedding.weight.requires_grad and embedding.weight is self.base.lm_head.weight:
            tied = TiedGradient()
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_base_for_drafter),
            tied.lookups_of(embedding) if tied is not None else nullcontext(),
        ):
            try:
                base_out = self.base.model(
                    input_ids=input_ids,
                    attention_mask=masks,
                    position_ids=position_ids,
                    use_cache=False,
                    return_shared_kv_states=True,
                    output_hidden_states=output_hidden_states,
                    **base_inputs,
                )
            finally:
                hook.remove()
            hidden = base_out.last_hidden_state
        if not base_out.shared_kv_states:
            raise RuntimeError(
                f"the base ({type(self.base).__name__}) returned no shared_kv_states; joint_train needs the pinned "
                "transformers release."
            )
        positions = position_ids + (self.rope_position == "next_token")
        draft = partial(self._draft, loss_inputs, tied)
        outputs = self.drafter.within(
            draft, embedded[0], hidden, dict(base_out.shared_kv_states), drafter_masks, positions, return_logits
        )
        if return_logits:
            outputs["logits"] = self.base_logits(hidden)
        outputs["hidden_states"] = base_out.hidden_states if output_hidden_states else (hidden,)
        return outputs

    def _given(
        self, loss_inputs, given, input_ids, position_ids, document_ids, _base_inputs, return_logits, _hidden_too
    ) -> dict[str, Any]:
        """:meth:`_joint` after a forward of the base that was made elsewhere. Arguments are those, and what it left."""
        text, (hidden, shared_kv, embedded) = self.drafter.config.get_text_config(), given
        hidden = hidden.detach()
        shared_kv = {kind: (k.detach(), v.detach()) for kind, (k, v) in shared_kv.items()}
        with torch.no_grad():
            embedded = input_embedding(self.base)(input_ids) if embedded is None else embedded.detach()
        masks = attention_masks(text, input_ids.shape, hidden.dtype, input_ids.device, document_ids)
        positions = position_ids + (self.rope_position == "next_token")
        draft = partial(self._draft, loss_inputs, None, train_base=False)
        outputs = self.drafter.within(draft, embedded, hidden, shared_kv, masks, positions, return_logits)
        if return_logits:
            outputs["logits"] = self.base_logits(hidden)
        outputs["hidden_states"] = (hidden,)
        return outputs

    def base_logits(self, hidden: Tensor) -> Tensor:
        """The base's logits ``[..., V]`` of final hidden states ``[..., H_b]``; under FSDP2 inside ``base.within``."""
        logits = self.base.lm_head(hidden)
        if (cap := self.base.config.get_text_config().final_logit_softcapping) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _draft(
        self,
        loss_inputs: tuple | None,
        tied: TiedGradient | None,
        embedded: Tensor,
        hidden: Tensor,
        shared_kv: dict[str, tuple[Tensor, Tensor]],
        masks: Masks,
        position_ids: Tensor,
        return_logits: bool,
        train_base: bool = True,
    ) -> dict[str, Any]:
        """K rounds and the losses, inside the drafter's FSDP forward; masks and rotary tables serve every round."""
        drafter, text = self.drafter, self.drafter.model
        # Once, outside of the rounds, which may be recomputed. The losses read `hidden` as it is.
        scale = self.base_grad_scale
        embedded, read = scale_gradient(embedded, scale), scale_gradient(hidden, scale)
        shared_kv = {kind: (scale_gradient(k, scale), scale_gradient(v, scale)) for kind, (k, v) in shared_kv.items()}
        kinds = cast(list[str], text.config.layer_types)  # a configuration fills it where it isn't given
        rotary = {kind: text.rotary_emb(hidden, position_ids, kind) for kind in set(kinds)}

        def round_of(k: int, state: Tensor) -> Tensor:
            token = shift_left(embedded, FIRST_TOKEN[self.pairing] + k)
            x = drafter.pre_projection(torch.cat([token, state], dim=-1))
            for layer, kind in zip(text.layers, kinds, strict=True):
                inputs = {"position_embeddings": rotary[kind], "attention_mask": masks[kind]}
                x = run_layer(partial(layer, shared_kv_states=shared_kv, **inputs), x)
            return text.norm(x)

        def run_layer(layer, x: Tensor) -> Tensor:
            return layer(x)

        if self.drafter_recompute != "none" and torch.is_grad_enabled():
            dropout = bool(text.config.attention_dropout)  # the replay has to drop what the forward dropped
            again = partial(checkpointed, host=self.host_copies, preserve_rng_state=dropout)
            if self.drafter_recompute == "full":
                round_of = partial(again, round_of)
            else:
                run_layer = again
        state, rounds = read, []
        for k in range(self.drafter_num_steps):
            rounds.append(round_of(k, state))
            if k + 1 < self.drafter_num_steps:
                state = drafter.post_projection(rounds[-1])

        outputs: dict[str, Any] = {}
        if loss_inputs is not None:
            targets, weights, groups, num_groups = loss_inputs
            outputs["loss"], outputs["stats"] = joint_loss(
                hidden,
                self.base.lm_head.weight,
                rounds,
                drafter.lm_head.weight,
                targets,
                weights,
                self.loss,
                softcap=self.base.config.get_text_config().final_logit_softcapping,
                drafter_softcap=None,  # the drafter's own forward has none, and it is what serving runs
                centroids=self.centroids(),
                train_base=train_base and not self.freeze_base_for_drafter,
                groups=groups,
                num_groups=num_groups,
                tied=tied,
                budget_mb=self.loss_budget_mb,
            )
        if return_logits:
            outputs["drafter_logits"] = [drafter.lm_head(h) for h in rounds]
        return outputs


def shift_left(x: Tensor, n: int) -> Tensor:
    """``[B, S, H]`` with row t holding what row t + n held, and zeros in the last n rows."""
    return x if n == 0 else nn.functional.pad(x[:, n:], (0, 0, 0, min(n, x.shape[1])))
