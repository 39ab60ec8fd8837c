"""Parts of models under the types that they have, which PEFT and transformers do not declare."""

from __future__ import annotations

from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def base_of(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model that an adapter sits in; a model without an adapter is its own."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of rows of the input embedding."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
