"""The numbers that a run is judged by: what the model does on the task, and what it still does elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.formats import Chat, Completion
from folora_q.data.tokens import Batch
from folora_q.evaluation.divergence import Divergence, divergence
from folora_q.evaluation.loss import mean_loss
from folora_q.evaluation.task import Answer, answer_all, exact_match
from folora_q.recipe.schema import EvaluationSection


@dataclass(frozen=True)
class HeldOut:
    """What is only ever measured on: neither trained on nor used for statistics.

    Attributes:
        examples: of the task, to be answered; empty where no metric is asked for.
        task: the task's rows as trained: loss on completions.
        proxy_start, proxy_crops: text of the base model from its start, and cut from its middle.
        general: real text.
    """

    examples: Sequence[Chat | Completion]
    task: Sequence[Batch]
    proxy_start: Sequence[Batch]
    proxy_crops: Sequence[Batch]
    general: Sequence[Batch]

    @property
    def units(self) -> int:
        """How many units `measure` reports in all."""
        return sum(map(len, (self.examples, self.task, self.general)))


@dataclass(frozen=True)
class Measurements:
    """The model at one moment.

    Attributes:
        task_loss: nats per trained token of the held-out rows.
        exact_match: share of right answers to the held-out prompts, or None.
        general_loss: nats per token of general text; after - before is PEFT's `forgetting`.
    """

    task_loss: float
    exact_match: float | None
    general_loss: float


@dataclass(frozen=True)
class Divergences:
    """Tuned model against base on the base's own held-out text: from its start, and cut from its middle."""

    start: Divergence
    crops: Divergence


def measure(
    model: PeftModel,
    tokenizer: Tokenizer,
    on: HeldOut,
    section: EvaluationSection,
    on_progress: Callable[[int], None] = lambda units: None,
) -> tuple[Measurements, list[Answer]]:
    """Measure the model as it is, with its adapter on."""
    model.eval()
    base = model.get_base_model()
    answers = (
        answer_all(model, tokenizer, on.examples, section.max_new_tokens, section.batch_size, on_progress)
        if on.examples
        else []
    )
    measurements = Measurements(
        task_loss=mean_loss(base, on.task, on_progress),
        exact_match=exact_match(answers) if answers else None,
        general_loss=mean_loss(base, on.general, on_progress),
    )
    return measurements, answers


def compare(model: PeftModel, on: HeldOut, on_progress: Callable[[int], None] = lambda batches: None) -> Divergences:
    """Compare the model with its adapter on against itself with it off; one unit of progress a batch."""
    model.eval()
    return Divergences(divergence(model, on.proxy_start, on_progress), divergence(model, on.proxy_crops, on_progress))
