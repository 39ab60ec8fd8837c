"""Checkpoints that are quantized already: which are refused, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from folora_q.errors import UserError
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model, require_loadable
from folora_q.models.prequantized import foreign_quantization, quantized_already
from folora_q.recipe.schema import ModelSection
from tests.conftest import save_tiny_model

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
FOREIGN = {
    "gptq": {"quantization_config": GPTQ},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}},
    "compressed-tensors": {"compression_config": {"format": "int-quantized"}},
    "modelopt": {"text_config": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}},
    "something new": {"quantization_config": {"quant_method": "something new"}},
    "an unknown method": {"quantization_config": {"bits": 4}},
    "bitsandbytes in 8 bits": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
}


@pytest.mark.parametrize("method", FOREIGN)
def test_every_method_but_bitsandbytes_in_4_bits_is_foreign(method: str) -> None:
    assert foreign_quantization(FOREIGN[method]) == method


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
    ],
)
def test_16_bits_and_bitsandbytes_are_not(config: dict) -> None:
    assert foreign_quantization(config) is None


@pytest.mark.parametrize(
    ("name", "method"),
    [("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt")],
)
def test_older_tools_leave_a_file_beside_config_json(tmp_path: Path, name: str, method: str) -> None:
    assert foreign_quantization({}, tmp_path) is None
    (tmp_path / name).write_text("{}")
    assert foreign_quantization({}, tmp_path) == method


def test_what_to_use_instead_is_the_original_where_it_is_named() -> None:
    named = FOREIGN["gptq"] | {"_name_or_path": "org/Model-7B"}
    wrong, hint = quantized_already("org/Model-7B-GPTQ", "gptq", named)
    assert "org/Model-7B-GPTQ is already quantized by GPTQ" in wrong and hint.endswith("names: org/Model-7B")
    for useless in ("/workspace/model", "org/Model-7B-GPTQ", "other/Model-7B-AWQ"):
        _, hint = quantized_already("org/Model-7B-GPTQ", "gptq", FOREIGN["gptq"] | {"_name_or_path": useless})
        assert "the 16-bit original, which its hub page names" in hint and useless not in hint
    _, hint = quantized_already("openai/gpt-oss-20b", "mxfp4", FOREIGN["mxfp4"])
    assert "Mxfp4Config(dequantize=True)" in hint


def test_the_call_that_the_hint_gives_is_one_of_transformers() -> None:
    import transformers

    from folora_q.models.prequantized import DEQUANTIZED_BY

    for name in DEQUANTIZED_BY.values():
        assert getattr(transformers, name)(dequantize=True).dequantize


def test_loading_one_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | FOREIGN["gptq"]))
    section = ModelSection(model_name_or_path=str(folder))
    with pytest.raises(UserError, match="is already quantized by GPTQ"):
        require_loadable(section)
    with pytest.raises(UserError, match="is already quantized by GPTQ"):
        load_model(section, Hardware(torch.device("cpu"), torch.float32, "a test"))
