"""Compiled layers: the same steps, graphs that serve every layer and length, and none outside of training steps."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from folora_q.evaluation.model_pair import ModelPair
from folora_q.kernels import step_kernels
from folora_q.kernels.compiled_layers import CompiledLayers
from folora_q.kernels.fused_adapters import FusedAdapters
from folora_q.models.adapters import adapter_pairs
from folora_q.recipe import load_recipe
from folora_q.training.checkpoint_schema import PROGRESS
from folora_q.training.checkpoints import checkpoint_path
from folora_q.training.trainer import GatedTrainer
from tests.conftest import tiny_tokenizer
from tests.kernels.fused_adapters_test import IDS, adapted, error
from tests.training.trainer_test import trainer_of
from tests.zoo.members import SIZES

MEASURED = [
    "training.max_steps=4",
    "evaluation.steps=2",
    "training.save_steps=2",
    "training.per_device_train_batch_size=2",
]
# PyTorch's compiler warns of itself: it creates instances of autograd functions, and reads .grad of inner tensors.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced, and run as they are: inductor would take ten seconds for each, and aot_eager four."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(step_kernels, "CompiledLayers", partial(CompiledLayers, backend="eager"))


def trained(
    recipe_file: Path, kernels: str, *overrides: str, checkpoint: Path | None = None
) -> tuple[GatedTrainer, list[Tensor], list[str]]:
    trainer = trainer_of(load_recipe(recipe_file, [*MEASURED, f"training.kernels={kernels}", *overrides]))
    told: list[str] = []
    trainer.skipped.tell = trainer.kernels.tell = told.append
    trainer.train(checkpoint)
    return trainer, [pair.b.detach().clone() for pair in adapter_pairs(trainer.model)], told


def test_steps_are_the_same_bit_for_bit_and_so_are_those_of_a_resumed_run(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected, _ = trained(recipe_file, "none")
    trainer, found, told = trained(recipe_file, "compile")
    assert all(map(torch.equal, found, expected)) and told == []
    assert trainer.kernels.compiled is not None and len(trainer.kernels.compiled) == 2
    layers = [module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert all(layer._compiled_call_impl is None for layer in layers)
    # With and without padding, for the first layer, whose input needs no gradient, and for the other.
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]
    checkpoint = checkpoint_path(trainer.run, 2)
    assert json.loads((checkpoint / PROGRESS).read_text())["compiled"] is True
    monkeypatch.setattr(step_kernels, "MIN_SECONDS_TO_COMPILE", float("inf"))
    resumed, found, told = trained(recipe_file, "auto", checkpoint=checkpoint)
    assert resumed.kernels.compiled is not None and told == [] and all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("recompute", "backend"), [(False, "aot_eager"), (True, "eager")])
def test_more_layers_than_torch_recompiles_share_two_graphs_for_every_length(
    tmp_path: Path, recompute: bool, backend: str
) -> None:
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 10})).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, groups = adapted(tmp_path)
    # aot_eager traces the backward pass too, as inductor does.
    fused, compiled = FusedAdapters(model, groups), CompiledLayers(model, backend=backend)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def gradients(ids: Tensor, compiled: CompiledLayers | None) -> list[Tensor]:
        model.train().zero_grad(set_to_none=True)
        with fused.active():
            if compiled is None:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            else:
                with compiled.active():
                    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [pair.b.grad.clone() for pair in adapter_pairs(model) if pair.b.grad is not None]

    for ids in (IDS, IDS[:2, :13], IDS[:, :7]):
        found = gradients(ids, compiled)
        assert len(found) == 70 and error(found, gradients(ids, None)) < 1e-5
        with ModelPair(model).base() as base, torch.no_grad():  # as an evaluation does
            base(input_ids=ids)
    # With checkpointing the first layer's input needs a gradient too.
    assert counters["stats"]["unique_graphs"] == (1 if recompute else 2)


def test_a_layer_that_cannot_be_compiled_is_run_as_it_is(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected, _ = trained(recipe_file, "none")

    def broken(*_: object) -> None:
        raise ValueError("no compiler here")

    monkeypatch.setattr(step_kernels, "CompiledLayers", partial(CompiledLayers, backend=broken))
    trainer, found, told = trained(recipe_file, "compile")
    assert all(map(torch.equal, found, expected))
    assert trainer.kernels.compiled is None
    assert [line for line in told if "layers run without compilation" in line and "no compiler here" in line]


@pytest.mark.parametrize("most", [0.0, float("inf")])
def test_auto_compiles_long_runs_if_that_is_faster(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, most: float
) -> None:
    trainer, expected, told = trained(recipe_file, "auto")
    assert trainer.kernels.compiled is None and told == [], "such a short run does not win back the time for compiling"
    monkeypatch.setattr(step_kernels, "MIN_SECONDS_TO_COMPILE", 0)
    monkeypatch.setattr(step_kernels, "MAX_SHARE_OF_TIME", most)
    trainer, found, told = trained(recipe_file, "auto")
    assert all(map(torch.equal, found, expected))
    assert (trainer.kernels.compiled is None) == (most == 0)
    assert told[0].startswith(f"training.kernels: decoder layers are {'not ' * (most == 0)}compiled: a step takes ")
