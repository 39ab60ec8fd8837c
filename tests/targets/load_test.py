"""Loading what a name stands for, on tiny models: what is computed, and what cannot be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from folora_q.errors import UserError
from folora_q.models.hardware import choose_hardware
from folora_q.models.load import load_model
from folora_q.recipe.schema import ModelSection
from folora_q.targets.find import find_target
from folora_q.targets.load import LoadedTarget, Precision, load_target
from tests.conftest import save_tiny_model
from tests.targets.folders import write_adapter, write_merged, write_run

IDS = torch.arange(3, 35).reshape(2, 16)


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tiny_folder, tmp_path_factory.mktemp("load") / "adapter", std=0.1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=1)


def load(folder: Path, bits: int = 4, **how: object) -> LoadedTarget:
    return load_target(find_target(str(folder)), Precision("float32", bits), **how)


def section(folder: Path) -> ModelSection:
    return ModelSection(model_name_or_path=str(folder))


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    return model(input_ids=IDS.to(model.device)).logits


def in_4_bits(folder: Path) -> PreTrainedModel:
    return load_model(section(folder), choose_hardware("float32")).model


def test_a_run_is_its_adapter_on_its_base_in_the_recipes_dtype(adapter: Path, tiny_folder: Path, tmp_path) -> None:
    run = write_run(tiny_folder, adapter, tmp_path / "run")
    loaded = load_target(find_target(str(run)), compare=True)
    assert loaded.hardware.dtype == torch.float32 and loaded.bits == 4 and loaded.base is None
    assert loaded.held == f"4 bits (nf4), computing in float32 on {loaded.hardware.reason}"
    expected = in_4_bits(tiny_folder)
    with loaded.model.disable_adapter():
        assert torch.equal(logits(loaded.model), logits(expected))
    assert torch.equal(logits(loaded.model), logits(PeftModel.from_pretrained(expected, adapter).eval()))


@pytest.mark.parametrize("bits", [4, 16])
def test_weights_have_4_bits_or_16(bits: int, adapter: Path, tiny_folder: Path) -> None:
    for folder in (tiny_folder, adapter):
        loaded = load(folder, bits)
        assert any(isinstance(module, bnb.nn.Linear4bit) for module in loaded.model.modules()) == (bits == 4)
        assert loaded.held.startswith("4 bits (nf4), computing" if bits == 4 else "16 bits, computing")
        assert not loaded.model.training
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    if bits == 16:
        plain = AutoModelForCausalLM.from_pretrained(tiny_folder).to(loaded.model.device)
        assert torch.equal(logits(load(tiny_folder, bits).model), logits(plain))


def test_a_merged_model_comes_with_the_base_that_it_names(tiny_folder: Path, other: Path, tmp_path: Path) -> None:
    merged = write_merged(tiny_folder, tmp_path / "merged", other)
    assert load(merged).base is None, "nobody asked for it"
    for bits in (4, 16):
        loaded = load(merged, bits, compare=True)
        assert torch.equal(logits(loaded.model), logits(load(tiny_folder, bits).model))
        assert torch.equal(logits(loaded.base), logits(load(other, bits).model))
        assert loaded.base.generation_config is loaded.model.generation_config
    (merged / "merge.json").write_text(json.dumps({"base": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"merge.json names a base: cannot load the model"):
        load(merged, compare=True)
    assert torch.equal(logits(load(merged, compare=True, against=section(other)).base), logits(in_4_bits(other)))


def test_a_base_that_was_named_takes_the_place_of_the_known_one(
    adapter: Path, tiny_folder: Path, other: Path, tmp_path: Path
) -> None:
    loaded = load(tiny_folder, compare=True, against=section(other))
    assert torch.equal(logits(loaded.base), logits(in_4_bits(other)))
    assert load(tiny_folder, against=section(other)).base is None

    moved = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    config["auto_mapping"] = {"quantization_config": {"bnb_4bit_quant_type": "fp4"}}
    (moved / "adapter_config.json").write_text(json.dumps(config))
    loaded = load(moved, compare=True, against=section(other))
    expected = load_model(section(other).model_copy(update={"bnb_4bit_quant_type": "fp4"}), loaded.hardware)
    assert loaded.held.startswith("4 bits (fp4)"), "as in training"
    assert loaded.fingerprint == expected.fingerprint and loaded.base is None
    with loaded.model.disable_adapter():
        assert torch.equal(logits(loaded.model), logits(expected.model))

    gone = section(tmp_path / "nowhere")
    for folder, message in ((adapter, "needs its base and tokenizer: cannot load .*nowhere"), (other, "cannot load")):
        with pytest.raises(UserError, match=message):
            load(folder, compare=True, against=gone)


def test_the_fingerprint_is_the_bases_as_it_was_loaded(
    adapter: Path, tiny_folder: Path, other: Path, tmp_path: Path
) -> None:
    merged = write_merged(other, tmp_path / "merged", tiny_folder)
    in_training = load_model(section(tiny_folder), choose_hardware("float32")).fingerprint
    for bits, alone in ((4, in_training), (16, load(tiny_folder, 16).fingerprint)):
        assert load(tiny_folder, bits).fingerprint == load(adapter, bits).fingerprint == alone
        assert load(merged, bits, compare=True).fingerprint == alone
        assert load(merged, bits).fingerprint != alone
        assert load(adapter, bits, against=section(other)).fingerprint == load(other, bits).fingerprint != alone
    assert load(tiny_folder, 16).fingerprint != in_training


def test_what_has_no_base_cannot_be_compared(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an adapter, so there is nothing to compare it with"):
        load(tiny_folder, compare=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    prompt = tmp_path / "prompt"
    get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).save_pretrained(prompt)
    with pytest.raises(UserError, match="is a learned prompt, which cannot be switched off"):
        load(prompt, compare=True)
    assert load(prompt).model.active_peft_config.is_prompt_learning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"base_model_name_or_path": "gone/away"},
            "needs its base and tokenizer: the model gone/away is not in the hub's cache",
        ),
        ({"target_modules": ["nothing"]}, "cannot load the adapter .* on"),
        ({"r": 7}, "cannot load the adapter .* on"),
        ({"peft_type": "WISHFUL"}, "cannot load the adapter .* on"),
        ({"target_modules": ["q_proj", "lm_head"]}, "does not fit .*: it lacks weights for some of its layers"),
    ],
)
@pytest.mark.parametrize("compare", [False, True])
def test_an_adapter_that_fits_no_base_says_why(
    change: dict, message: str, compare: bool, adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        load(folder, compare=compare)


def test_an_adapter_needs_weights_and_a_model_must_be_somewhere(adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no .*adapter_model.safetensors"):
        load(folder)
    with pytest.raises(
        UserError, match="no/such-model is neither a run or adapter here nor a model that can be loaded: "
    ):
        load(Path("no/such-model"))
