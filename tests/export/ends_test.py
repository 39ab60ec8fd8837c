"""Adapters that change the embedding or the output layer: what is merged says what plain PEFT says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, GemmaForCausalLM

from folora_q.errors import UserError
from folora_q.export.ends import FittedCheckpoint, fitted
from folora_q.models.adapter_file import read_adapter
from folora_q.models.weight_files import open_checkpoint
from folora_q.workflows.merge import MergeRequest, run_merge
from tests.conftest import Silent
from tests.export.models import _save, save_tiny_model, sharded_llama, sharded_qwen

ROWS = 261


def gemma(folder: Path) -> Path:
    """A family that ties its ends by default, without a word of it in config.json."""
    tiny = save_tiny_model(folder / "tiny")
    config = GemmaConfig(
        vocab_size=ROWS, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    base = _save(GemmaForCausalLM(config).to(torch.bfloat16), tiny, folder / "gemma")
    known = json.loads((base / "config.json").read_text())
    known.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(known))
    return base


BASES = {"untied": lambda folder: sharded_llama(folder), "tied": lambda folder: sharded_qwen(folder), "default": gemma}
BOTH = ["embed_tokens", "lm_head"]


def train(base: Path, folder: Path, new_tokens: int = 0, save: bool | str = "auto", **settings: object) -> PeftModel:
    """An adapter as another program makes it: resized where there are new tokens, and every trained weight moved."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if new_tokens:
        tokenizer.add_tokens([f"<|new_{number}|>" for number in range(new_tokens)])
        model.resize_token_embeddings(len(tokenizer))
    config = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings}
    tuned = get_peft_model(model, LoraConfig(**config))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(folder, save_embedding_layers=save)
    tokenizer.save_pretrained(folder)
    return tuned.eval()


def merged(adapter: Path, target: Path, *more: Path) -> PeftModel:
    sources = [adapter, *more]
    request = MergeRequest(sources, [1.0] * len(sources), "original", torch.float32, target, overwrite=True)
    result = run_merge(request, Silent())
    assert result.verification is not None and not result.verification.failures
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()


def logits(model, rows: int) -> torch.Tensor:
    ids = torch.randint(3, rows, (2, 24), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = rows - 1  # the newest token
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("new_tokens", [0, 4])
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": BOTH},
        {"target_modules": ["q_proj", *BOTH]},
    ],
    ids=["layers", "embedding", "tied", "both", "pairs"],
)
def test_what_is_merged_says_what_peft_says(tmp_path: Path, name: str, new_tokens: int, settings: dict) -> None:
    base = BASES[name](tmp_path)
    tuned = train(base, tmp_path / "adapter", new_tokens, **settings)
    model = merged(tmp_path / "adapter", tmp_path / "merged")
    rows = ROWS + new_tokens
    assert model.config.vocab_size == rows == model.get_input_embeddings().weight.shape[0]
    assert torch.allclose(logits(model, rows), logits(tuned, rows), atol=1e-3)
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if name != "untied" and (not settings or "ensure_weight_tying" in settings):
        assert ends[0] is ends[1], "what PEFT keeps tied stays so"
    else:
        assert not torch.equal(*ends)


@pytest.mark.parametrize("name", ["tied", "default"])
def test_an_adapter_on_a_tied_output_layer_parts_it_from_the_embedding(tmp_path: Path, name: str) -> None:
    base = BASES[name](tmp_path)
    tuned = train(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    model = merged(tmp_path / "adapter", tmp_path / "merged")
    assert torch.allclose(logits(model, ROWS), logits(tuned, ROWS), atol=1e-3)
    embedding = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, embedding), "the embedding has no adapter"
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_the_copy_of_the_output_layer_that_peft_adds_is_no_change(tmp_path: Path) -> None:
    base = sharded_llama(tmp_path)
    train(base, tmp_path / "adapter", target_modules=["lm_head"])
    adapter = read_adapter(tmp_path / "adapter")
    assert list(adapter.replaced) == ["lm_head.weight"] and list(adapter.deltas) == ["lm_head.weight"]
    checkpoint, (found,) = fitted(open_checkpoint(base), [adapter])
    assert not found.replaced and not isinstance(checkpoint, FittedCheckpoint)
    train(base, tmp_path / "other", target_modules=["lm_head"])
    merged(tmp_path / "adapter", tmp_path / "merged", tmp_path / "other")  # so two of them can be merged at once


@pytest.mark.parametrize(("name", "settings", "lacking"), [
    ("untied", {"target_modules": ["lm_head"]}, "has no model.embed_tokens.weight of that size"),
    ("untied", {"target_modules": ["q_proj", "embed_tokens"]}, "has no lm_head.weight of that size"),
    ("untied", {"save": False}, r"has the token '<\|new_0\|>' \(261\), but the embeddings of .* have only 261 rows"),
    ("tied", {"save": False}, r"has the token '<\|new_0\|>' \(261\), but the embeddings of .* have only 261 rows"),
])  # fmt: skip
def test_new_rows_that_were_not_saved_are_the_reason(tmp_path: Path, name: str, settings: dict, lacking: str) -> None:
    train(BASES[name](tmp_path), tmp_path / "adapter", 4, **settings)
    with pytest.raises(UserError, match=lacking) as caught:
        merged(tmp_path / "adapter", tmp_path / "merged")
    assert "its new rows were not saved" in caught.value.message and "save_embedding_layers=True" in caught.value.hint
    assert not (tmp_path / "merged").exists()


def test_pairs_of_a_resized_model_alone_are_not_enough(tmp_path: Path) -> None:
    """As vLLM once took them, with the new rows in a file of its own (mergekit#328)."""
    train(sharded_llama(tmp_path), tmp_path / "adapter", 4, save=False, target_modules=["q_proj", *BOTH])
    with pytest.raises(UserError, match="resized from 261 to 265 rows, but has no model.embed_tokens.weight"):
        merged(tmp_path / "adapter", tmp_path / "merged")


def test_a_base_with_a_token_beyond_its_own_embedding_needs_no_new_row(tmp_path: Path) -> None:
    base = sharded_llama(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<image_soft_token>"])
    tokenizer.save_pretrained(base)  # as Gemma 3 with text alone is published
    train(base, tmp_path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "merged")
