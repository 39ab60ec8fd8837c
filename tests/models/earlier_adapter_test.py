"""A base that carries an adapter computes as plain PEFT does with it, forwards and backwards, and merges exactly."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from folora_q.errors import UserError
from folora_q.kernels.fused_adapters import FusedAdapters
from folora_q.models.adapters import (
    adapter_off,
    adapter_pairs,
    attach_adapter,
    freeze_lora_a,
    names_of_base,
    save_adapter,
)
from folora_q.models.earlier_adapter import read_earlier, save_earlier, stack
from folora_q.models.hardware import Hardware
from folora_q.models.load import LoadedModel, guard_cpu_kernels, load_model, load_unquantized
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.schema import ExportSection, ModelSection
from tests.conftest import save_tiny_model

IDS = torch.randint(3, 200, (3, 20), generator=torch.Generator().manual_seed(1))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def plain_base(folder: Path, bits: int = 4) -> PreTrainedModel:
    """The base in float32 arithmetic, loaded by transformers alone."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    settings: dict[str, Any] = {"quantization_config": config} if bits == 4 else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    guard_cpu_kernels(model)
    return model.eval()


def random_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """An adapter that plain PEFT writes, with random numbers in B too."""
    settings = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **settings}
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(folder)
    return folder


def loaded(folder: Path, adapter: Path | None = None) -> LoadedModel:
    section = ModelSection(model_name_or_path=str(folder), adapter=None if adapter is None else str(adapter))
    return load_model(section, Hardware(torch.device("cpu"), torch.float32, ""))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("earlier") / "model")


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 5}}, {"r": 1}])
def test_the_base_with_an_adapter_has_pefts_logits(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    first = random_adapter(base, tmp_path / "first", 0, **settings)
    expected = logits(PeftModel.from_pretrained(plain_base(base), first))
    found = logits(loaded(base, first).model)
    assert torch.allclose(found, expected, atol=1e-4)
    assert (expected - logits(plain_base(base))).abs().max() > 0.1
    unquantized, _ = load_unquantized(
        ModelSection(model_name_or_path=str(base), adapter=str(first)), Hardware(torch.device("cpu"), torch.float32, "")
    )
    expected = logits(PeftModel.from_pretrained(plain_base(base, bits=16), first))
    assert torch.allclose(logits(unquantized), expected, atol=1e-4)


def test_off_means_only_the_second_off_and_gradients_are_those_of_two_adapters(base: Path, tmp_path: Path) -> None:
    first = random_adapter(base, tmp_path / "first", 0)
    second = random_adapter(base, tmp_path / "second", 1, r=2, target_modules=["q_proj", "v_proj"])
    mine = PeftModel.from_pretrained(loaded(base, first).model, second, is_trainable=True)
    theirs = PeftModel.from_pretrained(plain_base(base), first, adapter_name="first")
    theirs.load_adapter(second, "second", is_trainable=True)
    theirs.base_model.set_adapter(["first", "second"])
    assert torch.allclose(logits(mine), logits(theirs), atol=1e-4)
    mine(input_ids=IDS, labels=IDS).loss.backward()
    theirs(input_ids=IDS, labels=IDS).loss.backward()
    expected = {
        name.replace(".second.", ".default."): parameter.grad
        for name, parameter in theirs.named_parameters()
        if ".second." in name
    }
    found = {name: parameter.grad for name, parameter in mine.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys() and len(found) == 8
    for name, gradient in found.items():
        assert gradient is not None and torch.allclose(gradient, expected[name], atol=1e-5), name
    with adapter_off(mine):
        off = logits(mine)
    theirs.set_adapter("first")
    assert torch.allclose(off, logits(theirs), atol=1e-4)


def test_fused_adapters_have_the_same_gradients_on_a_base_that_carries_one(base: Path, tmp_path: Path) -> None:
    first = random_adapter(base, tmp_path / "first", 0, target_modules=["q_proj", "k_proj", "o_proj"])
    model = attach_adapter(loaded(base, first), AdapterSection(r=2, lora_alpha=2), 0)
    pairs = adapter_pairs(model)
    torch.manual_seed(2)
    for pair in pairs:
        torch.nn.init.normal_(pair.b, std=0.1)
    freeze_lora_a(pairs)
    fused = FusedAdapters(model.train())
    assert len(fused) == len(pairs)
    gradients = []
    for computing in (nullcontext(), fused.active()):
        model.zero_grad()
        with computing:
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([pair.b.grad for pair in pairs])
    for found, expected in zip(*gradients, strict=True):
        assert found is not None and expected is not None and torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ALL, ["v_proj"]])
def test_the_sum_is_one_adapter_for_plain_peft(base: Path, tmp_path: Path, targets: list[str]) -> None:
    first = random_adapter(base, tmp_path / "first", 0, rank_pattern={"layers.1.self_attn.q_proj": 6})
    carrying = loaded(base, first)
    model = attach_adapter(carrying, AdapterSection(r=2, lora_alpha=8, target_modules=targets), 0)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    added, both = tmp_path / "added", tmp_path / "both"
    both.mkdir()
    save_adapter(model, carrying, ExportSection(), added)
    assert carrying.earlier is not None
    stack(carrying.earlier, added, both, torch.float32)
    expected = logits(model.eval())
    assert torch.allclose(logits(PeftModel.from_pretrained(plain_base(base), both)), expected, atol=1e-4)
    # PEFT's own concatenation of the two
    theirs = PeftModel.from_pretrained(plain_base(base), first, adapter_name="first")
    theirs.load_adapter(added, "added")
    if targets == ["q_proj", "down_proj"]:  # PEFT's `cat` needs both adapters to have the same layers
        theirs.add_weighted_adapter(["first", "added"], [1.0, 1.0], "cat", combination_type="cat")
        theirs.set_adapter("cat")
        assert torch.allclose(logits(theirs), expected, atol=1e-4)


def test_a_copy_has_the_same_fingerprint_and_another_adapter_has_not(base: Path, tmp_path: Path) -> None:
    first = random_adapter(base, tmp_path / "first", 0)
    carrying = loaded(base, first)
    assert carrying.earlier is not None
    save_earlier(carrying.earlier, tmp_path / "copy", names_of_base(carrying, ExportSection()))
    assert read_earlier(str(tmp_path / "copy")).fingerprint == carrying.earlier.fingerprint
    assert loaded(base, tmp_path / "copy").fingerprint == carrying.fingerprint
    other = loaded(base, random_adapter(base, tmp_path / "other", 1))
    assert len({carrying.fingerprint, other.fingerprint, loaded(base).fingerprint}) == 3
    expected = logits(PeftModel.from_pretrained(plain_base(base), first))
    assert torch.allclose(logits(PeftModel.from_pretrained(plain_base(base), tmp_path / "copy")), expected, atol=1e-5)


def test_what_cannot_be_carried_is_refused(base: Path, tmp_path: Path) -> None:
    head = random_adapter(base, tmp_path / "head", 0, target_modules=["lm_head"])
    with pytest.raises(UserError, match="adapts lm_head, an embedding or the output layer"):
        loaded(base, head)
    whole = random_adapter(base, tmp_path / "whole", 0, modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"trained lm_head.weight in full"):
        loaded(base, whole)
    wider = tmp_path / "wider"
    shape = LlamaConfig.from_pretrained(base)
    LlamaForCausalLM(LlamaConfig(**{**shape.to_dict(), "intermediate_size": 256})).save_pretrained(wider)
    with pytest.raises(UserError, match="as a layer of 256 x 64, and this base has 128 x 64"):
        loaded(base, random_adapter(wider, tmp_path / "other", 0))
