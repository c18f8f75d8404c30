"""The types of the pair's two halves. torch declares whatever a module holds as ``Tensor | Module``, and transformers
has one class for every model: what this package reads of a base and a drafter is named here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedModel

if TYPE_CHECKING:
    from transformers.models.gemma4.modeling_gemma4 import (
        Gemma4ForConditionalGeneration,
        Gemma4TextModel,
        Gemma4TextScaledWordEmbedding,
    )
    from transformers.models.gemma4_assistant.modeling_gemma4_assistant import Gemma4AssistantForCausalLM

    class Base(Gemma4ForConditionalGeneration):
        """A base: this class, ``Gemma4ForCausalLM`` or their unified counterparts, which have the same parts."""

        within: Callable[..., Any]  # runs a function as a forward of this model, see joint_train.pair.model

    class Drafter(Gemma4AssistantForCausalLM):
        """A drafter."""

        model: Gemma4TextModel  # transformers makes it by AutoModel, whose type says nothing
        within: Callable[..., Any]


def input_embedding(model: PreTrainedModel) -> Gemma4TextScaledWordEmbedding:
    """A model's table of input embeddings, ``[V, H]``."""
    return cast("Gemma4TextScaledWordEmbedding", model.get_input_embeddings())
