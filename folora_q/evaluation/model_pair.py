"""A tuned model with its base: one model whose adapter is switched on and off, or two models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from folora_q.errors import UserError
from folora_q.models.adapters import adapter_off


class ModelPair:
    """What is compared.

    Args:
        model: with an adapter, whose base is itself with the adapter off; or a model without one, and then
        base: the model to compare it with.

    Raises:
        UserError: the two have vocabularies of different sizes.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, base: PreTrainedModel | None = None) -> None:
        self.adapted = model if isinstance(model, PeftModel) else None
        self.model = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
        self.other = base
        head = self.model.get_output_embeddings()
        self.switches_head = isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper)
        if (self.adapted is None) == (base is None):
            raise ValueError("give a model with an adapter, or two models")
        if base is not None and vocabulary(base) != vocabulary(self.model):
            raise UserError(
                f"the tuned model has {vocabulary(self.model):,} words and its base {vocabulary(base):,}: their "
                "predictions cannot be compared",
                "is it the right base?",
            )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def base(self, head_only: bool = False) -> Iterator[PreTrainedModel]:
        """The base, while this lasts.

        Args:
            head_only: nothing but its head is asked. Most adapters leave that alone, and switching takes milliseconds.
        """
        if self.other is not None:
            yield self.other
        elif self.adapted is None or (head_only and not self.switches_head):
            yield self.model
        else:
            with adapter_off(self.adapted):
                yield self.model

    @contextmanager
    def tuned(self) -> Iterator[PreTrainedModel]:
        """The tuned model, while this lasts."""
        yield self.model

    def eval(self) -> None:
        """Switch dropout off in both."""
        for model in (self.adapted or self.model, self.other):
            if model is not None:
                model.eval()


def vocabulary(model: PreTrainedModel) -> int:
    """How many logits the model gives for a position."""
    return cast(nn.Linear, model.get_output_embeddings()).weight.shape[0]
