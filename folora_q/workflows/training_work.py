"""What a run will compute: the plan of its training, and a rough estimate of the work before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from peft import PeftModel

from folora_q.block_sizes import GENERAL_WINDOW
from folora_q.calibration.texts import PUBLIC_TEXT
from folora_q.data.kept_prompts import KeptPrompt, KeptSource
from folora_q.data.task_data import TaskTokens
from folora_q.evaluation.evaluate import DRIFT_TEXTS, SAMPLE_ANSWERS, general_texts
from folora_q.evaluation.task import GENERAL_PROMPTS
from folora_q.progress import TrainingPlan
from folora_q.recipe.objectives import OBJECTIVE_FACTS
from folora_q.recipe.schema import Recipe
from folora_q.recipe.training import TrainingSection
from folora_q.training.budget import COMPLETE, MEASUREMENTS
from folora_q.workflows.calibration import PENALTY_TEXTS

# A token costs one unit in a forward pass, and as much again for the gradients of its inputs: weights are frozen.
FORWARD, FORWARD_BACKWARD = 1, 2
# Generating one token for each text of a batch reads all weights, and costs at least as much as a forward pass of this
# many tokens. With the demo's model it was about 80 on two CPU cores, and 130 on an H100.
DECODING = 100
# Of ordinary text.
BYTES_PER_TOKEN = 4
# Length of a text that was cropped at a random place in its first half, on average.
CROPPED = 0.75


def training_plan(model: PeftModel, recipe: Recipe, data: TaskTokens, sequences: int) -> TrainingPlan:
    """Return what training will do.

    Args:
        model: with `requires_grad` as in training.
        sequences: the number of sequences that are trained on, after packing.
    """
    training, counts = recipe.training, data.train.counts
    steps = training.steps_for(sequences)
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    trained, parameters = model.get_nb_trainable_parameters()
    return TrainingPlan(
        sequences=sequences,
        tokens=counts.tokens,
        kind=_kind(training, counts.split),
        epochs=training.num_train_epochs if training.max_steps is None else steps * batch / sequences,
        batch=batch,
        steps=steps,
        trained=trained,
        parameters=parameters,
    )


def _kind(training: TrainingSection, split: int) -> Literal["row", "sequence", "packed sequence", "pair"]:
    """Return what a sequence that is trained on is called."""
    if training.objective == "dpo":
        return "pair"
    return "packed sequence" if training.packing else "sequence" if split else "row"


@dataclass(frozen=True)
class Work:
    """The work of a run's parts, in units of a token's forward pass; `budget` is that of its measurements."""

    sampling: float
    statistics: float
    training: float
    evaluation: float
    keeping: float = 0.0
    budget: float = 0.0

    def sentence(self, sampled: bool) -> str:
        """Compare the work before and after training with training's.

        Args:
            sampled: the text to sample is in the cache.
        """
        parts = {
            "sampling": 0.0 if sampled else self.sampling,
            "statistics": self.statistics,
            "answers to keep": self.keeping,
            "evaluation": self.evaluation,
        }
        times = {name: part / self.training for name, part in parts.items() if part}
        listed = ", ".join(f"{name} {_times(ratio)}" for name, ratio in times.items())
        controller = (
            f"; measuring for the budget adds about {_times(self.budget / self.training)}" if self.budget else ""
        )
        return (
            f"before and after training: text to generate and measure equals about {_times(sum(times.values()))} times "
            f"the training itself ({listed}; estimated from token counts){controller}"
        )


def estimated_work(recipe: Recipe, data: TaskTokens, on_gpu: bool, kept: Sequence[KeptSource] = ()) -> Work:
    """Estimate a run's work from the numbers of its tokens, as if every sample and answer had its maximum length."""
    training, train = recipe.training, data.train.counts
    learning = FORWARD_BACKWARD + FORWARD * training.recomputes_on(on_gpu)
    learning += FORWARD * OBJECTIVE_FACTS[training.objective].readings
    reading = FORWARD_BACKWARD + FORWARD * recipe.statistics_recompute_on(on_gpu)
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    passes = training.num_train_epochs
    if training.max_steps is not None:
        passes = training.max_steps * batch / train.sequences
    section, heldout = recipe.proxy, recipe.proxy.num_heldout_samples
    return Work(
        sampling=_generating(section.num_samples + heldout, section.max_new_tokens, section.batch_size),
        statistics=_statistics_tokens(recipe, data, kept) * (reading if recipe.gate.weighted else FORWARD),
        training=passes * train.tokens * learning,
        evaluation=_evaluation(recipe, data) + sum(_comparing(each, recipe) for each in kept),
        budget=_budget(recipe),
        keeping=sum(_answering(each, each.prompts.penalty + each.prompts.held_out, recipe) for each in kept),
    )


def _generating(texts: int, length: int, batch_size: int) -> float:
    """Return the work of generating texts of a length."""
    full, rest = divmod(texts, batch_size)
    return length * (full * max(batch_size, DECODING) + (max(rest, DECODING) if rest else 0))


def _answering(source: KeptSource, prompts: Sequence[KeptPrompt], recipe: Recipe) -> float:
    """Return the work of answering prompts of a capability or a file."""
    reading = sum(len(prompt.ids) for prompt in prompts) * FORWARD
    return reading + _generating(len(prompts), source.max_new_tokens, recipe.evaluation.batch_size)


def _comparing(source: KeptSource, recipe: Recipe) -> float:
    """Return the work of both models on the base's answers to held-out prompts, and of the tuned model's answers."""
    prompts = source.prompts.held_out
    return 2 * FORWARD * _tokens(source, prompts, source.texts.held_out) + _answering(source, prompts, recipe)


def _tokens(source: KeptSource, prompts: Sequence[KeptPrompt], texts: Sequence[list[int]]) -> int:
    """Return the number of tokens of prompts with their answers, and of texts."""
    return sum(len(prompt.ids) + source.max_new_tokens for prompt in prompts) + sum(map(len, texts))


def _statistics_tokens(recipe: Recipe, data: TaskTokens, kept: Sequence[KeptSource]) -> float:
    """Return the number of tokens that the statistics read, over all passes."""
    gate, section, train = recipe.gate, recipe.proxy, data.train.counts
    if not gate.enabled:
        return 0
    whole = section.num_samples * section.max_new_tokens
    public = PUBLIC_TEXT.stat().st_size / BYTES_PER_TOKEN if section.public_share else 0
    task = train.tokens * min(1, gate.num_task_samples / train.sequences)
    penalties = 2 * min(section.num_heldout_samples, PENALTY_TEXTS) * section.max_new_tokens  # of A's rows
    answers = sum(_tokens(each, each.prompts.penalty, each.texts.penalty) for each in kept if recipe.keep.share)
    return (1 + len(gate.readings)) * (whole * (1 + CROPPED) + public + task + answers) + penalties


def _evaluation(recipe: Recipe, data: TaskTokens) -> float:
    """Return the work of the evaluation after training; base and tuned model each read and answer everything."""
    section, heldout = recipe.evaluation, data.heldout.counts
    texts = recipe.proxy.num_heldout_samples - recipe.steering_texts
    sampled = texts * recipe.proxy.max_new_tokens * (1 + CROPPED)
    general = sum(path.stat().st_size for path in general_texts(section).values()) / BYTES_PER_TOKEN
    per_row = heldout.tokens / max(heldout.sequences, 1)
    drift = min(1, DRIFT_TEXTS / texts) * sampled
    drift += min(DRIFT_TEXTS, heldout.sequences) * per_row
    few = SAMPLE_ANSWERS if section.metric == "none" else heldout.examples
    prompts = min(heldout.examples, few if section.num_answers is None else section.num_answers)
    prompts += len(GENERAL_PROMPTS.read_text("utf-8").splitlines())
    answers = _generating(prompts, section.max_new_tokens, section.batch_size)
    task = heldout.tokens * (1 + OBJECTIVE_FACTS[recipe.training.objective].measured)
    return 2 * (task + sampled + general) * FORWARD + drift + 2 * answers


def _budget(recipe: Recipe) -> float:
    """Return the work of the tuned model on the texts that steer a budget; the base's is kept from the first time."""
    budget = recipe.gate.budget
    if budget is None:
        return 0.0
    texts, length = MEASUREMENTS * recipe.evaluation.num_proxy_samples, GENERAL_WINDOW
    if budget.kl is not None:
        texts += COMPLETE * (budget.num_texts - recipe.evaluation.num_proxy_samples)
        length = (1 + CROPPED) * recipe.proxy.max_new_tokens
    return texts * length * FORWARD


def _times(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio < 100 else f"{ratio:,.0f}"
