"""The LoRA adapter: attach it, find its (A, B) pairs, save it in PEFT's format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers import set_seed

from folora_q.errors import UserError
from folora_q.models.load import LoadedModel
from folora_q.models.meta import modules_of
from folora_q.models.target_modules import choose_targets
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.paths import listed
from folora_q.recipe.schema import ExportSection
from folora_q.recipe.target_modules import Modules, adapter_findings, matcher
from folora_q.storage.files import atomic_write

if TYPE_CHECKING:

    class LoraModule(torch.nn.Module, LoraLayer):
        """PEFT's adapted linear layer; the type `LoraLayer` alone does not say that it is a module."""

        in_features: int


ADAPTER = "default"


@dataclass(frozen=True)
class AdapterPair:
    """One adapted linear layer: y = W x + s B A x."""

    name: str
    module: LoraModule

    @property
    def a(self) -> torch.nn.Parameter:
        """A, (r, d)."""
        return factors(self.module, ADAPTER)[0]

    @property
    def b(self) -> torch.nn.Parameter:
        """B, (o, r)."""
        return factors(self.module, ADAPTER)[1]

    @property
    def scale(self) -> float:
        return self.module.scaling[ADAPTER]


def factors(module: LoraLayer, adapter: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A (r, d) and B (o, r) of one of a layer's adapters."""
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return cast(torch.nn.Parameter, a), cast(torch.nn.Parameter, b)


def attach_adapter(base: LoadedModel, section: AdapterSection, seed: int) -> PeftModel:
    """Attach a new adapter in float32 to the base, with A random by the seed and B zero.

    Raises:
        UserError: the section names a layer that this model does not have or that cannot be adapted.
    """
    modules = modules_of(base.model)
    if findings := adapter_findings(section, modules):
        raise UserError(listed(message for _, message in findings))
    whole = saved_whole(section, modules)
    set_seed(seed)
    config = LoraConfig(
        r=section.r,
        lora_alpha=cast(int, section.lora_alpha),  # PEFT takes any number
        lora_dropout=section.lora_dropout,
        use_rslora=section.use_rslora,
        target_modules=section.target_modules,
        exclude_modules=section.exclude_modules,
        modules_to_save=whole or None,
        ensure_weight_tying=modules.tied and modules.head in whole,
        task_type="CAUSAL_LM",
    )
    choose_targets(base.model, config)
    try:
        model = get_peft_model(base.model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise UserError(f"cannot attach the adapter: {error}", "check adapter.target_modules") from error
    keep_in_float32(model)
    for name, wrapper in wrappers(model).items():
        for copy in wrapper.modules_to_save.values():
            _compute_in_float32(copy, wrapper.original_module.weight.dtype, is_head=name == modules.head)
    # PEFT writes a card of placeholders into every checkpoint; the run writes one with its results.
    model.create_or_update_model_card = lambda output_dir: None
    return model


def saved_whole(section: AdapterSection, modules: Modules) -> list[str]:
    """Return full names of modules to train in full; for tied ones the output layer, from which PEFT finds both."""
    named = matcher(section.modules_to_save or [])
    found = [name for name in (*modules.embeddings, modules.head) if named(name)]
    ends = {modules.embeddings[0], modules.head}
    if not modules.tied or ends.isdisjoint(found):
        return found
    return [modules.head, *(name for name in found if name not in ends)]


def wrappers(model: PeftModel) -> dict[str, ModulesToSaveWrapper]:
    """Return the modules that are trained in full, by their names in the base."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def trains_head(model: PeftModel) -> bool:
    """Return whether the output layer has an adapter or is trained in full."""
    return isinstance(model.get_output_embeddings(), LoraLayer | ModulesToSaveWrapper)


def _compute_in_float32(copy: torch.nn.Module, dtype: torch.dtype, is_head: bool) -> None:
    """Let a float32 copy work in a model that computes in 16 bits: cast an embedding's output, or a head's input."""
    if is_head:
        copy.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    else:
        copy.register_forward_hook(lambda _, inputs, output: output.to(dtype))


def keep_in_float32(model: PeftModel, start: dict[str, torch.Tensor] | None = None) -> None:
    """Convert the adapter's weights back to float32, from `start` if given (SFTTrainer rounds them to bfloat16)."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = (parameter.data if start is None else start[name]).float()


def adapter_pairs(model: PeftModel) -> list[AdapterPair]:
    """Return every adapted linear layer, in the model's order, without experts that another program adapted."""
    return [
        AdapterPair(name.removeprefix("base_model.model."), cast("LoraModule", module))
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper) and ADAPTER in module.lora_A
    ]


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Switch the adapter off within this context.

    `PeftModel.disable_adapter` first asks every layer for its state, which takes 50 ms where a model has 196 of them,
    and evaluations and preference objectives switch for every batch. When PEFT switches an adapter on again, all its
    weights get `requires_grad`, even a frozen A (huggingface/peft#3447).
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    switched = [layer for layer in layers if not layer.disable_adapters]
    try:
        for layer in switched:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in switched:
            layer.enable_adapters(True)
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)


def freeze_lora_a(pairs: Sequence[AdapterPair]) -> None:
    """Freeze every A; autograd then keeps no layer inputs for it either."""
    for pair in pairs:
        pair.a.requires_grad_(False)


def names_of_base(base: LoadedModel, section: ExportSection) -> dict[str, Any]:
    """Return the values of adapter_config.json that name the base and how it is quantized."""
    return {
        "base_model_name_or_path": section.base_model_name_or_path or base.name,
        "revision": base.revision,
        "auto_mapping": {"quantization_config": base.quantization.to_dict()},  # PEFT's only field for other data
    }


def save_adapter(model: PeftModel, base: LoadedModel, section: ExportSection, folder: Path) -> None:
    """Save in PEFT's format, so that plain `PeftModel.from_pretrained` loads it.

    PEFT writes the path that the model was loaded from, no revision, and the target modules in the order of a set. Here
    the base and its commit are named and lists are sorted, so that the same run writes the same file.
    """
    dtype = getattr(torch, section.adapter_dtype)
    weights = {
        name: weight.detach().to(dtype)
        for name, weight in model.named_parameters(remove_duplicate=False)  # a tied copy has two names
        if weight.requires_grad or ".lora_" in name  # a frozen A belongs to the adapter too
    }
    # Otherwise PEFT would copy the base's output layer if there is an adapter on it.
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= names_of_base(base, section)
    if whole := wrappers(model):  # both names of tied modules, by which PEFT ties them again
        config["modules_to_save"] = list(whole)
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    atomic_write(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
