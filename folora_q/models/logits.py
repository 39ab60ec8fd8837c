"""Logits in chunks: full-vocabulary logits of a whole batch are never in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from folora_q.block_sizes import HEAD_ROWS, LOGIT_ROWS
from folora_q.errors import RunError

# Logits of one model computed in two ways, in bfloat16: relative to their largest.
HEAD_TOLERANCE = 0.02


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The backbone's last hidden states, (b, t, h), before the language-model head."""
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def head_logits(model: PreTrainedModel, hidden: Tensor, exact: bool = False) -> Tensor:
    """Float32 logits (n, vocabulary) of hidden states (n, h), scaled and capped as the model's configuration says.

    Args:
        exact: compute the head in float32. In bfloat16 each logit is rounded to 8 bits, which alone is a KL of 3e-4
            nats between a model and itself computed otherwise, and 10 % of a KL of .01. Without gradients.
    """
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has a head"
    logits = _float32_linear(head, hidden) if exact and type(head) is nn.Linear else head(hidden).float()
    config = model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def _float32_linear(head: nn.Linear, hidden: Tensor) -> Tensor:
    """The head's product in float32, in slices of its rows: a float32 copy of the whole weight may not fit."""
    states = hidden.float()
    logits = torch.cat([states @ rows.float().T for rows in head.weight.split(HEAD_ROWS)], -1)
    return logits if head.bias is None else logits + head.bias.float()


def verify_chunked_logits(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Make sure that chunked logits are the model's own; some architectures do more after the head than we know.

    Raises:
        RunError: they are not.
    """
    ids = input_ids[:1]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1:].float()
        found = head_logits(model, hidden_states(model, ids, torch.ones_like(ids))[0, -1:])
    if not bool((expected - found).abs().max() <= HEAD_TOLERANCE * expected.abs().max()):
        raise RunError(f"the logits of {type(model).__name__} cannot be computed in chunks: something follows its head")


def chunks(rows: int) -> Iterator[slice]:
    """Yield slices of at most LOGIT_ROWS rows."""
    for start in range(0, rows, LOGIT_ROWS):
        yield slice(start, min(start + LOGIT_ROWS, rows))
