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
# Methods from which transformers itself can restore 16-bit weights, for models published in no other way.
DEQUANTIZED_BY = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
# Files next to config.json in which older tools store the method.
OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# Hub ids that name a quantized copy.
QUANTIZED_NAME = re.compile(r"gptq|awq|fp8|fp4|int[48]|[48]-?bit|gguf|exl2|w[48]a|quantized", re.IGNORECASE)


def foreign_quantization(config: Mapping[str, Any], folder: Path | None = None) -> str | None:
    """Return the quantization method of a checkpoint, as transformers calls it; None for 16 bits and bitsandbytes.

    Args:
        config: config.json.
        folder: its folder, for the files of older tools.
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
    """Check that bitsandbytes can quantize a base.

    Args:
        name: the model's name, for the message.

    Raises:
        UserError: it is already quantized in another way.
    """
    method = foreign_quantization(config, folder)
    if method is not None:
        raise UserError(*quantized_already(name, method, config))


def quantized_already(name: str, method: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """Return what is wrong with a quantized base, and what to use instead."""
    called, original = NAMES.get(method, short(method)), _original(name, config)
    wrong = f"{short(name)} is already quantized by {called}, and folora-q quantizes 16-bit weights itself"
    if original is not None:
        return wrong, f"use the 16-bit original that its config.json names: {original}"
    if method in DEQUANTIZED_BY:
        return wrong, (
            f"use a copy in bfloat16: there may be one on the hub, or make one with transformers: "
            f"AutoModelForCausalLM.from_pretrained({short(name)!r}, quantization_config="
            f"{DEQUANTIZED_BY[method]}(dequantize=True)).save_pretrained(FOLDER)"
        )
    return wrong, "use the 16-bit original, which its hub page names as its base model"


def _section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return config.json's quantization section; some models have it only for their language model."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(found := part.get(key), Mapping) and found:
                return {"quant_method": "compressed-tensors", **found} if key == "compression_config" else found
    return None


def _original(name: str, config: Mapping[str, Any]) -> str | None:
    """Return the hub id of the 16-bit model, if config.json names one."""
    held = _section(config) or {}
    named = (held.get("model_name_or_path"), held.get("base_model_name_or_path"), config.get("_name_or_path"))
    for found in named:
        if isinstance(found, str) and HUB_ID.fullmatch(found) and found != name and not QUANTIZED_NAME.search(found):
            return found
    return None


def config_next_to(folder: Path) -> Mapping[str, Any]:
    """Read a folder's config.json; return {} if it cannot be read, which loading the model will report."""
    try:
        return read_object(folder / "config.json")
    except (OSError, ValueError):
        return {}
