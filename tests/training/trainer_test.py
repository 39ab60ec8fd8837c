"""What the trainer does is TRL's; what is ours is the optimizer, the adapter's dtype and what is reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from folora_q.core import GatedOptimizer, SpectralAdamW
from folora_q.data.encode import Encoder
from folora_q.data.examples import Example
from folora_q.data.loading import read_task_data
from folora_q.data.tokenized import UnfitExamples, tokenize
from folora_q.data.tokens import IGNORED, batches
from folora_q.errors import RunError
from folora_q.evaluation.divergence import HeldOutText
from folora_q.evaluation.loss import mean_loss
from folora_q.models.adapters import adapter_off, adapter_pairs, attach_adapter
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model
from folora_q.recipe import Recipe, load_recipe
from folora_q.rules import rule_of
from folora_q.runs.results import TextKind
from folora_q.training.build_trainer import TrainerSetup, build_trainer
from folora_q.training.callbacks import Reporting
from folora_q.training.checkpoints import checkpoint_path
from folora_q.training.config import trainer_config
from folora_q.training.trainer import GatedTrainer
from tests.conftest import random_gate

CPU = Hardware(torch.device("cpu"), torch.float32, "a test")
GATE_OF_ONES = 0.0


def examples(recipe: Recipe) -> list[Example]:
    return read_task_data(recipe.data, recipe.training.seed).train


def trainer_of(
    recipe: Recipe, callbacks: Sequence[TrainerCallback] = (), gate_lambda: float | None = None, **setup: Any
) -> GatedTrainer:
    """A trainer on the recipe's rows; with random gates of a strength, if one is given."""
    base = load_model(recipe.model, CPU)
    model = attach_adapter(base, recipe.adapter, recipe.training.seed)
    encoder = Encoder(base.tokenizer)
    encoder.prepare_chats()
    rows = tokenize(examples(recipe), encoder, UnfitExamples(recipe.training.max_length, "drop")).sequences
    gates = None
    if gate_lambda is not None:
        pairs = adapter_pairs(model)
        gates = {pair.name: random_gate(pair.module.in_features, gate_lambda=gate_lambda) for pair in pairs}
        gates = rule_of(recipe.gate).before_training(pairs, gates)
    return build_trainer(
        TrainerSetup(
            model=model,
            tokenizer=base.tokenizer,
            train=rows,
            heldout=rows.select(range(2)),
            recipe=recipe,
            config=trainer_config(model, recipe, CPU, Path(recipe.training.output_dir)),
            gates=gates,
            callbacks=callbacks,
            **setup,
        )
    )


class Batches(TrainerCallback):
    """Remembers which batches were trained on, in order."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def watch(self, trainer: GatedTrainer) -> GatedTrainer:
        step = trainer.training_step

        def watched(model, inputs, *args, **kwargs):
            self.seen.append(inputs["input_ids"].tolist())
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = watched
        return trainer


def trained(recipe: Recipe, gate_lambda: float | None) -> tuple[list[torch.Tensor], list]:
    batches = Batches()
    trainer = batches.watch(trainer_of(recipe, gate_lambda=gate_lambda))
    trainer.train()
    return [p.detach().clone() for pair in adapter_pairs(trainer.model) for p in (pair.a, pair.b)], batches.seen


def test_a_gate_of_ones_is_plain_qlora_bit_for_bit_and_every_gate_sees_the_same_batches(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    plain, order = trained(recipe, None)
    ones, order_of_ones = trained(recipe, GATE_OF_ONES)
    gated, order_of_gated = trained(recipe, 4.0)
    assert order == order_of_ones == order_of_gated
    assert all(torch.equal(x, y) for x, y in zip(plain, ones, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(plain, gated, strict=True))


def test_training_is_the_same_the_second_time_and_other_with_another_seed(recipe_file: Path) -> None:
    first, order = trained(load_recipe(recipe_file), 4.0)
    second, _ = trained(load_recipe(recipe_file), 4.0)
    _, other = trained(load_recipe(recipe_file, ["training.seed=1"]), None)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert other != order


def test_loss_is_on_completions_and_their_end_token_alone(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    trainer = trainer_of(recipe)
    for row, example in zip(trainer.train_dataset, examples(recipe), strict=True):
        asked = trainer.processing_class.apply_chat_template(example.prompt, add_generation_prompt=True)
        start = len(asked["input_ids"])
        assert row["labels"][:start] == [IGNORED] * start
        assert row["labels"][start:] == row["input_ids"][start:]
        trained_text = trainer.processing_class.decode(row["input_ids"][start:])
        assert trained_text == example.reference + "<|im_end|>\n"


def test_padding_is_masked_and_the_end_token_that_it_equals_is_learned(recipe_file: Path) -> None:
    trainer = trainer_of(load_recipe(recipe_file))
    tokenizer = trainer.processing_class
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == end, "the tiny model pads with its end token"
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in trainer.train_dataset]
    rows[0] = {name: values[-6:] for name, values in rows[0].items()}
    batch = trainer.data_collator(rows)
    padded = batch["attention_mask"] == 0
    assert padded[0].sum() > 6 and (batch["input_ids"][padded] == end).all()
    assert (batch["labels"][padded] == IGNORED).all()
    assert ((batch["labels"] == end).sum(1) == 1).all(), "every answer's end is learned, once"


def test_adapters_stay_in_float32_through_training(recipe_file: Path) -> None:
    trainer = trainer_of(load_recipe(recipe_file, ["model.dtype=bfloat16"]))
    dtypes = lambda: {p.dtype for p in trainer.model.parameters() if p.requires_grad}  # noqa: E731
    assert dtypes() == {torch.float32}
    trainer.train()
    assert dtypes() == {torch.float32}


@pytest.mark.parametrize(
    ("overrides", "inner"),
    [([], torch.optim.AdamW), (["training.optim=sgd"], torch.optim.SGD)],
)
def test_rule_step_wraps_the_optimizer_that_the_recipe_names(recipe_file: Path, overrides: list, inner: type) -> None:
    trainer = trainer_of(load_recipe(recipe_file, overrides), gate_lambda=1.0)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, GatedOptimizer)
    assert type(optimizer.inner) is inner
    assert (optimizer.gate_a, optimizer.gate_b, optimizer.refresh_every) == (True, True, 2)


def test_places_choose_what_is_gated(recipe_file: Path) -> None:
    trainer = trainer_of(load_recipe(recipe_file, ["gate.places=[a_start,b_step]"]), gate_lambda=1.0)
    optimizer = trainer.create_optimizer()
    assert (optimizer.gate_a, optimizer.gate_b) == (False, True)


def test_rule_spectral_trains_with_the_papers_optimizer(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["gate.rule=spectral", "gate.places=[a_step]", "training.weight_decay=0.1"])
    lines: list[dict] = []
    trainer = trainer_of(recipe, [Reporting(lambda n: None, lines.append)], gate_lambda=1.0)
    trainer.train()
    optimizer = trainer.optimizer.optimizer  # accelerate wraps it
    assert isinstance(optimizer, SpectralAdamW)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]


class Gradients(TrainerCallback):
    """Whether any A has a gradient or could get one, at every step."""

    def __init__(self) -> None:
        self.of_a: list[bool] = []

    def on_pre_optimizer_step(self, *_, model: torch.nn.Module, **__) -> None:
        self.of_a.append(any(pair.a.grad is not None or pair.a.requires_grad for pair in adapter_pairs(model)))


def frozen_run(recipe_file: Path, overrides: list[str], checkpoint: int | None = None) -> tuple[list, list, list]:
    """Train with rule frozen: whether A was trained, the lines of metrics, and every A and B in the end."""
    recipe = load_recipe(recipe_file, ["gate.rule=frozen", "logging.logging_steps=1", *overrides])
    gradients, lines = Gradients(), []
    trainer = trainer_of(recipe, [gradients, Reporting(lambda n: None, lines.append)], gate_lambda=1.0)
    text = list(batches([row["input_ids"] for row in trainer.train_dataset], 4, CPU.device))
    generated = HeldOutText("generated text", TextKind.GENERATED, text)
    trainer.monitored = replace(trainer.monitored, generated_text=generated)
    trainer.train(checkpoint_path(Path(recipe.training.output_dir), checkpoint) if checkpoint else None)
    weights = [p.detach().clone() for pair in adapter_pairs(trainer.model) for p in (pair.a, pair.b)]
    return gradients.of_a, [line for line in lines if "grad_norm" in line], weights


def test_a_frozen_a_stays_frozen_and_measuring_changes_nothing(recipe_file: Path) -> None:
    """PEFT sets `requires_grad` on every adapter weight where an adapter is switched off and on (peft#3447)."""
    of_a, plain, weights = frozen_run(recipe_file, [])
    of_measured, measured, same_weights = frozen_run(recipe_file, ["evaluation.steps=1"])
    assert of_a == of_measured == [False] * 5
    for one, two in zip(plain, measured, strict=True):
        assert (one["loss"], one["grad_norm"]) == (two["loss"], two["grad_norm"])
    assert all(torch.equal(x, y) for x, y in zip(weights, same_weights, strict=True))


def test_a_frozen_a_stays_frozen_where_a_run_is_resumed(recipe_file: Path) -> None:
    of_a, lines, weights = frozen_run(recipe_file, ["training.save_steps=3"])
    of_resumed, rest, same_weights = frozen_run(recipe_file, ["training.save_steps=3"], checkpoint=3)
    assert of_a == [False] * 5 and of_resumed == [False] * 2
    assert [line["grad_norm"] for line in rest] == [line["grad_norm"] for line in lines[3:]]
    assert all(torch.equal(x, y) for x, y in zip(weights, same_weights, strict=True))


def test_real_text_is_measured_on_the_way_and_a_line_says_when_it_gets_worse(recipe_file: Path) -> None:
    lines, told = [], []
    trainer = trainer_of(load_recipe(recipe_file, ["evaluation.steps=5"]), [Reporting(lambda n: None, lines.append)])
    # A random model finds no text likely but what it would say itself.
    starts = torch.arange(16)[:, None] + 40
    rows = trainer.model.generate(input_ids=starts, do_sample=False, min_new_tokens=30, max_new_tokens=30).tolist()
    text = HeldOutText("prose", "general", list(batches(rows, 4, CPU.device)))
    trainer.monitored = replace(trainer.monitored, real_text=[text])
    trainer.skipped.tell = told.append
    trainer.train()
    assert [line["eval_rise_prose"] for line in lines if "eval_rise_prose" in line][0] == 0.0, "B is zero"
    for pair in adapter_pairs(trainer.model):
        torch.nn.init.normal_(pair.b, std=5.0)
    told.clear()
    rise = trainer.evaluate()["eval_rise_prose"]
    after = mean_loss(trainer.model.get_base_model(), text.batches)
    with adapter_off(trainer.model):
        before = mean_loss(trainer.model.get_base_model(), text.batches)
    assert rise == pytest.approx(after - before, abs=1e-5) and rise > 0.1
    [line] = told
    assert line.startswith(f"step 5: real text got worse: the loss on prose rose by {rise:.4f} nats per token")


def test_the_fast_loss_on_a_cpu_is_trls_loss(recipe_file: Path) -> None:
    trainer = trainer_of(load_recipe(recipe_file))
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.eval()
    ours = trainer.compute_loss(trainer.model, dict(inputs))
    trls = super(GatedTrainer, trainer).compute_loss(trainer.model, dict(inputs))
    assert torch.allclose(ours, trls, rtol=1e-5)


def test_every_step_and_line_is_reported(recipe_file: Path) -> None:
    steps, lines = [], []
    trainer_of(load_recipe(recipe_file), [Reporting(steps.append, lines.append)]).train()
    assert sum(steps) == 5
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4]
    assert all({"loss", "learning_rate", "grad_norm"} <= set(line) for line in lines if "loss" in line)


def test_losses_that_are_not_finite_stop_the_run(recipe_file: Path) -> None:
    trainer = trainer_of(load_recipe(recipe_file), [Reporting(lambda n: None, lambda line: None)])
    adapter_pairs(trainer.model)[0].a.data[0, 0] = float("nan")
    with pytest.raises(
        RunError, match="^3 steps in a row could not be taken, the last of them step 3 .loss nan, .*: not finite"
    ) as caught:
        trainer.train()
    assert "learning_rate" in caught.value.hint
