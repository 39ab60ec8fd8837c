"""Embeddings and output layers, tied by the class, by config.json or not at all, come out of a merge as in PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from folora_q.workflows.merge import MergeRequest, run_merge
from tests.conftest import Silent
from tests.export.models import save_adapter
from tests.zoo.members import MEMBERS

IDS = torch.arange(3, 67).reshape(2, 32)
# Gemma ties by the class's default, whatever config.json says or leaves out; Llama by config.json; the last not at all.
BASES = {"class": "gemma2", "file": "llama-tied", "not": "llama"}
ADAPTERS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "as one": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("weights", ["original", "dequantized"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("tied", BASES)
def test_a_merge_is_the_adapter(tied: str, adapter: str, weights: str, tmp_path: Path) -> None:
    if adapter == "as one" and tied == "not":
        pytest.skip("there is nothing to keep tied")
    base = MEMBERS[BASES[tied]].save(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    if tied == "class":
        del config["tie_word_embeddings"]
        (base / "config.json").write_text(json.dumps(config))
    settings = {key: list(value) if isinstance(value, list) else value for key, value in ADAPTERS[adapter].items()}
    folder = save_adapter(base, tmp_path / "adapter", **settings)
    progress = Silent()
    found = run_merge(MergeRequest([folder], [1.0], weights, torch.float32), progress)
    assert found.verification is not None and found.verification.failures == []
    merged = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32)
    is_tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert is_tied == (tied != "not" and adapter == "as one")
    assert any("no longer tied" in note for note in progress.notes) == (tied != "not" and not is_tied)
    if weights == "original":
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tuned = PeftModel.from_pretrained(plain, folder)
        assert torch.allclose(logits(merged), logits(tuned), atol=1e-3)
