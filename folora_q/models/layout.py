"""Find how a model class names its weights in memory and on disk, on the meta device.

Names of modules and names in files differ: transformers renames and joins weights when it loads them (experts, the
language model of a vision-language checkpoint). Only its own conversion is used here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import bitsandbytes as bnb
from accelerate import init_empty_weights
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from folora_q.models.classes import auto_class
from folora_q.models.quantization import Quantization
from folora_q.models.trust import NOTHING, Trust


@dataclass(frozen=True)
class Layout:
    """Where the weights of a checkpoint go.

    Attributes:
        parameter_of: by name on disk, the parameter that it is loaded into, without weights that the class does not
            use, such as the vision tower of a checkpoint that is loaded for text.
        converted: names on disk of weights that are not only renamed, such as experts that are stacked.
        transposed: parameters that are stored as (in, out).
        tied: by parameter, the one that it is tied to.
    """

    parameter_of: Mapping[str, str]
    converted: frozenset[str]
    transposed: frozenset[str]
    tied: Mapping[str, str]
    _renamed: Mapping[str, str]

    def stored_as(self, weight: str) -> list[str]:
        """Return the names on disk of a parameter's weights, given its name in this or an earlier transformers."""
        return self._stored_as.get(self._renamed.get(weight, weight), [])

    @cached_property
    def _stored_as(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for stored, parameter in self.parameter_of.items():
            found.setdefault(parameter, []).append(stored)
        return found


def read_layout(folder: Path, stored: Iterable[str], others: Iterable[str] = (), trust: Trust = NOTHING) -> Layout:
    """Read the layout of the model in a folder.

    Args:
        stored: names of the weights on disk.
        others: names of weights in other files, such as adapters, perhaps from an earlier transformers.
    """
    model = _empty(folder, trust)
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    known = model.state_dict()
    parameter_of: dict[str, str] = {}
    converted: set[str] = set()

    def place(name: str) -> tuple[str, bool]:
        """Return the parameter as `convert_and_load_state_dict_in_model` finds it, and whether it is converted."""
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        return renamed, pattern is not None

    for name in stored:
        parameter, is_converted = place(name)
        if parameter in known:
            parameter_of[name] = parameter
            if is_converted:
                converted.add(name)
    return Layout(
        parameter_of=parameter_of,
        converted=frozenset(converted),
        transposed=frozenset(f"{name}.weight" for name, one in model.named_modules() if isinstance(one, Conv1D)),
        tied=dict(model.all_tied_weights_keys),
        _renamed={name: place(name)[0] for name in others if name not in known},
    )


def quantized_parameters(folder: Path, quantization: Quantization, trust: Trust = NOTHING) -> set[str]:
    """Return the parameters that transformers quantizes to 4 bits when it loads this model; nothing is loaded."""
    model = _empty(folder, trust)
    quantizer = AutoHfQuantizer.from_config(quantization.config(), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def _empty(folder: Path, trust: Trust) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
    with init_empty_weights():
        return auto_class(config).from_config(config, trust_remote_code=trust.remote_code)
