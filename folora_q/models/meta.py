"""A model's parameters without its weights: built on the meta device, where tensors have shapes and no numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from folora_q.errors import UserError, first_line


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
    if kind not in CONFIG_MAPPING:
        raise UserError(f"transformers knows no model of the type {kind!r}")
    try:
        full = CONFIG_MAPPING[kind].from_dict(dict(config))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(full, trust_remote_code=False)
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise UserError(f"transformers cannot build this model from its config.json: {first_line(error)}") from error
    head = model.get_output_embeddings()
    owners = {
        id(parameter): module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        for parameter in module.parameters(recurse=False)
    }
    return full.to_dict(), [
        (name, _as_linear(parameter, owners.get(id(parameter))), id(parameter) in owners)
        for name, parameter in model.named_parameters()
    ]


def _as_linear(parameter: torch.nn.Parameter, owner: torch.nn.Module | None) -> tuple[int, ...]:
    shape = tuple(parameter.shape)
    return shape[::-1] if isinstance(owner, Conv1D) else shape
