"""Packed samples must not see each other: the probe finds it out, and packed training is the same training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AttentionInterface, Lfm2Config
from transformers.masking_utils import AttentionMaskInterface

from folora_q.data.tokens import IGNORED
from folora_q.errors import UserError
from folora_q.models.adapters import adapter_pairs, attach_adapter
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model, require_packable
from folora_q.recipe import load_recipe
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.schema import ModelSection
from folora_q.training.build_trainer import TrainerSetup, build_trainer
from folora_q.training.config import trainer_config
from folora_q.training.packing import check_packing
from folora_q.training.trainer import GatedTrainer

CPU = Hardware(torch.device("cpu"), torch.float32, "a test")
FIRST, SECOND = list(range(10, 40)), list(range(60, 100))


def blind(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Causal attention that looks at no mask: what packing must not be trusted to."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("blind", blind)
AttentionMaskInterface.register("blind", lambda *_, **__: None)


def adapted(folder: Path, attention: str):
    section = ModelSection(model_name_or_path=str(folder), attn_implementation=attention)
    return attach_adapter(load_model(section, CPU), AdapterSection(r=4), seed=0)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_attention_that_keeps_samples_apart_passes(tiny_folder: Path, attention: str) -> None:
    model = adapted(tiny_folder, attention)
    check_packing(model, FIRST, SECOND)
    assert model.training, "the model is left as it was"


def test_attention_that_does_not_is_refused(tiny_folder: Path) -> None:
    model = adapted(tiny_folder, "eager")
    model.get_base_model().set_attn_implementation("blind")
    with pytest.raises(UserError, match="packed samples would see each other in this model with blind"):
        check_packing(model, FIRST, SECOND)


def test_layers_that_carry_a_state_are_refused_before_the_weights_are_read(tmp_path: Path) -> None:
    Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="which has conv layers"):
        require_packable(ModelSection(model_name_or_path=str(tmp_path)))


def test_a_model_of_attention_alone_is_not(tiny_folder: Path) -> None:
    require_packable(ModelSection(model_name_or_path=str(tiny_folder)))


def trainer_of(recipe_file: Path, packing: bool) -> GatedTrainer:
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 30, 14, 21, 5, 17]
    ids = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in lengths]
    labels = [[IGNORED] * 3 + row[3:] for row in ids]
    rows = Dataset.from_dict({"input_ids": ids, "labels": labels})
    overrides = [f"training.packing={packing}".lower(), "training.max_length=48", "training.seed=0"]
    recipe = load_recipe(recipe_file, overrides)
    model = attach_adapter(load_model(recipe.model, CPU), recipe.adapter, seed=0)
    return build_trainer(
        TrainerSetup(
            model=model,
            tokenizer=load_model(recipe.model, CPU).tokenizer,
            train=rows,
            heldout=rows,
            recipe=recipe,
            config=trainer_config(model, recipe, CPU, recipe_file.parent),
        )
    )


def test_packed_rows_give_the_loss_and_gradient_of_the_rows_alone(recipe_file: Path) -> None:
    """The sum over a packed batch is the sum over its samples, by value and by gradient."""

    def totals(packing: bool) -> tuple[float, list[torch.Tensor], int]:
        trainer = trainer_of(recipe_file, packing)
        trainer.model.eval()
        loss, count = torch.zeros(()), 0
        for row in trainer.train_dataset:
            row = {name: row[name] for name in ("input_ids", "labels", "seq_lengths") if name in row}
            inputs = trainer.data_collator([row])
            learned = int((inputs["labels"][:, 1:] != IGNORED).sum())
            loss = loss + trainer.compute_loss(trainer.model, inputs) * learned
            count += learned
        loss.backward()
        return float(loss.detach()), [pair.b.grad for pair in adapter_pairs(trainer.model)], count

    loss, gradients, count = totals(False)
    packed_loss, packed_gradients, packed_count = totals(True)
    assert packed_count == count
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for packed, alone in zip(packed_gradients, gradients, strict=True):
        assert torch.allclose(packed, alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))


def test_packing_makes_fewer_sequences_and_loses_no_token(recipe_file: Path) -> None:
    trainer = trainer_of(recipe_file, True)
    lengths = [sum(lengths) for lengths in trainer.train_dataset["seq_lengths"]]
    assert sum(lengths) == 96 and len(lengths) == 3 and max(lengths) <= 48
