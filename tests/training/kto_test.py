"""KTO: loss, steps and adapter are those of TRL's KTOTrainer; what differs is that a step can be cut."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from trl import KTOConfig, KTOTrainer

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
    *("training.objective=kto", "gate.enabled=false", "training.learning_rate=5e-3", f"training.max_steps={STEPS}"),
    *("training.lr_scheduler_type=constant", "training.warmup_steps=0", "training.optim=adamw_torch"),
    *("logging.logging_steps=1", "training.beta=0.3", "training.desirable_weight=0.7"),
    *("training.undesirable_weight=1.3", "training.per_device_train_batch_size=4"),
    "training.gradient_accumulation_steps=1",
]


def tokens(recipe: Recipe, tokenizer: Any) -> Dataset:
    encoder = Encoder(tokenizer)
    encoder.prepare_chats()
    task = read_task_data(recipe.data, recipe.training.seed, "kto")
    return tokenize(task.train, encoder, UnfitExamples(recipe.training.max_length, "drop")).sequences


class Losses(TrainerCallback):
    """Collects the loss of every step, and the KL that TRL reports."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.kl: list[float] = []

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if logs and "loss" in logs:
            self.seen.append(logs["loss"])
            self.kl.append(logs.get("kl", 0.0))


def ours(recipe: Recipe, callback: TrainerCallback | None = None, hardware: Hardware = CPU) -> GatedTrainer:
    base = load_model(recipe.model, hardware)
    model = attach_adapter(base, recipe.adapter, recipe.training.seed)
    rows = tokens(recipe, base.tokenizer)
    return build_trainer(
        TrainerSetup(
            model=model,
            tokenizer=base.tokenizer,
            train=rows,
            heldout=rows,
            recipe=recipe,
            config=trainer_config(model, recipe, hardware, Path(recipe.training.output_dir)),
            callbacks=[] if callback is None else [callback],
        )
    )


def trls(recipe: Recipe, folder: Path, callback: TrainerCallback | None = None) -> Any:
    """TRL's trainer on the same rows, which it tokenizes, with our mismatched completions."""
    base = load_model(recipe.model, CPU)
    model = attach_adapter(base, recipe.adapter, recipe.training.seed)
    start = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    training = recipe.training
    path = Path(recipe.data.train_dataset[0].path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    config = KTOConfig(
        output_dir=str(folder),
        beta=training.beta,
        desirable_weight=training.desirable_weight,
        undesirable_weight=training.undesirable_weight,
        learning_rate=training.learning_rate,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=1,
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer = KTOTrainer(
            model=model,
            args=config,
            processing_class=base.tokenizer,
            train_dataset=Dataset.from_list(rows),
            callbacks=[] if callback is None else [callback],
        )
    keep_in_float32(model, start)
    theirs: list[dict[str, Any]] = list(trainer.train_dataset)
    for row, mine in zip(theirs, tokens(recipe, base.tokenizer), strict=True):
        assert row["prompt_ids"] + row["completion_ids"] == mine["input_ids"] and row["label"] == mine["desirable"]
        prompt = len(row["prompt_ids"])
        assert mine["mismatched_ids"][:prompt] == row["prompt_ids"]
        row["KL_completion_ids"] = mine["mismatched_ids"][prompt:]
    trainer.train_dataset = Dataset.from_list(theirs)
    return trainer


def in_sequence(trainer: GatedTrainer) -> GatedTrainer:
    """Let a trainer read its rows in their order, as TRL's does, whose pairs of rows are within a batch."""
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)  # type: ignore[method-assign]
    return trainer


def adapter(trainer: Any) -> list[Tensor]:
    return [p.detach().clone() for pair in adapter_pairs(trainer.model) for p in (pair.a, pair.b)]


def set_b(trainer: Any) -> None:
    torch.manual_seed(5)
    for pair in adapter_pairs(trainer.model):
        torch.nn.init.normal_(pair.b, std=0.05)


def test_losses_and_adapter_are_those_of_trls_trainer(labelled_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(labelled_file, PLAIN)
    mine, theirs = Losses(), Losses()
    trainer, reference = in_sequence(ours(recipe, mine)), trls(recipe, tmp_path / "trl", theirs)
    start = adapter(trainer)
    assert all(torch.equal(x, y) for x, y in zip(start, adapter(reference), strict=True))
    trainer.train()
    reference.train()
    assert len(mine.seen) == STEPS and mine.seen[-1] < 0.9 * mine.seen[0], "something was learned"
    assert max(theirs.kl) > 0.1, "z is above its limit in some step"
    assert mine.seen == pytest.approx(theirs.seen, abs=1e-6)
    moved = max(float((x - y).abs().max()) for x, y in zip(adapter(trainer), start, strict=True))
    apart = max(float((x - y).abs().max()) for x, y in zip(adapter(trainer), adapter(reference), strict=True))
    assert moved > 1e-2 and apart < 5e-5


def test_a_step_is_the_same_however_its_batch_is_cut(labelled_file: Path) -> None:
    at_once, by_one = Losses(), Losses()
    trainer = ours(load_recipe(labelled_file, PLAIN), at_once)
    start = adapter(trainer)
    trainer.train()
    cut = [*PLAIN, "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4"]
    others = [ours(load_recipe(labelled_file, cut), by_one), ours(load_recipe(labelled_file, PLAIN))]
    rows: list[int] = []
    others[1].model.get_base_model().register_forward_pre_hook(run_out_of_memory_over(2, rows), with_kwargs=True)
    for other in others:
        other.train()
        assert all(torch.allclose(x, y, atol=5e-5) for x, y in zip(adapter(trainer), adapter(other), strict=True))
    assert max(rows) == 4 and set(rows[1:]) == {2}, "the first pass, for z, shows what fits"
    assert by_one.seen == pytest.approx(at_once.seen, abs=1e-5)
    assert max(float((x - y).abs().max()) for x, y in zip(adapter(trainer), start, strict=True)) > 1e-2


def test_z_is_a_mean_over_the_step_without_rows_that_fill_a_batch(labelled_file: Path) -> None:
    trainer = ours(load_recipe(labelled_file, PLAIN))
    set_b(trainer)
    inputs = padded_pairs([trainer.train_dataset[i] for i in range(5)])
    inputs["labels"][4] = IGNORED
    assert trainer.objective.count(inputs) == 4

    def loss(*micro_batches: dict[str, Tensor]) -> float:
        count = torch.tensor(4)
        total = 0.0
        for each in trainer.objective.prepare_step(trainer, micro_batches, count):
            prepared = trainer.objective.prepare(trainer, each)
            total += float(trainer.objective.loss(trainer, trainer.model, prepared, count)[0].detach())
        return total

    parts = [{name: value[start:stop] for name, value in inputs.items()} for start, stop in ((0, 1), (1, 4), (4, 5))]
    assert loss(*parts) == pytest.approx(loss(inputs), abs=1e-6)
    assert loss(*parts[:2]) == pytest.approx(loss(inputs), abs=1e-6)


def test_trls_fused_head_as_on_a_gpu_gives_the_same_loss(labelled_file: Path, monkeypatch) -> None:
    trainer = ours(load_recipe(labelled_file, PLAIN))
    set_b(trainer)
    inputs, count = padded_pairs([trainer.train_dataset[i] for i in range(4)]), torch.tensor(4)

    def loss() -> float:
        [step] = trainer.objective.prepare_step(trainer, [inputs], count)
        prepared = trainer.objective.prepare(trainer, step)
        return float(trainer.objective.loss(trainer, trainer.model, prepared, count)[0].detach())

    by_logits = loss()
    monkeypatch.setattr(objectives, "_head_is_fused", lambda trainer: True)
    assert loss() == pytest.approx(by_logits, abs=1e-5)


def test_held_out_numbers_are_those_of_trls_metrics(labelled_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(labelled_file, PLAIN)
    trainer, reference = ours(recipe), trls(recipe, tmp_path / "trl")
    for each in (trainer, reference):
        set_b(each)
    measured = trainer.measured_on_task()
    inputs = reference.data_collator(list(reference.train_dataset))
    reference.model.eval()
    with torch.no_grad():
        loss = reference.compute_loss(reference.model, inputs)
    metrics = {name: values[-1] for name, values in reference._metrics["eval"].items()}
    assert measured["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert measured["reward_margin"] == pytest.approx(metrics["rewards/margins"], abs=1e-5)
    assert measured["reward_reference"] == pytest.approx(recipe.training.beta * metrics["kl"], abs=1e-5)
    assert 0 < measured["reward_accuracy"] < 1 and abs(measured["reward_margin"]) > 1e-3


def test_statistics_are_weighted_by_the_gradient_of_trls_loss(labelled_file: Path, tmp_path: Path) -> None:
    """With B = 0: sum over tokens of |gradient at the output|² x xᵀ, of each row's own loss, as a mean over rows."""
    recipe = load_recipe(labelled_file, PLAIN)
    reference = trls(recipe, tmp_path / "trl")
    model: Any = reference.model
    rows = tokens(recipe, reference.processing_class).select(range(5))
    pair = adapter_pairs(model)[2]
    seen: list[tuple[Tensor, Tensor]] = []
    module = pair.module

    def look(_, inputs, output) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.append((inputs[0].detach(), gradient.detach())))

    handle = module.register_forward_hook(look)
    expected = torch.zeros(module.in_features, module.in_features)
    model.eval()
    for number in range(len(rows)):
        seen.clear()
        inputs = reference.data_collator([reference.train_dataset[number]])
        reference.compute_loss(model, inputs).backward()
        [(x, gradient)] = seen  # of the row's own answer alone
        weights = gradient.pow(2).sum(-1) * inputs["attention_mask"]
        expected += torch.einsum("bt,btd,bte->de", weights, x, x) / len(rows)
    handle.remove()

    text = task_text(rows[:], recipe.training, 4, model.device)
    assert len({batch.slope for batch in text}) == 2
    with adapter_off(model):
        reading = Reading(model, {pair.name: module}, [[pair.name]], weighted=True)

        def new_sinks() -> dict[str, ProjectedCovariance]:
            return {pair.name: ProjectedCovariance(torch.eye(module.in_features), device=model.device)}

        [sink] = reading.stream(text, 1, new_sinks).values()
    found = sink.mean().float()
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_in_bfloat16_model_and_base_are_rounded_alike(labelled_file: Path) -> None:
    losses = Losses()
    recipe = load_recipe(labelled_file, [*PLAIN, "model.dtype=bfloat16", "training.max_steps=3"])
    trainer = ours(recipe, losses, Hardware(torch.device("cpu"), torch.bfloat16, "a test"))
    labels = trainer.train_dataset["desirable"]
    assert set(labels) == {True, False}
    trainer.train()
    assert losses.seen[0] == pytest.approx(0.5 * (0.7 * 3 + 1.3) / 4, abs=0.1) and losses.seen[2] < losses.seen[0]
