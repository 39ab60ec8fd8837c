"""Runs that adapt the output layer, or train embeddings whole: trained, resumed, merged and asked."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from folora_q.calibration.gate_store import load_gates
from tests.cli.commands_test import run
from tests.conftest import write_recipe
from tests.export.models import sharded_qwen
from tests.faults.commands import assert_the_same_run, at_step, manifest, signalled


def merged_and_tuned(folder: Path, base: Path) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Module]:
    """Logits of what `merge` made of a run, and of plain PEFT's adapter on the base; and the merged model."""
    assert run("merge", folder, "--base", "original", "--dtype", "float32") == 0
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, folder / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    ids = torch.randint(3, 260, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return merged(ids).logits, tuned(ids).logits, merged


@pytest.mark.parametrize("rule", ["frozen", "step"])
def test_an_adapter_on_the_output_layer_is_gated_trained_and_merged(
    recipe_file: Path, tiny_folder: Path, tmp_path: Path, rule: str, capfd
) -> None:
    changes = ["target_modules=[q_proj, lm_head]", f"gate.rule={rule}", "model.dtype=bfloat16"]
    assert run("train", recipe_file, *changes) == 0
    folder = tmp_path / "run"
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert weights["base_model.model.lm_head.lora_B.weight"].norm() > 0
    assert not [name for name in weights if "base_layer" in name], "the base's output layer is no part of it"
    assert "lm_head" in load_gates(folder / "gates.safetensors")
    merged, tuned, _ = merged_and_tuned(folder, tiny_folder)
    assert torch.allclose(merged, tuned, atol=1e-3)
    assert "Yes" in (folder / "merged" / "README.md").read_text()


def test_a_tied_embedding_is_trained_as_one_resumed_and_merged(tmp_path: Path, monkeypatch, capfd) -> None:
    base = sharded_qwen(tmp_path, tied=True)
    (tmp_path / "recipe").mkdir()
    recipe = write_recipe(tmp_path / "recipe", base)
    whole = ["modules_to_save=[embed_tokens]", "embedding_learning_rate=1e-3", "training.save_steps=2"]
    straight, stopped = tmp_path / "straight" / "run", tmp_path / "stopped" / "run"
    assert run("train", recipe, *whole, f"output_dir={straight}") == 0
    with monkeypatch.context() as patch:
        at_step(patch, 3, signalled(signal.SIGINT))
        assert run("train", recipe, *whole, f"output_dir={stopped}") == 130
    assert run("train", recipe, *whole, f"output_dir={stopped}", "--resume") == 0
    assert_the_same_run(straight, stopped)

    weights = load_file(straight / "adapter" / "adapter_model.safetensors")
    ends = [weights[f"base_model.model.{name}.weight"] for name in ("model.embed_tokens", "lm_head")]
    assert torch.equal(*ends) and ends[0].dtype == torch.float32
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).get_input_embeddings().weight
    assert 0 < (ends[0] - before).abs().max() < 1e-2, "five steps at its own rate"
    config = json.loads((straight / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "model.embed_tokens"] and config["ensure_weight_tying"]
    assert not {"lm_head", "model.embed_tokens"} & set(load_gates(straight / "gates.safetensors"))
    assert "embed_tokens" in (straight / "adapter" / "README.md").read_text()

    merged, tuned, model = merged_and_tuned(straight, base)
    assert torch.allclose(merged, tuned, atol=1e-3)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    assert run("eval", straight) == 0
    assert manifest(straight)["status"] == "complete"


def test_untied_ends_are_trained_in_float32_beside_16_bits(
    recipe_file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    changes = ["modules_to_save=[embed_tokens, lm_head]", "model.dtype=bfloat16", "gate.rule=spectral"]
    assert run("train", recipe_file, *changes, "gate.places=[a_start, a_step]", "embedding_learning_rate=1e-2") == 0
    merged, tuned, model = merged_and_tuned(tmp_path / "run", tiny_folder)
    assert torch.allclose(merged, tuned, atol=1e-3) and not model.config.tie_word_embeddings
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    for name in ("model.embed_tokens", "lm_head"):
        change = weights[f"base_model.model.{name}.weight"] - base.get_submodule(name).weight.float()
        assert 1e-3 < change.abs().max() < 0.1, name


def test_what_is_excluded_has_no_adapter(recipe_file: Path, tmp_path: Path) -> None:
    changes = ["exclude_modules=[k_proj, layers.0.mlp.up_proj]", r"target_modules='.*\.(q|k|up)_proj'"]
    assert run("train", recipe_file, *changes, "gate.enabled=false") == 0
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    adapted = {name.partition(".lora_")[0].removeprefix("base_model.model.model.") for name in weights}
    assert adapted == {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"}
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["exclude_modules"] == ["k_proj", "layers.0.mlp.up_proj"]
    assert config["target_modules"] == r".*\.(q|k|up)_proj"
