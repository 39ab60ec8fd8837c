"""Load the base model, in 4 bits or unquantized, from a hub id, a folder or a GGUF file.

The workaround for bitsandbytes on CPUs is here (`guard_cpu_kernels`).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.distributed.processes import ONE, Processes
from folora_q.errors import RunError, UserError
from folora_q.models.classes import auto_class
from folora_q.models.decoded import hold_decoded
from folora_q.models.earlier_adapter import EarlierAdapter, carry, read_earlier
from folora_q.models.hardware import Hardware
from folora_q.models.prequantized import refuse_foreign_quantization
from folora_q.models.quantization import Quantization
from folora_q.models.sharding import mesh_of, shard_base
from folora_q.models.stored_quantization import StoredQuantization, stored_quantization
from folora_q.models.tokenizer import load_tokenizer, loading, safe_source
from folora_q.models.trust import NOTHING, Trust
from folora_q.models.unsupported import refuse_unsupported
from folora_q.recipe.schema import ModelSection

# Enough of a weight file to tell two checkpoints apart without reading 15 GB.
FINGERPRINT_BYTES = 2**20
# Layers in which a mask can separate packed samples, as transformers' configurations call them.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Otherwise transformers asks the hub to open a pull request with safetensors for pickles, in the user's name.
NO_CONVERSION = {"DISABLE_SAFETENSORS_CONVERSION": "1"}


@dataclass(frozen=True)
class LoadedModel:
    """A frozen 4-bit base model.

    Attributes:
        name: what an adapter's `base_model_name_or_path` should say: a hub id, or the folder that was loaded.
        revision: the hub commit, or None for local files.
        quantization: how its weights are quantized, for merging the adapter later.
        loader: the class of transformers that loads it.
        fingerprint: identifies this checkpoint, its quantization and the earlier adapter; keys the proxy cache.
        earlier: the adapter that it carries, if the recipe's `model.adapter` names one.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    name: str
    revision: str | None
    fingerprint: str
    quantized_modules: int
    quantization: Quantization
    loader: str = "AutoModelForCausalLM"
    earlier: EarlierAdapter | None = None


def load_model(
    section: ModelSection,
    hardware: Hardware,
    tokenizer: Tokenizer | None = None,
    trust: Trust = NOTHING,
    processes: Processes = ONE,
) -> LoadedModel:
    """Load a causal language model with every linear layer of the transformer in 4 bits.

    Args:
        tokenizer: its tokenizer, if that is loaded already.
        processes: with a sharded base they load it one after the other, since each has it in the host's memory then.

    Raises:
        UserError: there is no such model, it is not a causal language model, or `trust` does not allow what it needs.
        RunError: none of its layers could be quantized, or the demo's model could not be downloaded.
    """
    tokenizer = tokenizer or load_tokenizer(section, trust=trust)
    found = _find(section, trust)
    dtype = str(hardware.dtype).removeprefix("torch.")
    if found.stored is None:
        held = Quantization(section.bnb_4bit_quant_type, section.bnb_4bit_use_double_quant, dtype)
    else:
        held = Quantization.of_checkpoint(found.stored, dtype)

    def load() -> PreTrainedModel:
        model = _load(section, first_on, trust, found, None if held.prequantized else held)
        if guard_cpu_kernels(model) == 0:
            name = section.model_name_or_path
            raise RunError(f"no layer of {name} could be loaded in 4 bits", "use another base model")
        if held.prequantized:
            compute_in(model, hardware.dtype)
        if mesh is not None:
            shard_base(model, mesh, offload=section.fsdp == "offload")
        elif hardware.device.type == "cpu":
            hold_decoded(model)
        return model

    mesh = mesh_of(processes) if processes.sharded else None
    first_on = replace(hardware, device=torch.device("cpu")) if processes.sharded else hardware
    model = processes.in_turn(load) if processes.sharded else load()
    quantized = sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    fingerprint = _fingerprint(found, f"{held.bnb_4bit_quant_type} {held.bnb_4bit_use_double_quant}")
    revision = None if Path(found.source).is_dir() else found.revision
    loader = auto_class(found.config).__name__
    earlier = _carried(section, model, trust)
    if earlier is not None:
        fingerprint = _with_earlier(fingerprint, earlier)
    return LoadedModel(model, tokenizer, found.source, revision, fingerprint, quantized, held, loader, earlier)


def load_unquantized(section: ModelSection, hardware: Hardware, trust: Trust = NOTHING) -> tuple[PreTrainedModel, str]:
    """Load a causal language model without quantization, frozen, in the compute dtype.

    Returns:
        The model, and the fingerprint of its checkpoint, which differs from the one in 4 bits.

    Raises:
        UserError: there is no such model, it is not a causal language model, it was saved in 4 bits, or `trust` does
            not allow what it needs.
        RunError: the demo's model could not be downloaded.
    """
    found = _find(section, trust)
    if found.stored is not None:
        raise UserError(
            f"{section.model_name_or_path} was saved in 4 bits ({found.stored}): it has no 16-bit weights",
            "leave out --bits 16, or name the original model",
        )
    model, fingerprint = _load(section, hardware, trust, found), _fingerprint(found, "16 bits")
    earlier = _carried(section, model, trust)
    return model, fingerprint if earlier is None else _with_earlier(fingerprint, earlier)


def stop_at(model: PreTrainedModel, token: int) -> None:
    """Let generation also stop at a token: a chat template may end turns with another token than the configuration."""
    config = model.generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if token not in known:
        config.eos_token_id = [known_token for known_token in known if known_token is not None] + [token]


def require_loadable(section: ModelSection, trust: Trust = NOTHING) -> PreTrainedConfig:
    """Check by configuration and file names that a model can be loaded, and return its configuration.

    Raises:
        UserError: there is no such model, `trust` does not allow what loading it would do, or it is quantized in a way
            that does not allow an adapter.
        RunError: the demo's model could not be downloaded.
    """
    return _find(section, trust).config


def require_packable(section: ModelSection, trust: Trust = NOTHING) -> None:
    """Check in the model's configuration, before its weights are loaded, that packed samples can be kept apart.

    Raises:
        UserError: it has layers other than attention, whose state carries over from one sample to the next.
    """
    config = require_loadable(section, trust)
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or []) - ATTENTION_LAYERS
    if kinds:
        raise UserError(
            f"packed samples would see each other in {section.model_name_or_path}, which has {', '.join(sorted(kinds))}"
            " layers",
            "set training.packing: false",
        )


def guard_cpu_kernels(model: nn.Module) -> int:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU, and count the layers.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a `Linear4bit` in place at its first no-grad forward in eval.
    Every later forward, also in training, then runs without autograd: adapters train on wrong gradients, with only a
    warning. Runs sample and evaluate before training, so they would always be affected.
    """
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a model that was saved in 4 bits compute in a dtype; transformers uses that of the file."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
    for name, parameter in model.named_parameters():
        is_packed = isinstance(parameter, bnb.nn.Params4bit)  # its storage dtype can be any
        if parameter.is_floating_point() and not is_packed and kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class _Found:
    """What to load: a folder, or a hub id with its commit."""

    config: PreTrainedConfig
    source: str
    revision: str | None

    @property
    def stored(self) -> StoredQuantization | None:
        return stored_quantization({"quantization_config": getattr(self.config, "quantization_config", None)})


def _find(section: ModelSection, trust: Trust) -> _Found:
    source, revision = safe_source(section, trust)
    with loading(section):
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust.remote_code)
    values, folder = config.to_dict(), Path(source)
    refuse_unsupported(section.model_name_or_path, values)
    refuse_foreign_quantization(section.model_name_or_path, values, folder if folder.is_dir() else None)
    return _Found(config, source, revision)


def _load(
    section: ModelSection, hardware: Hardware, trust: Trust, found: _Found, quantization: Quantization | None = None
) -> PreTrainedModel:
    """Load the model, frozen."""
    settings: dict[str, Any] = {}
    if section.attn_implementation != "auto":
        settings["attn_implementation"] = section.attn_implementation
    if quantization is not None:  # passing None would ignore the checkpoint's own quantization
        settings["quantization_config"] = quantization.config()
    with loading(section), patch.dict(os.environ, NO_CONVERSION):
        model = auto_class(found.config).from_pretrained(
            found.source,
            revision=found.revision,
            trust_remote_code=trust.remote_code,  # unset, transformers asks on the terminal
            use_safetensors=None if trust.pickle else True,
            weights_only=True,
            dtype=hardware.dtype,
            device_map={"": hardware.device},
            **settings,
        )
    if hardware.device.type == "cpu":
        # `generate` first slices the last position out of the prompts' states. With that strided view a CPU multiplies
        # sequence by sequence and copies the head each time: gigabytes, and seconds.
        model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return model.requires_grad_(False).eval()


def _carried(section: ModelSection, model: PreTrainedModel, trust: Trust) -> EarlierAdapter | None:
    """Let the model carry the adapter that `model.adapter` names, if any, and return it."""
    if section.adapter is None:
        return None
    earlier = read_earlier(section.adapter, trust)
    carry(model, earlier, model.get_output_embeddings())
    return earlier


def _with_earlier(fingerprint: str, earlier: EarlierAdapter) -> str:
    return hashlib.sha256(f"{fingerprint} {earlier.fingerprint}".encode()).hexdigest()


def _fingerprint(found: _Found, held: str) -> str:
    """Hash a hub model's commit, or a folder's configuration with sizes and ends of its weight files.

    Args:
        held: how the weights are quantized, which is part of the fingerprint.
    """
    digest = hashlib.sha256(held.encode())
    folder = Path(found.source)
    if folder.is_dir():
        for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(FINGERPRINT_BYTES))
                file.seek(max(size - FINGERPRINT_BYTES, 0))
                digest.update(file.read(FINGERPRINT_BYTES))
    else:
        digest.update(f"{found.source} {found.revision}".encode())
    return digest.hexdigest()
