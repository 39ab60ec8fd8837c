"""Build a model on the meta device: parameters have shapes and no values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from folora_q.errors import UserError, first_line
from folora_q.models.classes import auto_class
from folora_q.models.trust import NOTHING, Trust
from folora_q.recipe.paths import short
from folora_q.recipe.target_modules import Modules
from folora_q.storage.untrusted import finite

# What transformers may raise for an invalid configuration.
UNBUILDABLE = (
    *(ValueError, TypeError, AttributeError, ImportError, RuntimeError, LookupError, ArithmeticError, AssertionError),
    StrictDataclassError,
)
# Classes of layers that transformers lets bitsandbytes quantize; subclasses are skipped.
QUANTIZED = (torch.nn.Linear, Conv1D)
COUNTING, MAX_LAYERS = re.compile("layer|block|depth|expert|stage"), 2_000


def parameter_shapes(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], bool]]]:
    """Return a model's parameters, from its configuration.

    Args:
        config: config.json.

    Returns:
        The configuration with defaults filled in; and for every parameter the name, the shape ((out, in) for weights),
        and whether it belongs to a linear layer other than the head.

    Raises:
        UserError: transformers has no such causal language model; a model's own code is never run for this.
    """
    model, full = _built(config)
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


def modules_without_weights(config: Mapping[str, Any]) -> Modules:
    """Return the modules of a model that a recipe's adapter section may name.

    Raises:
        UserError: as `parameter_shapes`.
    """
    return modules_of(_built(config)[0])


def modules_of(model: PreTrainedModel) -> Modules:
    """Return the modules of a model that a recipe's adapter section may name; linear layers may be in 4 bits."""
    names = {module: name for name, module in model.named_modules() if name}
    head, first = model.get_output_embeddings(), model.get_input_embeddings()
    linears = [name for module, name in names.items() if isinstance(module, torch.nn.Linear | Conv1D)]
    embeddings = [name for module, name in names.items() if isinstance(module, torch.nn.Embedding)]
    embeddings.sort(key=lambda name: name != names.get(first))
    return Modules(
        linears=[name for name in linears if name != names.get(head)],
        embeddings=embeddings,
        head=names.get(head, ""),
        tied=head is not None and first is not None and head.weight is first.weight,
        others=[name for name in names.values() if name not in {*linears, *embeddings}],
    )


def modules_in(folder: Path, trust: Trust = NOTHING, **changes: Any) -> Modules:
    """Return the modules of the model in a folder, as its class creates them; no weights are loaded.

    Args:
        changes: settings that replace those in config.json.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
        setattr(config, name, value)
    with torch.device("meta"):
        return modules_of(auto_class(config).from_config(config, trust_remote_code=trust.remote_code))


def _built(config: Mapping[str, Any]) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """Build the model on the meta device, and its configuration with defaults filled in.

    Raises:
        UserError: as `parameter_shapes`.
    """
    kind = config.get("model_type", "")
    for name, number in _counts(config):
        if number > MAX_LAYERS:
            raise UserError(f"config.json: {short(name)} is {number:,}, which no model has")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"config.json: transformers knows no model of the type {short(repr(kind))}")
    try:
        # JSON has no infinity: transformers encodes it in its own way.
        full = CONFIG_MAPPING[kind].from_dict(PreTrainedConfig._decode_special_floats(dict(config)))
        with torch.device("meta"):
            model = auto_class(full).from_config(full, trust_remote_code=False)
    except UNBUILDABLE as error:
        reason = first_line(error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error)
        raise UserError(f"transformers cannot build this model from its config.json: {reason}") from error
    return model, full


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield numbers of layers and the like in all parts of a model, which decide how many modules are built."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif COUNTING.search(str(name)):
            yield from ((name, number) for number in (value if isinstance(value, list) else [value]) if finite(number))


def _as_linear(parameter: torch.nn.Parameter, owner: torch.nn.Module | None) -> tuple[int, ...]:
    shape = tuple(parameter.shape)
    return shape[::-1] if isinstance(owner, Conv1D) else shape
