"""Convert GGUF files to Hugging Face folders, which the 4-bit loader and PEFT read."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from folora_q.errors import UserError, first_line
from folora_q.storage.files import cache_folder, commit_directory, sha256

# What else transformers raises for a model with inconsistent files.
MALFORMED = (
    *(TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError),
    StrictDataclassError,
)


def convert_gguf(path: Path, target: Path | None = None) -> Path:
    """Decode a GGUF file into 16-bit safetensors, tokenizer and chat template, once.

    Args:
        path: the .gguf file.
        target: the folder to make; by default one in the cache, named after the file's content.

    Returns:
        The folder; it is created under another name and renamed when complete.

    Raises:
        UserError: transformers cannot read the file.
    """
    if target is None:
        target = cache_folder() / "models" / f"{path.stem}-{sha256(path)[:12]}"
    if target.exists():
        return target
    try:
        with (
            tempfile.TemporaryDirectory() as alone
        ):  # transformers would also read an adapter or a tokenizer next to it
            os.symlink(path.resolve(), Path(alone) / path.name)
            source = {"pretrained_model_name_or_path": alone, "gguf_file": path.name, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model = AutoModelForCausalLM.from_pretrained(
                **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
        for kind in ("bos", "eos", "pad"):  # transformers before 5.18 uses the first of them as the end token
            token = getattr(model.config, f"{kind}_token_id")
            if isinstance(token, int):
                setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token))
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, struct.error, *MALFORMED) as error:
        raise UserError(f"transformers cannot read {path}: {first_line(error)}", "is it damaged?") from error
    with commit_directory(target, keeps_existing=True) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return target
