"""The base model in 4 bits, from a hub id, a folder or a GGUF file. The bitsandbytes CPU guard lives here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.errors import RunFailed, UserError
from folora_q.models.demo import DEMO_MODEL, demo_model_folder
from folora_q.models.gguf import convert_gguf
from folora_q.models.hardware import Hardware
from folora_q.recipe.schema import ModelSection

# Enough of a weight file to tell two checkpoints apart without reading 15 GB.
FINGERPRINT_BYTES = 2**20


@dataclass(frozen=True)
class LoadedModel:
    """A frozen 4-bit base model.

    Attributes:
        name: what an adapter's `base_model_name_or_path` should say: a hub id, or the folder that was loaded.
        revision: the hub commit, or None for local files.
        fingerprint: tells this checkpoint and quantization from any other; keys the proxy cache.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    name: str
    revision: str | None
    fingerprint: str
    quantized_modules: int


def load_model(section: ModelSection, hardware: Hardware) -> LoadedModel:
    """Load a causal language model with every linear layer of the transformer in 4 bits.

    Raises:
        UserError: there is no such model, or it is no causal language model.
        RunFailed: nothing of it could be quantized, or the demo's model could not be fetched.
    """
    source = _resolve(section.model_name_or_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=section.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=hardware.dtype,
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=section.revision)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=section.revision,
            quantization_config=quantization,
            dtype=hardware.dtype,
            device_map={"": hardware.device},
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load the model {section.model_name_or_path}: {first_line}",
            "give a hub id, a local folder with config.json, or a .gguf file",
        ) from error
    quantized = guard_cpu_kernels(model)
    if quantized == 0:
        raise RunFailed(f"no layer of {section.model_name_or_path} could be loaded in 4 bits")
    if hardware.device.type == "cpu":
        # Before its first word `generate` cuts the last position out of the prompts' states. On that strided view a CPU
        # multiplies batch by batch, and copies the head once for every sequence: gigabytes, and seconds.
        model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    model.requires_grad_(False)
    model.eval()
    revision = getattr(model.config, "_commit_hash", None)
    return LoadedModel(model, tokenizer, source, revision, _fingerprint(source, revision, section), quantized)


def guard_cpu_kernels(model: PreTrainedModel) -> int:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU, and count them.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a `Linear4bit` in place at its first no-grad forward in eval.
    Every later forward, also in training, then runs without autograd: adapters train on wrong gradients, and only a
    warning tells. We sample and evaluate before we train, so we would always meet it.
    """
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def _resolve(name: str) -> str:
    if name == DEMO_MODEL:
        return str(demo_model_folder())
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"`model.model_name_or_path`: no file at {path}")
        return str(convert_gguf(path))
    return name


def _fingerprint(source: str, revision: str | None, section: ModelSection) -> str:
    """Of a hub model its commit; of a folder its configuration, and the ends and sizes of its weight files."""
    digest = hashlib.sha256(f"{section.bnb_4bit_quant_type} {section.bnb_4bit_use_double_quant}".encode())
    folder = Path(source)
    if folder.is_dir():
        for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(FINGERPRINT_BYTES))
                file.seek(max(size - FINGERPRINT_BYTES, 0))
                digest.update(file.read(FINGERPRINT_BYTES))
    else:
        digest.update(f"{source} {revision}".encode())
    return digest.hexdigest()
