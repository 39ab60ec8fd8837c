"""Fused adapters: PEFT's outputs and gradients, with fewer operations, and an adapter that stays PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from folora_q.calibration.hooks import shared_inputs
from folora_q.kernels.fused_adapters import FusedAdapters
from folora_q.models.adapters import adapter_off, adapter_pairs, attach_adapter, freeze_lora_a
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.schema import ModelSection
from tests.conftest import tiny_tokenizer
from tests.zoo.members import MEMBERS, SIZES

IDS = torch.randint(3, 200, (3, 20), generator=torch.Generator().manual_seed(1))


def adapted(
    folder: Path, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> tuple[PeftModel, list[list[str]]]:
    """A model with random A and B, A frozen and equal where layers share their input; and those groups."""
    base = load_model(ModelSection(model_name_or_path=str(folder)), Hardware(torch.device("cpu"), dtype, ""))
    model = attach_adapter(base, AdapterSection(r=4, lora_alpha=8, lora_dropout=dropout), 0)
    pairs = {pair.name: pair for pair in adapter_pairs(model)}
    groups = shared_inputs(model, {name: pair.module for name, pair in pairs.items()}, IDS[:1, :8])
    torch.manual_seed(0)
    for names in groups:
        rows = torch.randn_like(pairs[names[0]].a) * 0.1
        for name in names:
            pairs[name].a.data.copy_(rows)
            nn.init.normal_(pairs[name].b, std=0.1)
    freeze_lora_a(list(pairs.values()))
    return model.train(), groups


def loss_and_gradients(model: PeftModel, fused: FusedAdapters | None = None, autocast: bool = False) -> list[Tensor]:
    """The loss of a step and all its gradients, in float64."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), fused.active() if fused else nullcontext():
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach().double(), *(p.grad.double() for p in trained if p.grad is not None)]


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of a tensor, relative to its norm."""
    assert len(found) == len(expected) > 1
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "olmo2", "mixtral", "gpt-neox", "qwen3.5", "lfm2"]
)
def test_losses_and_gradients_are_pefts(name: str, tmp_path: Path) -> None:
    model, groups = adapted(MEMBERS[name].save(tmp_path / "model"))
    expected = loss_and_gradients(model)
    fused = FusedAdapters(model, groups)
    assert len(fused) == len(adapter_pairs(model))
    assert error(loss_and_gradients(model, fused), expected) < 1e-5
    assert torch.equal(loss_and_gradients(model)[0], expected[0]), "outside of its context nothing has changed"


def test_in_16_bits_the_error_is_pefts(tiny_folder: Path) -> None:
    exact = loss_and_gradients(adapted(tiny_folder)[0])
    model, groups = adapted(tiny_folder, torch.bfloat16)
    plain = loss_and_gradients(model, autocast=True)
    fused = loss_and_gradients(model, FusedAdapters(model, groups), autocast=True)
    assert 0 < error(fused, exact) < 1.2 * error(plain, exact) < 0.5  # an untrained model amplifies rounding


def test_layers_that_share_an_input_compute_a_x_once(tiny_folder: Path) -> None:
    model, groups = adapted(tiny_folder)
    assert [len(group.pairs) for group in FusedAdapters(model, groups).groups] == [3, 1, 2, 1] * 2
    assert [len(group.pairs) for group in FusedAdapters(model).groups] == [1] * 14
    next(pair for pair in adapter_pairs(model) if pair.name.endswith("layers.1.self_attn.k_proj")).a.data += 1
    assert [len(group.pairs) for group in FusedAdapters(model, groups).groups] == [3, 1, 2, 1, 2, 1, 1, 2, 1]


def test_activations_computed_again_change_no_bit(tiny_folder: Path) -> None:
    model, groups = adapted(tiny_folder)
    fused = FusedAdapters(model, groups)
    kept = loss_and_gradients(model, fused)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(map(torch.equal, loss_and_gradients(model, fused), kept))


def test_the_adapter_is_pefts_and_a_measurement_in_between_changes_nothing(tiny_folder: Path) -> None:
    model, groups = adapted(tiny_folder)
    names, fused = list(model.state_dict()), FusedAdapters(model, groups)
    before = loss_and_gradients(model, fused)
    with torch.no_grad(), adapter_off(model.eval()):
        model(input_ids=IDS)
    assert all(map(torch.equal, loss_and_gradients(model.train(), fused), before))
    assert list(model.state_dict()) == names
    assert {type(pair.module).__module__ for pair in adapter_pairs(model)} == {"peft.tuners.lora.bnb"}


def test_what_is_more_than_a_frozen_a_is_left_to_peft(tiny_folder: Path) -> None:
    assert len(FusedAdapters(adapted(tiny_folder, dropout=0.1)[0])) == 0
    model, _ = adapted(tiny_folder)
    first, second, *_ = adapter_pairs(model)
    first.a.requires_grad_(True)
    second.module.merged_adapters.append("default")
    assert len(FusedAdapters(model)) == 12


VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "slice", "expand", "unsqueeze", "detach"}


class Count(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches, except views: on a GPU each is one kernel launch or more."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def operations_of_a_layer(folder: Path, fused: bool) -> int:
    """The operations of a decoder layer in a step, as the difference between two models of other depths."""
    counts = []
    for layers in (2, 3):
        path = folder / f"{layers} layers"
        LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": layers})).save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
        model, groups = adapted(path, torch.bfloat16)
        kernels = FusedAdapters(model, groups) if fused else None
        with Count() as count:
            loss_and_gradients(model, kernels, autocast=True)
        counts.append(count.operations)
    return counts[1] - counts[0]


def test_a_layer_dispatches_few_operations(tmp_path: Path) -> None:
    """A ceiling: a change that adds operations to every layer of every step should be noticed."""
    plain, fused = (operations_of_a_layer(tmp_path, fused) for fused in (False, True))
    assert fused <= 155 and fused < 0.7 * plain, f"{fused} operations, and {plain} with PEFT alone"
