"""Compiled layers: the same steps, graphs that serve every length, and none outside of training steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers.modeling_layers import GradientCheckpointingLayer

from folora_q.kernels.compiled_layers import CompiledLayers
from folora_q.models.adapters import adapter_pairs
from folora_q.recipe import load_recipe
from folora_q.training import trainer as trainer_module
from folora_q.training.trainer import GatedTrainer
from tests.training.trainer_test import trainer_of

MEASURED = ["evaluation.steps=2", "training.save_steps=2", "training.per_device_train_batch_size=2"]
# PyTorch's compiler warns of itself: it creates instances of autograd functions, and reads .grad of inner tensors.
pytestmark = pytest.mark.filterwarnings("default")
COMPILED = "training.compile_layers=true"


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def trained(recipe_file: Path, *overrides: str, told: list[str] | None = None) -> tuple[GatedTrainer, list[Tensor]]:
    trainer = trainer_of(load_recipe(recipe_file, [*MEASURED, *overrides]))
    trainer.skipped.tell = (told if told is not None else []).append
    trainer.train()
    return trainer, [pair.b.detach().clone() for pair in adapter_pairs(trainer.model)]


def test_steps_are_the_same_bit_for_bit_and_measurements_compile_nothing(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = trained(recipe_file)
    monkeypatch.setattr(trainer_module, "CompiledLayers", partial(CompiledLayers, backend="aot_eager"))
    told: list[str] = []
    trainer, found = trained(recipe_file, COMPILED, told=told)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert trainer.compiled is not None and len(trainer.compiled) == 2 and told == []
    layers = [module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert all(layer._compiled_call_impl is None for layer in layers)
    # With and without padding, for the first layer, whose input needs no gradient, and for the other.
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]


def test_a_layer_that_cannot_be_compiled_is_run_as_it_is(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = trained(recipe_file)

    def broken(*_: object) -> None:
        raise ValueError("no compiler here")

    monkeypatch.setattr(trainer_module, "CompiledLayers", partial(CompiledLayers, backend=broken))
    told: list[str] = []
    trainer, found = trained(recipe_file, COMPILED, told=told)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert trainer.compiled is None
    assert [line for line in told if "compile_layers has no effect" in line and "no compiler here" in line]
