"""What the tests of dpo and kto share: our trainer and TRL's on the same rows and the same adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from folora_q.calibration.reading import Reading
from folora_q.core import ProjectedCovariance
from folora_q.data.encode import Encoder
from folora_q.data.loading import read_task_data
from folora_q.data.tokenized import UnfitExamples, tokenize
from folora_q.data.tokens import Batch
from folora_q.models.adapters import AdapterPair, adapter_off, adapter_pairs, attach_adapter, keep_in_float32
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model
from folora_q.recipe import Recipe
from folora_q.training.build_trainer import TrainerSetup, build_trainer
from folora_q.training.config import trainer_config
from folora_q.training.trainer import GatedTrainer

CPU = Hardware(torch.device("cpu"), torch.float32, "a test")
STEPS = 6
PLAIN = [
    *("gate.enabled=false", "training.learning_rate=5e-3", f"training.max_steps={STEPS}"),
    *("training.lr_scheduler_type=constant", "training.warmup_steps=0", "training.optim=adamw_torch"),
    *("logging.logging_steps=1", "training.beta=0.3"),
]


def tokens(recipe: Recipe, tokenizer: Any) -> Dataset:
    encoder = Encoder(tokenizer)
    encoder.prepare_chats()
    task = read_task_data(recipe.data, recipe.training.seed, recipe.training.objective)
    return tokenize(task.train, encoder, UnfitExamples(recipe.training.max_length, "drop")).sequences


class Losses(TrainerCallback):
    """Collects what is logged in every step."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if logs and "loss" in logs:
            self.logs.append(logs)

    @property
    def seen(self) -> list[float]:
        return [line["loss"] for line in self.logs]


def ours(recipe: Recipe, callback: TrainerCallback | None = None, hardware: Hardware = CPU) -> GatedTrainer:
    """Our trainer; the first three rows are also held out."""
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


def trls(recipe: Recipe, folder: Path, callback: TrainerCallback | None = None, **settings: Any) -> Any:
    """TRL's trainer on the same rows, which it tokenizes, and the same adapter, which it rounds on a 4-bit base."""
    base = load_model(recipe.model, CPU)
    model = attach_adapter(base, recipe.adapter, recipe.training.seed)
    start = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    training = recipe.training
    path = Path(recipe.data.train_dataset[0].path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kinds: dict[str, tuple[Any, Any]] = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer)}
    make_config, make = kinds[training.objective]
    config = make_config(
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
        **settings,
    )
    trainer: Any = make(
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


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two adapters."""
    return max(float((x - y).abs().max()) for x, y in zip(one, other, strict=True))


def set_b(trainer: Any) -> None:
    """Let a model differ from its base, alike in each trainer."""
    torch.manual_seed(5)
    for pair in adapter_pairs(trainer.model):
        torch.nn.init.normal_(pair.b, std=0.05)


def held_out_metrics(trainer: GatedTrainer, reference: Any) -> tuple[dict[str, float], dict[str, float]]:
    """What we and TRL measure on the three held-out rows, with the same B in both; TRL's loss is added as `loss`."""
    for each in (trainer, reference):
        set_b(each)
    measured = trainer.measured_on_task()
    inputs = reference.data_collator([reference.train_dataset[i] for i in range(3)])
    reference.model.eval()
    with torch.no_grad():
        loss = float(reference.compute_loss(reference.model, inputs))
    return measured, {name: values[-1] for name, values in reference._metrics["eval"].items()} | {"loss": loss}


def loss_of(trainer: GatedTrainer, micro_batches: list[dict[str, Tensor]], count: int) -> float:
    """The loss of a step, as the sum of its parts."""
    total, items = 0.0, torch.tensor(count)
    for each in trainer.objective.prepare_step(trainer, micro_batches, items):
        prepared = trainer.objective.prepare(trainer, each)
        total += float(trainer.objective.loss(trainer, trainer.model, prepared, items)[0].detach())
    return total


def squared_gradients(reference: Any, pair: AdapterPair, rows: int) -> Tensor:
    """Sum over tokens of |gradient at the output|² x xᵀ, of each row's loss by TRL's trainer, as a mean over rows."""
    module: Any = pair.module
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_, inputs, output) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.append((inputs[0].detach(), gradient.detach())))

    handle = module.register_forward_hook(look)
    found = torch.zeros(module.in_features, module.in_features)
    reference.model.eval()
    for number in range(rows):
        seen.clear()
        inputs = reference.data_collator([reference.train_dataset[number]])
        reference.compute_loss(reference.model, inputs).backward()
        [(x, gradient)] = seen  # one pass has gradients
        weights = gradient.pow(2).sum(-1) * inputs["attention_mask"]
        found += torch.einsum("bt,btd,bte->de", weights, x, x) / rows
    handle.remove()
    return found


def statistics(model: Any, pair: AdapterPair, text: list[Batch]) -> Tensor:
    """The same as the statistics of the task collect it."""
    module: Any = pair.module
    with adapter_off(model):
        reading = Reading(model, {pair.name: module}, [[pair.name]], weighted=True)

        def new_sinks() -> dict[str, ProjectedCovariance]:
            return {pair.name: ProjectedCovariance(torch.eye(module.in_features), device=model.device)}

        [sink] = reading.stream(text, 1, new_sinks).values()
    return sink.mean().float()
