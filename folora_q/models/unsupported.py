"""Refuse architectures that cannot be fine-tuned here, by config.json. Needs neither PyTorch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from folora_q.errors import UserError
from folora_q.recipe.paths import short

OWN_LINEAR = "its linear layers have a class of their own, which bitsandbytes does not quantize"
SEQUENCE = "it is an encoder-decoder, and only decoders are supported"
# By model_type: the reason, and what to use instead.
UNSUPPORTED = {
    "falcon": (OWN_LINEAR, "Falcon 3, which is built as Llama is, or another model of this size"),
    **dict.fromkeys(
        ("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "t5gemma", "t5gemma2"),
        (SEQUENCE, "a decoder, such as one of Llama, Qwen, Mistral or Gemma"),
    ),
}


def refuse_unsupported(name: str, config: Mapping[str, Any]) -> None:
    """Check that a model's architecture can be fine-tuned.

    Args:
        name: the model's name, for the message.
        config: config.json.

    Raises:
        UserError: it cannot; the hint says what to use instead.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in UNSUPPORTED:
        reason, instead = UNSUPPORTED[kind]
        raise UserError(f"{short(name)} ({kind}) cannot be fine-tuned here: {reason}", f"use {instead}")
