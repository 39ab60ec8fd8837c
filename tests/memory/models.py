"""Small models with an adapter on 4-bit layers, and what autograd keeps of their forward pass."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from benchmarks.performance.live_tensors import gpu_autocast
from folora_q.models.load import guard_cpu_kernels
from folora_q.models.target_modules import choose_targets


def adapted_4bit(config: dict[str, Any], rank: int, checkpointing: bool = False, **lora: Any) -> PeftModel:
    """A model of a configuration in bfloat16 with random weights, 4-bit linear layers and a float32 adapter."""
    full = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    model = AutoModelForCausalLM.from_config(full).to(torch.bfloat16)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _in_4bit(module))
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True  # as PEFT asks
    guard_cpu_kernels(model)
    settings = LoraConfig(**{"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora)
    choose_targets(model, settings)
    adapted = get_peft_model(model, settings)
    if checkpointing:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted.train()


def _in_4bit(module: torch.nn.Linear | Conv1D) -> bnb.nn.Linear4bit:
    weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=module.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4", module=layer)
    if module.bias is not None:
        layer.bias = torch.nn.Parameter(module.bias.data)
    return layer.to("cpu")  # which quantizes


def kept_bytes(model: PeftModel, rows: int, length: int, masked: bool = False, autocast: bool = False) -> int:
    """Bytes of all storages that autograd keeps of the backbone's forward pass, without the model's own.

    Args:
        autocast: as on a GPU, where PEFT finds it on. On a CPU it looks for a GPU's.
    """
    ours = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}  # holds them, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in ours:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(5, 100, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, length - (3 if masked else 0) :] = 0
    with (
        gpu_autocast(autocast),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.get_base_model().base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
