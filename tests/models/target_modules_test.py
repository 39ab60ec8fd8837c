"""Which layers get an adapter: those of the language model that PEFT takes for what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.utils import transformers_weight_conversion as conversion

from folora_q.errors import UserError
from folora_q.memory.shapes import RENAMED_BY_PEFT
from folora_q.models.adapters import adapter_pairs, attach_adapter
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model
from folora_q.models.target_modules import in_16_bits, without_adapter
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.schema import ModelSection
from tests.zoo.members import MEMBERS

CPU = Hardware(torch.device("cpu"), torch.float32, "a test")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def adapted(member: str, folder: Path, **adapter: object):
    base = load_model(ModelSection(model_name_or_path=str(MEMBERS[member].save(folder))), CPU)
    return attach_adapter(base, AdapterSection(r=4, **adapter), seed=0)


@pytest.mark.parametrize("member", ["qwen3-moe", "mixtral", "gpt-oss"])
def test_experts_and_routers_have_no_adapter_and_are_named(member: str, tmp_path: Path) -> None:
    model = adapted(member, tmp_path)
    assert {pair.name.rpartition(".")[2] for pair in adapter_pairs(model)} == ATTENTION
    router = "mlp.router" if member == "gpt-oss" else "mlp.gate"
    assert {part.name for part in without_adapter(model)} == {"mlp.experts", router}


def test_shares_are_of_all_weights(tmp_path: Path) -> None:
    base = load_model(ModelSection(model_name_or_path=str(MEMBERS["mixtral"].save(tmp_path))), CPU)
    experts = 2 * 4 * 3 * 64 * 96
    attention = 2 * (2 * 64 * 64 + 2 * 64 * 32)
    rest = 2 * 261 * 64 + 2 * 4 * 64 + 5 * 64
    shares = {part.name: part.share for part in in_16_bits(base.model)}
    assert shares["mlp.experts"] == pytest.approx(experts / (experts + attention + rest))
    assert list(shares)[0] == "mlp.experts" and "embed_tokens" in shares and "lm_head" in shares


@pytest.mark.parametrize("member", ["gemma3", "qwen3-vl", "mistral3"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_the_language_model_alone_gets_adapters(member: str, targets: str | list[str], tmp_path: Path) -> None:
    model = adapted(member, tmp_path, target_modules=targets)
    names = [pair.name for pair in adapter_pairs(model)]
    assert names and all(name.startswith("model.language_model.layers.") for name in names)
    outside = {"gemma3": "vision_tower", "qwen3-vl": "visual", "mistral3": "vision_tower"}[member]
    assert outside in {part.name for part in without_adapter(model)}


@pytest.mark.parametrize(
    ("member", "targets", "message"),
    [
        ("gemma3", ["fc1", "fc2"], "only layers outside of the language model, through which no text passes"),
        ("qwen3-next", ["gate_proj", "up_proj", "down_proj"], "only experts, or layers that PEFT mistakes for experts"),
        ("llama", ["q_porj"], "the model has no linear layer q_porj \\(did you mean q_proj"),
    ],
)
def test_a_run_in_which_nothing_could_be_trained_is_refused(
    member: str, targets: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        adapted(member, tmp_path, target_modules=targets)


def test_shared_experts_that_peft_takes_for_experts_are_named(tmp_path: Path) -> None:
    """When this fails PEFT can adapt them, and `_kept_by_peft` can go."""
    model = adapted("qwen3-next", tmp_path)
    left = {part.name for part in without_adapter(model)}
    assert {"mlp.experts", "mlp.gate", "mlp.shared_expert.up_proj"} <= left
    assert "mlp.shared_expert_gate" not in left


def test_the_estimate_knows_the_types_that_peft_renames() -> None:
    kinds = {kind for kind, of in conversion._MODEL_TO_CONVERSION_PATTERN.items() if of == "qwen2_moe"}
    assert kinds >= RENAMED_BY_PEFT
