"""Compute logits in chunks: full-vocabulary logits of a complete batch are never in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from folora_q.block_sizes import HEAD_ROWS, LOGIT_ROWS
from folora_q.errors import RunError

# Difference of one model's logits computed in two ways in bfloat16, relative to the largest.
HEAD_TOLERANCE = 0.02


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the backbone's last hidden states, (b, t, h), before the language-model head."""
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def head_logits(model: PreTrainedModel, hidden: Tensor, exact: bool = False) -> Tensor:
    """Return float32 logits (n, vocabulary) of hidden states (n, h), scaled and capped as the configuration says.

    Args:
        exact: compute the head in float32, without gradients. In bfloat16 each logit is rounded to 8 bits, which alone
            gives a KL of 3e-4 nats between two computations of one model, and an error of 10 % in a KL of .01.
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
    """Apply the head in float32, in slices of its rows: a float32 copy of the complete weight may not fit."""
    states = hidden.float()
    logits = torch.cat([states @ rows.float().T for rows in head.weight.split(HEAD_ROWS)], -1)
    return logits if head.bias is None else logits + head.bias.float()


def verify_chunked_logits(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Check that chunked logits equal the model's own; some architectures do more after the head.

    Raises:
        RunError: they differ.
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
