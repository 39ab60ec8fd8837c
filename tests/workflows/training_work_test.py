"""A run's work is told in advance from numbers of tokens, and its plan as it is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from folora_q.data.capability_prompts import Ask
from folora_q.data.kept_prompts import Halves, KeptPrompt, KeptSource
from folora_q.data.tokenized import Counts
from folora_q.recipe import load_recipe
from folora_q.workflows.training_work import Work, estimated_work, training_plan


def data(**train: int) -> SimpleNamespace:
    """Tokenized data of which only the numbers are known: 12 rows of 400 tokens, and 4 of 140."""
    counts = Counts(**{"examples": 12, "sequences": 12, "tokens": 400} | train)
    heldout = Counts(examples=4, sequences=4, tokens=140)
    return SimpleNamespace(train=SimpleNamespace(counts=counts), heldout=SimpleNamespace(counts=heldout))


def model(trained: int = 10, parameters: int = 100) -> SimpleNamespace:
    return SimpleNamespace(get_nb_trainable_parameters=lambda: (trained, parameters))


def test_work_is_counted_in_forward_passes(recipe_file: Path) -> None:
    found = estimated_work(load_recipe(recipe_file), data(), on_gpu=False)
    assert found.training == pytest.approx(5 * 4 / 12 * 400 * 2), "forward and backward"
    assert found.sampling == 24 * 100, "six texts cost as much as the weights that are read for each token"
    # Three passes over four samples, their crops and six of twelve rows; and twice two samples.
    assert found.statistics == pytest.approx((3 * (4 * 24 * 1.75 + 200) + 2 * 2 * 24) * 2)
    read, prompts = 140 + 2 * 24 * 1.75 + 2_000 / 4, 4 + 6
    assert prompts < 16, "one batch"
    assert found.evaluation == pytest.approx(2 * read + (140 + 2 * 24 * 1.75) + 2 * 8 * 100)


def test_recomputed_activations_cost_a_third_pass_and_large_batches_their_texts(recipe_file: Path) -> None:
    on_cpu, on_gpu = (estimated_work(load_recipe(recipe_file), data(), gpu) for gpu in (False, True))
    assert on_gpu.training == pytest.approx(1.5 * on_cpu.training)
    many = load_recipe(recipe_file, ["proxy.num_samples=298", "proxy.batch_size=200", "gate.enabled=false"])
    found = estimated_work(many, data(), on_gpu=False)
    assert found.sampling == 24 * (200 + 100) and found.statistics == 0


def test_objectives_on_rewards_also_read_without_gradients(recipe_file: Path) -> None:
    sft, dpo, kto = (
        estimated_work(load_recipe(recipe_file, [f"training.objective={name}"]), data(), on_gpu=False)
        for name in ("sft", "dpo", "kto")
    )
    assert dpo.training == pytest.approx(sft.training * 3 / 2), "the base reads each answer"
    assert kto.training == pytest.approx(sft.training * 5 / 2), "and both models read the mismatched one"
    assert (dpo.evaluation - sft.evaluation, kto.evaluation - sft.evaluation) == (2 * 140, 4 * 140)


def test_what_is_kept_is_answered_read_and_measured(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    prompts = Halves([KeptPrompt(Ask([]), [3] * 10, None)] * 4, [KeptPrompt(Ask([]), [3] * 10, None)] * 2)
    source = KeptSource("mine", None, prompts, Halves([], [[3] * 50]), None, max_new_tokens=5)
    without, found = (estimated_work(recipe, data(), False, kept) for kept in ((), [source]))
    assert (without.keeping, found.keeping) == (0, 6 * 10 + 5 * 100), "one batch for the cost of reading all weights"
    assert found.statistics - without.statistics == pytest.approx(3 * 4 * 15 * 2), (
        "in three passes, forward and backward"
    )
    assert found.evaluation - without.evaluation == pytest.approx(2 * (2 * 15 + 50) + 2 * 10 + 5 * 100)
    measured = estimated_work(load_recipe(recipe_file, ["keep.share=0"]), data(), False, [source])
    assert measured.statistics == without.statistics
    assert "answers to keep 0." in found.sentence(sampled=True)


def test_the_sentence_names_what_is_left_to_do() -> None:
    work = Work(sampling=600, statistics=500, training=1_000, evaluation=300)
    assert work.sentence(sampled=False) == (
        "before and after training: text to generate and measure equals about 1.4 times the training itself "
        "(sampling 0.6, statistics 0.5, evaluation 0.3; estimated from token counts)"
    )
    spending = replace(work, budget=120)
    assert spending.sentence(sampled=False).endswith("token counts); measuring for the budget adds about 0.12")
    assert "about 0.8 times the training itself (statistics 0.5, evaluation 0.3;" in work.sentence(sampled=True)


def test_the_plan_is_that_of_the_trainer(recipe_file: Path) -> None:
    epochs = load_recipe(recipe_file, ["training.max_steps=null", "training.num_train_epochs=2"])
    plan = training_plan(model(), epochs, data(), 12)
    assert (plan.sequences, plan.tokens, plan.kind, plan.epochs) == (12, 400, "row", 2.0)
    assert (plan.batch, plan.steps, plan.trained, plan.parameters) == (4, 6, 10, 100)
    steps = training_plan(model(), load_recipe(recipe_file), data(split=2), 12)
    assert (steps.kind, steps.steps, steps.epochs) == ("sequence", 5, pytest.approx(5 / 3))
    packed = training_plan(model(), load_recipe(recipe_file, ["training.packing=true"]), data(), 3)
    assert (packed.sequences, packed.kind) == (3, "packed sequence")
