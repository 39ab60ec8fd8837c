"""Choose the layers of a model that get an adapter, and list the parts without one.

Text passes only through the language model, and PEFT adapts linear layers. Experts that are stacked in one tensor are
not adapted: PEFT could do it (`target_parameters`), but materializes the update of every expert at each step, which
does not fit on a consumer card, and such updates can be neither gated nor merged here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes as bnb
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from folora_q.errors import UserError
from folora_q.models.parts import base_of

LINEAR = (nn.Linear, Conv1D)
# Parts that are not in 4 bits are listed from this share of the weights on, which norms and biases do not reach.
MIN_SHARE = 0.005


def choose_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Restrict `target_modules` to layers of the language model, if it also matches others.

    Raises:
        UserError: none of the layers that it matches can have an adapter.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, LINEAR)}
    wanted = _named(model, config, linear)
    reached = [name for name in wanted if _is_text(model, name)]
    taken = reached and _kept_by_peft(model, config, reached)
    if not taken:
        raise UserError(*_nothing_left(wanted, reached))
    if len(taken) < len(wanted) or _peft_renames(model):
        config.target_modules = sorted(taken)


def _named(model: PreTrainedModel, config: LoraConfig, linear: set[str]) -> list[str]:
    """Return the linear layers that the configuration matches, as PEFT finds them."""
    chosen = _maybe_include_all_linear_layers(copy.copy(config), model)
    return [name for name, _ in model.named_modules() if name in linear and check_target_module_exists(chosen, name)]


def _is_text(model: PreTrainedModel, name: str) -> bool:
    decoder = text_prefix(model)
    head = model.get_output_embeddings()
    return name.startswith(decoder) or (head is not None and model.get_submodule(name) is head)


def text_prefix(model: PreTrainedModel) -> str:
    """Return the prefix of the language model's module names; "" if the model has no other parts."""
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")


def _peft_renames(model: PreTrainedModel) -> bool:
    """Return whether PEFT mistakes names in this model for those of experts in earlier versions of transformers."""
    probe = LoraConfig(target_modules=["gate_proj", "up_proj", "w1", "w3"])
    convert_peft_config_for_transformers(probe, model, None)
    return bool(probe.target_parameters)


def _kept_by_peft(model: PreTrainedModel, config: LoraConfig, names: list[str]) -> list[str]:
    """Drop the names that PEFT mistakes for experts by their endings, such as a shared expert's linear layers."""
    if not _peft_renames(model):
        return names
    kept = []
    for name in names:
        probe = copy.copy(config)
        probe.target_modules, probe.target_parameters = [name], None
        try:
            convert_peft_config_for_transformers(probe, model, None)
        except ValueError:  # it names one of two weights that PEFT joins
            continue
        if probe.target_modules:
            kept.append(name)
    return kept


def _nothing_left(wanted: list[str], reached: list[str]) -> tuple[str, str]:
    if not reached:
        reason = "layers outside of the language model, through which no text passes"
    else:
        reason = "experts, or layers that PEFT mistakes for experts, which cannot be adapted"
    return f"`adapter.target_modules` names only {reason}, such as {wanted[0]}", "remove it for all-linear"


@dataclass(frozen=True)
class Part:
    """The weights with the same name in all layers.

    Attributes:
        name: the name of their module within the layer.
        share: their share of the model's weights.
    """

    name: str
    share: float


def without_adapter(model: PeftModel) -> list[Part]:
    """Return the parts without an adapter, except embeddings, head, norms and biases."""
    inner = base_of(model)
    adapted = {name for name, module in inner.named_modules() if isinstance(module, LoraLayer)}
    ends = {id(module) for module in (inner.get_input_embeddings(), inner.get_output_embeddings())}
    ignored = {name for name, module in inner.named_modules() if id(module) in ends or isinstance(module, nn.Embedding)}

    def is_left(owner: str, parameter: nn.Parameter) -> bool:
        return owner.removesuffix(".base_layer") not in adapted and owner not in ignored and parameter.ndim > 1

    return _parts(inner, is_left)


def in_16_bits(model: PreTrainedModel) -> list[Part]:
    """Return the parts of a base model that are not in 4 bits, without the smallest."""
    found = _parts(model, lambda owner, parameter: not isinstance(parameter, bnb.nn.Params4bit))
    return [part for part in found if part.share >= MIN_SHARE]


def _parts(model: PreTrainedModel, counts: Callable[[str, nn.Parameter], bool]) -> list[Part]:
    """Return the parts whose parameters are counted, the largest first."""
    prefix = text_prefix(model)
    sizes: dict[str, int] = {}
    total = 0
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if ".lora_" in name:
            continue
        size = _numel(parameter)
        total += size
        if counts(owner, parameter):
            part = _part_of(owner, prefix)
            sizes[part] = sizes.get(part, 0) + size
    ordered = sorted(sizes.items(), key=lambda one: -one[1])
    return [Part(name, size / total) for name, size in ordered]


def _numel(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # a byte holds two weights
    return parameter.numel() if state is None else state.shape.numel()


def _part_of(owner: str, prefix: str) -> str:
    """Return e.g. mlp.experts for model.layers.0.mlp.experts, and vision_tower for everything in it."""
    if prefix and not owner.startswith(prefix):
        outer = prefix.rstrip(".").rpartition(".")[0]
        return owner.removeprefix(f"{outer}." if outer else "").split(".")[0]
    return re.split(r"\.\d+\.", owner)[-1].removeprefix(prefix).replace(".base_layer", "") or owner


def listed(parts: list[Part]) -> str:
    """List names with their shares, for messages."""
    return ", ".join(f"{part.name} ({part.share:.0%})" for part in parts)
