"""A tuned model and its base: one model whose adapter is switched on and off, or two models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from folora_q.data.tokens import Batch
from folora_q.distributed.processes import ONE, Processes
from folora_q.errors import UserError
from folora_q.models.adapters import adapter_off
from folora_q.models.logits import head_logits, hidden_states
from folora_q.models.parts import base_of


class ModelPair:
    """The two models that are compared.

    Args:
        model: a model with an adapter, whose base is itself with the adapter off, or one without an adapter.
        base: the base of a model without an adapter.
        remember: keep the base's hidden states of every batch in the host's memory, for texts that are read repeatedly.
        processes: each has the two models, and compares them on a part of a text.

    Raises:
        UserError: the vocabularies have different sizes.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        base: PreTrainedModel | None = None,
        remember: bool = False,
        processes: Processes = ONE,
    ) -> None:
        self.processes = processes
        self._remembered: dict[tuple[bytes, ...], Tensor] | None = {} if remember else None
        self.adapted = model if isinstance(model, PeftModel) else None
        self.model = base_of(model)
        self.other = base
        head = self.model.get_output_embeddings()
        self.switches_head = isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper)
        if (self.adapted is None) == (base is None):
            raise ValueError("give a model with an adapter, or two models")
        if base is not None and vocabulary(base) != vocabulary(self.model):
            raise UserError(
                f"the vocabulary of the tuned model has {vocabulary(self.model):,} tokens and that of its base "
                f"{vocabulary(base):,}: their predictions cannot be compared",
                "is it the right base?",
            )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        """Provide the base within this context."""
        if self.other is not None:
            yield self.other
        elif self.adapted is not None:
            with adapter_off(self.adapted):
                yield self.model

    def log_probabilities(self, of_base: Tensor, of_tuned: Tensor) -> tuple[Tensor, Tensor]:
        """Return the float32 log-probabilities (n, vocabulary) of base and tuned model from hidden states, (n, h)."""
        if self.other is None and not self.switches_head:  # one head: its weights are converted once
            both = head_logits(self.model, torch.cat([of_base, of_tuned]), exact=True)
            log_p, log_q = log_softmax(both, dim=-1).chunk(2)
            return log_p, log_q
        with self.base() as base:
            log_p = log_softmax(head_logits(base, of_base, exact=True), dim=-1)
        return log_p, log_softmax(head_logits(self.model, of_tuned, exact=True), dim=-1)

    def base_states(self, batch: Batch) -> Tensor:
        """Return the base's hidden states at the tokens of a batch that count, (n, h)."""
        if self._remembered is None:
            return self._base_states(batch)
        parts = batch.input_ids, batch.attention_mask, batch.labels
        key = tuple(part.cpu().numpy().tobytes() for part in parts)
        if key not in self._remembered:
            self._remembered[key] = self._base_states(batch).cpu()
        return self._remembered[key].to(batch.input_ids.device)

    def _base_states(self, batch: Batch) -> Tensor:
        with self.base() as base:
            return hidden_states(base, batch.input_ids, batch.attention_mask)[batch.loss_positions]

    @contextmanager
    def tuned(self) -> Iterator[PreTrainedModel]:
        """Provide the tuned model within this context."""
        yield self.model

    def eval(self) -> None:
        """Set both models to evaluation mode, without dropout."""
        for model in (self.adapted or self.model, self.other):
            if model is not None:
                model.eval()


def vocabulary(model: PreTrainedModel) -> int:
    """Return the number of logits per position."""
    return cast(nn.Linear, model.get_output_embeddings()).weight.shape[0]
