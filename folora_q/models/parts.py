"""Parts of models under the types that they have, which PEFT and transformers do not declare."""

from __future__ import annotations

from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def base_of(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model; a model without an adapter is returned as it is."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def embedding_rows(model: PeftModel | PreTrainedModel) -> int:
    """Return the number of rows of the input embedding."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
