"""Bases that were saved in 4 bits: merged from their own weights, and proved against the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from folora_q.errors import RunError, UserError
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model, load_unquantized
from folora_q.models.quantization import Quantization
from folora_q.models.weight_files import open_checkpoint
from folora_q.recipe.schema import ModelSection
from folora_q.workflows.merge import MergeRequest, run_merge
from tests.conftest import Silent
from tests.zoo.members import MEMBERS

SAVED = ["nf4-double", "nf4", "fp4", "fp4-skipped"]
IDS = torch.arange(3, 67).reshape(2, 32)


def plain(folder: Path) -> torch.nn.Module:
    """As transformers loads it, computing in its own dtype, and without bitsandbytes' repacking on CPUs."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def trained(base: Path, folder: Path, held: Quantization | None) -> Path:
    """A LoRA adapter on it, saved by PEFT, with what folora-q says of the base."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(plain(base), config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    tuned.save_pretrained(folder)
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}
    if held is not None:
        saved["auto_mapping"] = {"quantization_config": held.to_dict()}
    path.write_text(json.dumps(saved))
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def merge(adapter: Path, **settings: object):
    request = {"sources": [adapter], "shares": [1.0], "weights": "dequantized", "dtype": torch.float32} | settings
    return run_merge(MergeRequest(**request), Silent())


@pytest.mark.parametrize("name", SAVED)
def test_what_is_recorded_is_the_checkpoints_own(name: str, tmp_path: Path) -> None:
    folder = MEMBERS[name].save(tmp_path)
    # What a recipe says by default is nf4 with double quantization.
    base = load_model(ModelSection(model_name_or_path=str(folder)), Hardware(torch.device("cpu"), torch.float32, ""))
    saved = MEMBERS[name].quantized
    held = base.quantization
    assert held.prequantized
    assert held.bnb_4bit_quant_type == saved["bnb_4bit_quant_type"]
    assert held.bnb_4bit_use_double_quant == saved["bnb_4bit_use_double_quant"]
    skipped = saved.get("llm_int8_skip_modules")
    assert held.skip_modules == (tuple(skipped) if skipped else None)
    assert Quantization.from_dict(held.to_dict()) == held
    assert {p.dtype for p in base.model.parameters() if p.dtype != torch.uint8} == {torch.float32}
    with pytest.raises(UserError, match="was saved in 4 bits"):
        load_unquantized(ModelSection(model_name_or_path=str(folder)), Hardware(torch.device("cpu"), torch.float32, ""))


@pytest.mark.parametrize("name", SAVED)
def test_weights_are_read_as_transformers_decodes_them(name: str, tmp_path: Path) -> None:
    folder = MEMBERS[name].save(tmp_path)
    checkpoint, model = open_checkpoint(folder), plain(folder)
    expected = {}
    for stored, parameter in model.state_dict().items():
        if stored in checkpoint.tensors:
            weight = model.get_parameter(stored)
            state = getattr(weight, "quant_state", None)
            expected[stored] = parameter if state is None else dequantize_4bit(weight.data, state)
    assert expected.keys() == checkpoint.tensors.keys()
    for stored, weight in expected.items():
        assert torch.equal(checkpoint.read(stored), weight), stored
        assert checkpoint.tensors[stored].shape == tuple(weight.shape), stored
    packed = sum(hasattr(p, "quant_state") for p in model.parameters())
    assert sum(stored.packed for stored in checkpoint.tensors.values()) == packed > 0


@pytest.mark.parametrize("name", SAVED)
def test_the_merged_model_is_the_one_that_was_trained(name: str, tmp_path: Path) -> None:
    base = MEMBERS[name].save(tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", None)
    found = merge(adapter)
    assert found.verification.failures == []
    assert "quantization_config" not in json.loads((found.folder / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32).eval()
    tuned, bare = logits(PeftModel.from_pretrained(plain(base), adapter).eval()), logits(plain(base))
    # Trained in bfloat16, which rounds every activation; the adapter's effect is far larger.
    assert (logits(merged) - tuned).abs().mean() < 0.2 * (bare - tuned).abs().mean()


def test_merging_into_the_16_bit_model_is_proved_against_the_trained_one(tmp_path: Path) -> None:
    base = MEMBERS["fp4"].save(tmp_path / "base")
    held = Quantization("fp4", False, "bfloat16", None, True)
    adapter = trained(base, tmp_path / "adapter", held)
    found = merge(adapter, base_model=str(base / "16-bit"))
    assert found.verification.failures == []
    # As another 4-bit format makes of the same weights, which is another model than the trained one.
    other = trained(base, tmp_path / "other", Quantization("nf4", True, "bfloat16", None, True))
    with pytest.raises(RunError, match="the merged model is not the adapter"):
        merge(other, base_model=str(base / "16-bit"))


def test_what_the_proof_needs_and_is_not_there_is_named(tmp_path: Path) -> None:
    base = MEMBERS["fp4"].save(tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", Quantization("fp4", False, "bfloat16", None, True))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "nobody/nothing"}))
    with pytest.raises(UserError, match="is to be compared with the one that was trained, on nobody/nothing") as error:
        merge(adapter, base_model=str(base / "16-bit"))
    assert "--no-verify" in error.value.hint
    assert merge(adapter, base_model=str(base / "16-bit"), verify=False).verification is None


def test_there_are_no_original_weights_to_add_to(tmp_path: Path) -> None:
    base = MEMBERS["nf4"].save(tmp_path / "base")
    with pytest.raises(UserError, match="was saved in 4 bits: there are no original weights") as error:
        merge(trained(base, tmp_path / "adapter", None), weights="original")
    assert "--base-model" in error.value.hint
