"""What autograd keeps, and the peak of a step, counted tensor by tensor, beside the formulas."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Gemma2PreTrainedModel

from folora_q.memory.activations import (
    Arithmetic,
    BatchShape,
    at_backward,
    kept,
    kept_with_checkpointing,
    passing_head,
    shared,
)
from folora_q.memory.components import adapter_parameters
from folora_q.memory.model_families import FAMILIES
from folora_q.memory.shapes import shape_of

RANK = 4
SMALL = {
    "vocab_size": 300,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
LLAMA = SMALL | {"model_type": "llama"}
# What a family's own dropout keeps is not counted; GPT-2's is on by default.
GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 8, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
EXACT, NEAR = 0.05, 0.08
# CPUs' autocast leaves layer norms alone, which GPUs' computes in float32: those families are counted without it.
ROUGH = {"gpt2", "gpt_neox", "phi", "starcoder2"}


def family(name: str) -> dict[str, Any]:
    own: dict[str, Any] = {"model_type": name}
    if name == "gpt2":
        return (
            {key: value for key, value in SMALL.items() if key == "vocab_size" or "id" in key.split("_")} | GPT2 | own
        )
    if name in ("gemma", "gemma2", "gemma3_text", "qwen3"):
        own |= {"head_dim": 16}
    if FAMILIES[name].expert_width:
        own |= EXPERTS | {"shared_expert_intermediate_size": 128}
    without = {"num_key_value_heads"} if name == "gpt_neox" else set()
    return {key: value for key, value in SMALL.items() if key not in without} | own


def difference(
    config: dict[str, Any],
    batch: BatchShape,
    autocast: bool,
    checkpointing: bool = False,
    frozen: bool = False,
    **lora: Any,
) -> float:
    """The formula's, relative to what is counted."""
    from folora_q.models.adapters import adapter_pairs, freeze_lora_a
    from tests.memory.models import adapted_4bit, kept_bytes

    shape = shape_of(config)
    model = adapted_4bit(config, RANK, checkpointing, **lora)
    if frozen:
        freeze_lora_a(adapter_pairs(model))
    dropout = lora.get("lora_dropout", 0) > 0
    how = Arithmetic(compute=2, autocast=autocast, rank=RANK, dropout=dropout, eager=shape.eager, frozen=frozen)
    found = (kept_with_checkpointing if checkpointing else kept)(shape, batch, how)
    if checkpointing:
        found -= shared(shape, batch, how)  # held by the layers' arguments, which autograd does not see
    if autocast and not checkpointing:
        found += how.compute * adapter_parameters(shape, how)  # cast for the whole pass
    return found / kept_bytes(model, batch.rows, batch.length, batch.masked, autocast) - 1


@pytest.mark.parametrize("autocast", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", [BatchShape(1, 96, False), BatchShape(3, 64, True)], ids=["one", "three, padded"])
def test_what_a_llama_keeps(batch: BatchShape, checkpointing: bool, autocast: bool) -> None:
    assert abs(difference(LLAMA, batch, autocast, checkpointing)) < EXACT


@pytest.mark.parametrize("autocast", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_a_keeps_no_input(checkpointing: bool, autocast: bool) -> None:
    batch = BatchShape(2, 96, True)
    assert abs(difference(LLAMA, batch, autocast, checkpointing, frozen=True)) < EXACT
    whole, frozen = (
        kept(shape_of(LLAMA), batch, Arithmetic(compute=2, autocast=autocast, rank=RANK, frozen=frozen))
        for frozen in (False, True)
    )
    assert frozen < 0.9 * whole


@pytest.mark.parametrize("autocast", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"llama", "gpt2"}))
def test_what_other_families_keep(name: str, autocast: bool) -> None:
    if autocast and name in ROUGH:
        pytest.skip("a CPU's autocast is another there")
    if name == "gemma2" and Gemma2PreTrainedModel._supports_sdpa:
        pytest.skip("older versions of transformers give it sdpa, which leaves its softcap out")
    limit = NEAR if FAMILIES[name].expert_width else EXACT
    assert abs(difference(family(name), BatchShape(2, 96, True), autocast)) < limit


def test_dropout_keeps_a_mask_and_a_copy_for_every_adapted_layer() -> None:
    # A CPU's mask is in the compute dtype, a GPU's takes a byte.
    assert -0.1 < difference(LLAMA, BatchShape(2, 96), autocast=True, lora_dropout=0.1) < 0


@pytest.mark.parametrize("autocast", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_step_at_the_shapes_of_an_8b_model(checkpointing: bool, autocast: bool) -> None:
    from transformers import LlamaConfig

    from benchmarks.performance.live_tensors import counted_step

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=3,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    shape, batch = shape_of(config.to_dict()), BatchShape(2, 1024)
    how = Arithmetic(compute=2, autocast=autocast, rank=16)
    after_forward, peak = counted_step(config, batch.rows, batch.length, 16, checkpointing, autocast)
    trained = adapter_parameters(shape, how)
    copies = how.compute * trained if autocast else 0
    stored = (kept_with_checkpointing if checkpointing else kept)(shape, batch, how)
    assert abs((stored + (0 if checkpointing else copies)) / after_forward - 1) < 0.01
    gradients = (4 * trained + copies) // shape.depth if checkpointing else copies
    assert abs((sum(at_backward(shape, batch, how, checkpointing)) + gradients) / peak - 1) < 0.02


def test_all_logits_take_three_float32_copies_and_a_fused_head_one_tile() -> None:
    shape, batch = shape_of(LLAMA | {"vocab_size": 128_000}), BatchShape(2, 64)
    how = Arithmetic(compute=2, autocast=True, rank=RANK)
    assert passing_head(shape, batch, how, fused=False) == 128 * (12 * 128_000 + 2 * 128)
    assert passing_head(shape, batch, how, fused=True) == 128 * (6 * 128 + 2 * 32_768)


def test_a_float32_model_casts_nothing() -> None:
    shape, batch = shape_of(LLAMA), BatchShape(2, 64)
    assert not Arithmetic(compute=4, autocast=False, rank=RANK).casts
    exact = kept(shape, batch, Arithmetic(compute=4, autocast=False, rank=RANK))
    assert kept(shape, batch, Arithmetic(compute=2, autocast=True, rank=RANK)) < exact


def test_counting_leaves_autocast_as_it_was() -> None:
    import torch
    from transformers import LlamaConfig

    from benchmarks.performance.live_tensors import counted_step

    difference(LLAMA, BatchShape(1, 16), True)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    counted_step(config, 1, 16, RANK, False, True)
    assert not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled()
