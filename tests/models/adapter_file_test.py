"""Adapters that cannot be merged are refused by name; whatever is wrong with the files is one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from folora_q.errors import UserError
from folora_q.models.adapter_file import read_adapter
from folora_q.models.trust import ADAPTER_CONFIG as CONFIG
from folora_q.models.trust import SAFE_ADAPTER as WEIGHTS
from tests.conftest import save_tiny_model
from tests.export.models import save_adapter

STEM = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = save_tiny_model(tmp_path_factory.mktemp("tiny") / "base")
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def configure(folder: Path, **settings: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))


def test_a_delta_is_s_b_a(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    delta = read_adapter(adapter).deltas["model.layers.0.mlp.up_proj.weight"]
    expected = 2.0 * tensors[f"{STEM}.lora_B.weight"].double() @ tensors[f"{STEM}.lora_A.weight"].double()
    assert torch.allclose(delta.dense(torch.float64), expected)
    assert torch.equal(replace(delta, transposed=True).dense(), delta.dense().T)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter; only LoRA can be merged"),
        ({"use_dora": True}, "was trained with use_dora"),
        ({"lora_bias": True}, "was trained with lora_bias"),
        ({"bias": "all"}, "contains trained biases"),
        ({"trainable_token_indices": [1]}, "was trained with trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "was trained with layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4, which changes the base"),
        ({"r": 8}, r"are not a pair of rank 8"),
        ({"alpha_pattern": {"up_proj": 1}, "rank_pattern": {"up_proj": 3}}, r"are not a pair of rank 3"),
    ],
)
def test_what_is_not_s_b_a_is_refused(adapter: Path, settings: dict, message: str) -> None:
    configure(adapter, **settings)
    with pytest.raises(UserError, match=message):
        read_adapter(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{STEM}.lora_B.weight"), f"{STEM}.lora_A.weight has no matching lora_B"),
        (lambda t: t.pop(f"{STEM}.lora_A.weight"), f"{STEM}.lora_B.weight does not belong to a pair"),
        (
            lambda t: t[f"{STEM}.lora_A.weight"].fill_(torch.nan),
            f"{STEM}.lora_A.weight holds numbers that are not finite",
        ),
        (lambda t: t[f"{STEM}.lora_B.weight"].view(-1)[5].fill_(torch.inf), "lora_B.weight holds numbers that are not"),
        (lambda t: t.update({f"{STEM}.lora_magnitude_vector": torch.ones(3)}), "does not belong to a pair"),
        (lambda t: t.update({f"{STEM}.lora_embedding_A": torch.ones(4, 3)}), "does not belong to a pair"),
    ],
    ids=["no B", "no A", "nan", "inf", "dora", "embedding"],
)
def test_a_weight_that_cannot_be_is_named(adapter: Path, change, message: str) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(UserError, match=message):
        read_adapter(adapter)


def test_damaged_files_are_named(adapter: Path, tmp_path: Path) -> None:
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-5])
    with pytest.raises(UserError, match=f"{WEIGHTS} is damaged"):
        read_adapter(adapter)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"there is no .*{WEIGHTS}"):
        read_adapter(adapter)
    for content in ("{", "[]", '{"r": 1}', ""):
        (adapter / CONFIG).write_text(content)
        with pytest.raises(UserError, match="is not an adapter"):
            read_adapter(adapter)


def test_weights_that_were_not_gathered_are_told(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)  # LlamaFactory#7665
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(0)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(
        UserError, match=r"embed_tokens\.weight is empty, as after saving from DeepSpeed's ZeRO-3"
    ) as caught:
        read_adapter(adapter)
    assert "stage3_gather_16bit_weights_on_model_save" in caught.value.hint
