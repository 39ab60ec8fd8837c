"""DPO: the loss, the steps and the adapter are those of TRL's DPOTrainer; what differs is that batches can be cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from folora_q.calibration.hooks import shared_inputs
from folora_q.calibration.reading import Reading
from folora_q.core import ProjectedCovariance
from folora_q.data.encode import Encoder
from folora_q.data.loading import read_task_data
from folora_q.data.pairs import padded_pairs
from folora_q.data.tokenized import UnfitExamples, tokenize
from folora_q.data.tokens import IGNORED
from folora_q.models.adapters import adapter_off, adapter_pairs, attach_adapter, keep_in_float32
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model
from folora_q.recipe import Recipe, load_recipe
from folora_q.training import objectives
from folora_q.training.config import trainer_config
from folora_q.training.trainer import GatedTrainer, TrainerSetup, build_trainer
from folora_q.workflows.calibration import task_text
from tests.conftest import run_out_of_memory_over

CPU = Hardware(torch.device("cpu"), torch.float32, "a test")
STEPS = 6
PLAIN = [
    *("training.objective=dpo", "gate.enabled=false", "training.learning_rate=5e-3", f"training.max_steps={STEPS}"),
    *("training.lr_scheduler_type=constant", "training.warmup_steps=0", "training.optim=adamw_torch"),
    *("logging.logging_steps=1", "training.beta=0.3"),
]


def tokens(recipe: Recipe, tokenizer: Any) -> Dataset:
    encoder = Encoder(tokenizer)
    encoder.prepare_chats()
    task = read_task_data(recipe.data, recipe.training.seed, "dpo")
    return tokenize(task.train, encoder, UnfitExamples(recipe.training.max_length, "drop")).sequences


class Losses(TrainerCallback):
    """Collects the loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if logs and "loss" in logs:
            self.seen.append(logs["loss"])


def ours(recipe: Recipe, callback: TrainerCallback | None = None, hardware: Hardware = CPU) -> GatedTrainer:
    base = load_model(recipe.model, hardware)
    model = attach_adapter(base, recipe.adapter, recipe.training.seed)
    rows = tokens(recipe, base.tokenizer)
    return build_trainer(
        TrainerSetup(
            model=model,
            tokenizer=base.tokenizer,
            train=rows,
            heldout=rows.select(range(3)),
            recipe=recipe,
            config=trainer_config(model, recipe, hardware, Path(recipe.training.output_dir)),
            callbacks=[] if callback is None else [callback],
        )
    )


def trls(recipe: Recipe, folder: Path, callback: TrainerCallback | None = None) -> Any:
    """TRL's trainer on the same rows, which it tokenizes, and the same adapter, which it rounds on a 4-bit base."""
    base = load_model(recipe.model, CPU)
    model = attach_adapter(base, recipe.adapter, recipe.training.seed)
    start = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    training = recipe.training
    path = Path(recipe.data.train_dataset[0].path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    config = DPOConfig(
        output_dir=str(folder),
        beta=training.beta,
        learning_rate=training.learning_rate,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        logging_steps=1,
        seed=training.seed,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        max_length=None,
    )
    trainer = DPOTrainer(
        model=model,
        args=config,
        processing_class=base.tokenizer,
        train_dataset=Dataset.from_list(rows),
        callbacks=[] if callback is None else [callback],
    )
    keep_in_float32(model, start)
    return trainer


def adapter(trainer: Any) -> list[Tensor]:
    return [p.detach().clone() for pair in adapter_pairs(trainer.model) for p in (pair.a, pair.b)]


def test_losses_and_adapter_are_those_of_trls_trainer(pairs_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(pairs_file, PLAIN)
    mine, theirs = Losses(), Losses()
    trainer, reference = ours(recipe, mine), trls(recipe, tmp_path / "trl", theirs)
    start = adapter(trainer)
    assert all(torch.equal(x, y) for x, y in zip(start, adapter(reference), strict=True))
    trainer.train()
    reference.train()
    assert len(mine.seen) == STEPS and mine.seen[-1] < 0.9 * mine.seen[0], "something was learned"
    assert mine.seen == pytest.approx(theirs.seen, abs=1e-6)
    moved = max(float((x - y).abs().max()) for x, y in zip(adapter(trainer), start, strict=True))
    apart = max(float((x - y).abs().max()) for x, y in zip(adapter(trainer), adapter(reference), strict=True))
    assert moved > 1e-2 and apart < 1e-5


def test_a_step_is_the_same_however_its_batch_is_cut(pairs_file: Path) -> None:
    at_once = ours(load_recipe(pairs_file, PLAIN))
    at_once.train()
    cut = [*PLAIN, "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4"]
    by_one = ours(load_recipe(pairs_file, cut))
    by_one.train()
    split = ours(load_recipe(pairs_file, PLAIN))
    rows: list[int] = []
    split.model.get_base_model().register_forward_pre_hook(run_out_of_memory_over(4, rows), with_kwargs=True)
    split.train()
    assert max(rows) == 8 and set(rows[3:]) == {4}, "two sequences of each pair, four pairs at first and then two"
    for other in (by_one, split):
        assert all(torch.allclose(x, y, atol=2e-5) for x, y in zip(adapter(at_once), adapter(other), strict=True))


def test_a_pair_without_labels_fills_a_batch_and_counts_nothing(pairs_file: Path) -> None:
    trainer = ours(load_recipe(pairs_file, PLAIN))
    inputs = padded_pairs([trainer.train_dataset[i] for i in range(3)])
    inputs["labels"][2] = IGNORED
    assert trainer.objective.count(inputs) == 2
    for pair in adapter_pairs(trainer.model):
        torch.nn.init.normal_(pair.b, std=0.05)

    def loss(of: dict[str, Tensor]) -> float:
        prepared = trainer.objective.prepare(trainer, of)
        return float(trainer.objective.loss(trainer, trainer.model, prepared, torch.tensor(2))[0].detach())

    assert loss(inputs) == pytest.approx(loss({name: value[:2] for name, value in inputs.items()}), abs=1e-6)


def test_held_out_loss_accuracy_and_margin_are_those_of_trls_metrics(pairs_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(pairs_file, PLAIN)
    trainer, reference = ours(recipe), trls(recipe, tmp_path / "trl")
    for each in (trainer, reference):
        torch.manual_seed(5)
        for pair in adapter_pairs(each.model):
            torch.nn.init.normal_(pair.b, std=0.05)
    measured = trainer.measured_on_task()
    inputs = reference.data_collator([reference.train_dataset[i] for i in range(3)])
    reference.model.eval()
    with torch.no_grad():
        loss = reference.compute_loss(reference.model, inputs)
    metrics = {name: values[-1] for name, values in reference._metrics["eval"].items()}
    assert measured["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert measured["reward_margin"] == pytest.approx(metrics["rewards/margins"], abs=1e-5)
    assert measured["reward_accuracy"] == pytest.approx(metrics["rewards/accuracies"], abs=1e-6)
    assert abs(measured["reward_margin"]) > 1e-3


def test_statistics_are_weighted_by_the_gradient_of_trls_loss(pairs_file: Path, tmp_path: Path) -> None:
    """With B = 0: sum over tokens of |gradient at the output|² x xᵀ, of each pair's own loss, as a mean over pairs."""
    recipe = load_recipe(pairs_file, PLAIN)
    reference = trls(recipe, tmp_path / "trl")
    model: Any = reference.model
    rows = tokens(recipe, reference.processing_class).select(range(5))
    pair = adapter_pairs(model)[2]
    seen: dict[str, Tensor] = {}
    module = pair.module

    def look(_, inputs, output) -> None:
        if output.requires_grad:
            seen["x"] = inputs[0].detach()
            output.register_hook(lambda gradient: seen.update(gradient=gradient.detach()))

    handle = module.register_forward_hook(look)
    expected = torch.zeros(module.in_features, module.in_features)
    model.eval()
    for number in range(len(rows)):
        seen.clear()
        inputs = reference.data_collator([reference.train_dataset[number]])
        reference.compute_loss(model, inputs).backward()
        weights = seen["gradient"].pow(2).sum(-1) * inputs["attention_mask"]
        expected += torch.einsum("bt,btd,bte->de", weights, seen["x"], seen["x"]) / len(rows)
    handle.remove()

    text = task_text(rows[:], recipe.training, 4, model.device)
    modules = {each.name: each.module for each in adapter_pairs(model)}
    with adapter_off(model):
        groups = shared_inputs(model, modules, text[0].input_ids[:1, :8])
        group = next(each for each in groups if pair.name in each)
        reading = Reading(model, {pair.name: module}, [[pair.name]], weighted=True)
        assert pair.name in group

        def new_sinks() -> dict[str, ProjectedCovariance]:
            return {pair.name: ProjectedCovariance(torch.eye(module.in_features), device=model.device)}

        [sink] = reading.stream(text, 1, new_sinks).values()
    found = sink.mean().float()
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_trls_fused_head_as_on_a_gpu_gives_the_same_loss(pairs_file: Path, monkeypatch) -> None:
    trainer = ours(load_recipe(pairs_file, PLAIN))
    for pair in adapter_pairs(trainer.model):
        torch.nn.init.normal_(pair.b, std=0.05)
    inputs = padded_pairs([trainer.train_dataset[i] for i in range(4)])

    def loss() -> float:
        prepared = trainer.objective.prepare(trainer, inputs)
        return float(trainer.objective.loss(trainer, trainer.model, prepared, torch.tensor(4))[0].detach())

    by_logits = loss()
    monkeypatch.setattr(objectives, "_head_is_fused", lambda trainer: True)
    assert loss() == pytest.approx(by_logits, abs=1e-5) and abs(by_logits - 0.6931) > 1e-3


def test_in_bfloat16_model_and_base_are_rounded_alike(pairs_file: Path) -> None:
    losses = Losses()
    recipe = load_recipe(pairs_file, [*PLAIN, "model.dtype=bfloat16", "training.max_steps=3"])
    trainer = ours(recipe, losses, Hardware(torch.device("cpu"), torch.bfloat16, "a test"))
    trainer.train()
    assert losses.seen[0] == pytest.approx(0.693147, abs=1e-6) and losses.seen[2] < 0.69
