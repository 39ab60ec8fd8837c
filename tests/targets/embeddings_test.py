"""An adapter that was trained after the embedding had been resized: asked and measured as PEFT itself would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from folora_q.errors import UserError
from folora_q.targets.find import find_target
from folora_q.targets.load import LoadedTarget, Precision, load_target
from tests.export.ends_test import ROWS, logits, train
from tests.export.models import sharded_llama, sharded_qwen

BASES = {"untied": lambda folder: sharded_llama(folder), "tied": lambda folder: sharded_qwen(folder)}


def load(adapter: Path, compare: bool = True) -> LoadedTarget:
    return load_target(find_target(str(adapter)), Precision("float32", 16), compare=compare)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=["resized", "trained"])
def test_it_is_loaded_with_its_rows_and_its_base_is_the_base(tmp_path: Path, name: str, settings: dict) -> None:
    from transformers import AutoModelForCausalLM

    base = BASES[name](tmp_path)
    tuned = train(base, tmp_path / "adapter", new_tokens=2, **settings)
    loaded = load(tmp_path / "adapter")
    assert torch.allclose(logits(loaded.model, ROWS + 2), logits(tuned, ROWS + 2), atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with loaded.model.disable_adapter():
        assert torch.allclose(logits(loaded.model, ROWS)[..., :ROWS], logits(plain, ROWS), atol=1e-4)


def test_rows_that_are_nowhere_are_the_reason(tmp_path: Path) -> None:
    train(sharded_llama(tmp_path), tmp_path / "adapter", new_tokens=2, save=False)
    with pytest.raises(
        UserError, match=r"has the token '<\|new_0\|>' \(261\), but the embeddings of .* have only 261 rows"
    ):
        load(tmp_path / "adapter")
    train(sharded_llama(tmp_path), tmp_path / "other", new_tokens=2, target_modules=["lm_head"])
    with pytest.raises(UserError, match=r"from 261 to 263 rows, but has no model\.embed_tokens\.weight of that size"):
        load(tmp_path / "other")


def test_another_embedding_that_stays_cannot_be_compared_with_the_base(tmp_path: Path) -> None:
    train(sharded_llama(tmp_path), tmp_path / "adapter", new_tokens=2)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    weights["base_model.model.model.embed_tokens.weight"][7] += 1  # a token that the base has too
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="replaces model.embed_tokens.weight of the base, also when"):
        load(tmp_path / "adapter")
    load(tmp_path / "adapter", compare=False)
