"""What is minimized: the tokens' loss, each counted alike; a mixture's balancing loss where it was asked for alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from folora_q.errors import UserError
from folora_q.recipe import load_recipe
from folora_q.training.trainer import GatedTrainer
from tests.conftest import write_recipe
from tests.training.trainer_test import trainer_of
from tests.zoo.members import MEMBERS


def trainer_on(member: str, folder: Path, *overrides: str) -> GatedTrainer:
    recipe = write_recipe(folder, MEMBERS[member].save(folder / "model"))
    return trainer_of(load_recipe(recipe, list(overrides)))


def rows(trainer: GatedTrainer) -> dict[str, Any]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(3)])


def tokens_loss(trainer: GatedTrainer, inputs: dict[str, Any], items: int) -> torch.Tensor:
    """By the logits of one forward pass."""
    with torch.no_grad():
        logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum") / items


@pytest.mark.parametrize("member", ["qwen3-moe", "mixtral", "gpt-oss", "granite-moe", "qwen3-next"])
def test_the_balancing_loss_is_left_out_and_the_configuration_as_it_was(member: str, tmp_path: Path) -> None:
    trainer = trainer_on(member, tmp_path)
    assert trainer.model.config.output_router_logits is False
    inputs = rows(trainer)
    items = int((inputs["labels"][:, 1:] != -100).sum())
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=torch.tensor(items))
    assert torch.allclose(found, tokens_loss(trainer, inputs, items), rtol=1e-5)


@pytest.mark.parametrize("member", ["qwen3-moe", "mixtral"])
def test_the_balancing_loss_is_added_where_it_was_asked_for(member: str, tmp_path: Path) -> None:
    trainer = trainer_on(member, tmp_path, "training.router_aux_loss_coef=0.5")
    inputs = rows(trainer)
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=torch.tensor(40))
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        balancing = trainer.model(**ids, output_router_logits=True).aux_loss
    assert float(balancing) > 0
    assert torch.allclose(found, tokens_loss(trainer, inputs, 40) + 0.5 * balancing, rtol=1e-5)
    assert trainer.model.config.output_router_logits is False
    trainer.train()


def test_a_model_without_experts_has_nothing_to_balance(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this model has no router to balance"):
        trainer_on("llama", tmp_path, "training.router_aux_loss_coef=0.5")


@pytest.mark.parametrize("member", ["llama", "qwen2.5-vl", "gemma4", "gemma3"])
def test_every_token_of_a_step_counts_alike(member: str, tmp_path: Path) -> None:
    """Models that also see have losses of their own, which are means over a batch."""
    trainer = trainer_on(member, tmp_path)
    inputs = rows(trainer)
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=torch.tensor(100))
    assert torch.allclose(found, tokens_loss(trainer, inputs, 100), rtol=1e-5)
