"""A model's parameters without its weights: built on the meta device, where tensors have shapes and no numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from folora_q.errors import UserError, first_line
from folora_q.models.classes import auto_class
from folora_q.reading import finite
from folora_q.recipe.paths import short

# What transformers raises for a configuration that makes no sense, by where it meets that.
UNBUILDABLE = (
    *(ValueError, TypeError, AttributeError, ImportError, RuntimeError, LookupError, ArithmeticError, AssertionError),
    StrictDataclassError,
)
# Classes of layers that transformers lets bitsandbytes put into 4 bits; it passes over classes made of them.
QUANTIZED = (torch.nn.Linear, Conv1D)
COUNTING, MOST = re.compile("layer|block|depth|expert|stage"), 2_000


def parameter_shapes(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], bool]]]:
    """What a model is made of.

    Args:
        config: config.json.

    Returns:
        The configuration with what config.json leaves out; and of every parameter the name, the shape, (out, in) of
        weights, and whether a linear layer other than the head holds it.

    Raises:
        UserError: transformers has no such causal language model; code that comes with one is never run for this.
    """
    kind = config.get("model_type", "")
    for name, number in _counts(config):
        if number > MOST:
            raise UserError(f"config.json: {short(name)} is {number:,}, which no model has")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"config.json: transformers knows no model of the type {short(repr(kind))}")
    try:
        # JSON has no infinity: transformers writes one in its own way.
        full = CONFIG_MAPPING[kind].from_dict(PreTrainedConfig._decode_special_floats(dict(config)))
        with torch.device("meta"):
            model = auto_class(full).from_config(full, trust_remote_code=False)
    except UNBUILDABLE as error:
        reason = first_line(error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error)
        raise UserError(f"transformers cannot build this model from its config.json: {reason}") from error
    head = model.get_output_embeddings()
    owners = {
        id(parameter): module
        for module in model.modules()
        if type(module) in QUANTIZED and module is not head
        for parameter in module.parameters(recurse=False)
    }
    return full.to_dict(), [
        (name, _as_linear(parameter, owners.get(id(parameter))), id(parameter) in owners)
        for name, parameter in model.named_parameters()
    ]


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers of layers and the like, of all parts of a model: as many modules are made."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif COUNTING.search(str(name)):
            yield from ((name, number) for number in (value if isinstance(value, list) else [value]) if finite(number))


def _as_linear(parameter: torch.nn.Parameter, owner: torch.nn.Module | None) -> tuple[int, ...]:
    shape = tuple(parameter.shape)
    return shape[::-1] if isinstance(owner, Conv1D) else shape
