"""Detect checkpoints quantized by other libraries than bitsandbytes, from config.json. Needs no PyTorch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from folora_q.errors import UserError
from folora_q.recipe.paths import HUB_ID, short
from folora_q.storage.untrusted import read_object

BITSANDBYTES = {"bitsandbytes", "bitsandbytes_4bit"}
NAMES = {
    "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8 (FBGEMM)", "mxfp4": "MXFP4", "nvfp4": "NVFP4",
    "hqq": "HQQ", "aqlm": "AQLM", "eetq": "EETQ", "auto-round": "AutoRound", "torchao": "torchao",
    "compressed-tensors": "compressed-tensors", "modelopt": "ModelOpt", "quanto": "Quanto", "bitnet": "BitNet",
}  # fmt: skip
# Where a model is published so and in no other way, transformers itself makes 16-bit weights of it.
DEQUANTIZED_BY = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
# Files beside config.json in which older tools keep what belongs into it.
OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# What a hub id says of a copy that is quantized itself.
QUANTIZED_NAME = re.compile(r"gptq|awq|fp8|fp4|int[48]|[48]-?bit|gguf|exl2|w[48]a|quantized", re.IGNORECASE)


def foreign_quantization(config: Mapping[str, Any], folder: Path | None = None) -> str | None:
    """The method that a checkpoint was quantized by, as transformers calls it; None for 16 bits and bitsandbytes.

    Args:
        config: config.json.
        folder: the folder that it lies in, with the files of older tools.
    """
    held = _section(config)
    if held is None:
        found = (name for name in OLD_FILES if folder is not None and (folder / name).is_file())
        return next((OLD_FILES[name] for name in found), None)
    if (method := held.get("quant_method")) is None:
        if held.get("load_in_4bit"):
            return None
        method = "bitsandbytes" if held.get("load_in_8bit") else "an unknown method"
    if str(method) in BITSANDBYTES:
        return "bitsandbytes in 8 bits" if held.get("load_in_8bit") else None
    return str(method)


def refuse_foreign_quantization(name: str, config: Mapping[str, Any], folder: Path | None = None) -> None:
    """See that a base can be put into 4 bits by bitsandbytes.

    Args:
        name: the model's, for the message.

    Raises:
        UserError: it is quantized already in another way.
    """
    method = foreign_quantization(config, folder)
    if method is not None:
        raise UserError(*quantized_already(name, method, config))


def quantized_already(name: str, method: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """What is wrong with such a base, and what to use instead."""
    called, original = NAMES.get(method, short(method)), _original(name, config)
    wrong = f"{short(name)} is quantized by {called} already, and folora-q puts 16-bit weights into 4 bits itself"
    if original is not None:
        return wrong, f"use the 16-bit original that its config.json names: {original}"
    if method in DEQUANTIZED_BY:
        return wrong, (
            f"use a copy in bfloat16: there may be one on the hub, and transformers makes one, "
            f"AutoModelForCausalLM.from_pretrained({short(name)!r}, quantization_config="
            f"{DEQUANTIZED_BY[method]}(dequantize=True)).save_pretrained(FOLDER)"
        )
    return wrong, "use the 16-bit original, which its page on the hub names as its base model"


def _section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json says of quantization; some models say it of their language model alone."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(found := part.get(key), Mapping) and found:
                return {"quant_method": "compressed-tensors", **found} if key == "compression_config" else found
    return None


def _original(name: str, config: Mapping[str, Any]) -> str | None:
    """The hub id of the 16-bit model, where config.json names one."""
    held = _section(config) or {}
    named = (held.get("model_name_or_path"), held.get("base_model_name_or_path"), config.get("_name_or_path"))
    for found in named:
        if isinstance(found, str) and HUB_ID.fullmatch(found) and found != name and not QUANTIZED_NAME.search(found):
            return found
    return None


def config_beside(folder: Path) -> Mapping[str, Any]:
    """config.json of a folder; nothing where it cannot be read, which whoever loads the model will say."""
    try:
        return read_object(folder / "config.json")
    except (OSError, ValueError):
        return {}
