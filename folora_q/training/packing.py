"""Measure whether packed samples stay separate in this model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from folora_q.errors import UserError

# Number of tokens of each sample, enough to detect an influence.
PROBE_LENGTH = 32
# Largest change of logits by packing, relative to the change from really attending to the neighbour: rounding only.
TOLERANCE = 0.1


def check_packing(model: PeftModel, first: Sequence[int], second: Sequence[int]) -> None:
    """Compare the logits of `second` alone, packed behind `first`, and as a continuation of `first`.

    Args:
        first, second: token ids of two training examples.

    Raises:
        UserError: when packed, the second sample attends to the first.
    """
    before, after = list(first)[:PROBE_LENGTH], list(second)[:PROBE_LENGTH]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    packed = collate([{"input_ids": before + after, "seq_lengths": [len(before), len(after)]}])
    packed.pop("labels")
    training = model.training
    model.eval()

    def logits(**inputs: Tensor) -> Tensor:
        inputs = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits[0, -len(after) :].float()

    alone = logits(input_ids=torch.tensor([after]))
    apart = (logits(**packed) - alone).abs().mean()
    continued = (logits(input_ids=torch.tensor([before + after])) - alone).abs().mean()
    model.train(training)
    if not apart <= TOLERANCE * continued:
        backend = getattr(model.config, "_attn_implementation", "its attention")
        raise UserError(
            f"packed samples would see each other in this model with {backend}",
            "set training.packing: false, or model.attn_implementation: flash_attention_2 where it is installed",
        )
