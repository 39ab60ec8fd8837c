"""Evaluate a tuned model: prepare the texts and questions, and measure on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.block_sizes import GENERAL_WINDOW
from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.examples import Example, with_answers
from folora_q.data.pairs import answers_to_learn
from folora_q.data.rendering import Renderer
from folora_q.data.task_data import TaskTokens
from folora_q.data.tokens import Batch, batches, count_tokens
from folora_q.data.windows import crops
from folora_q.evaluation.divergence import HeldOutText, compare
from folora_q.evaluation.drift import adapted_layers, measured_drift, update_norm
from folora_q.evaluation.kept import Kept, kept_answers, kept_results
from folora_q.evaluation.loss import GENERAL_TEXTS, text_windows
from folora_q.evaluation.model_pair import ModelPair
from folora_q.evaluation.preference import HeldOutAnswers, held_out_answers, measure_rewards
from folora_q.evaluation.task import (
    GENERAL_PROMPTS,
    Generation,
    Question,
    Questions,
    Scorer,
    answer_both,
    mean_score,
)
from folora_q.progress import StageTimer
from folora_q.recipe.evaluation import EvaluationSection
from folora_q.recipe.training import TrainingSection
from folora_q.runs.results import (
    GENERATED_TEXT,
    GENERATED_TEXT_CUT,
    AnswerResult,
    KeptResult,
    LayerResult,
    PreferenceResult,
    ScoreResult,
    TextKind,
    TextResult,
)

# Number of held-out prompts that are answered without a metric, for reading.
SAMPLE_ANSWERS = 4
# Drift is a ratio of sums over thousands of tokens, so few texts suffice.
DRIFT_TEXTS = 32


@dataclass(frozen=True)
class HeldOutSources:
    """What held-out texts and questions are made from, besides packaged ones and the recipe's files.

    Attributes:
        generated: texts that the base sampled, as tokens; they are used in full, and again cropped.
        crop_seed: seed of the crops.
        data: the task; None: no task.
        kept: what the recipe keeps, as the base answers it.
        training: the task's, whose objective may be one on rewards.
    """

    generated: Sequence[Sequence[int]]
    crop_seed: int
    data: TaskTokens | None
    kept: Sequence[Kept] = ()
    training: TrainingSection | None = None


@dataclass(frozen=True)
class HeldOut:
    """What a model is evaluated on.

    Attributes:
        texts: for loss and predictions.
        questions: to be answered.
        reader: reads the answers.
        drift: texts by kind, on which the layers' outputs are compared.
        kept: what the recipe keeps; its held-out sequences are in `texts` too, in the same order.
        rewarded: answers whose rewards are measured, of objectives dpo and kto; the task's text is then that of the
            answers to be learned.
    """

    texts: list[HeldOutText]
    questions: list[Question]
    reader: Questions
    drift: dict[str, list[Batch]]
    kept: Sequence[Kept] = field(default_factory=tuple)
    rewarded: HeldOutAnswers | None = None


@dataclass(frozen=True)
class Compared:
    """Base and tuned model on texts, and on answers with rewards if the task has such."""

    texts: list[TextResult]
    preference: PreferenceResult | None = None


class Measurements(NamedTuple):
    """What base and tuned model were measured on, except their layers."""

    texts: list[TextResult]
    score: ScoreResult | None
    answers: list[AnswerResult]
    kept: list[KeptResult]
    preference: PreferenceResult | None


def held_out(
    tokenizer: Tokenizer,
    section: EvaluationSection,
    device: torch.device,
    sources: HeldOutSources,
    max_length: int = GENERAL_WINDOW,
) -> HeldOut:
    """Prepare what a model is evaluated on.

    Args:
        max_length: the longest sequence that the model should see.

    Raises:
        UserError: a text file cannot be read, or is too short.
    """
    size, generated, data = section.batch_size, sources.generated, sources.data
    rows = None if data is None else data.heldout.sequences[:]
    ids, labels = ((), ()) if rows is None else answers_to_learn(rows)
    cut = crops(generated, sources.crop_seed)
    texts = [HeldOutText("task", TextKind.TASK, list(batches(ids, size, device, labels)))] if ids else []
    if generated:
        texts.append(HeldOutText(GENERATED_TEXT, TextKind.GENERATED, list(batches(generated, size, device))))
        texts.append(HeldOutText(GENERATED_TEXT_CUT, TextKind.GENERATED, list(batches(cut, size, device))))
    window = min(GENERAL_WINDOW, max_length)
    for name, path in general_texts(section).items():
        windows = text_windows(path, tokenizer, window)
        texts.append(HeldOutText(name, TextKind.GENERAL, list(batches(windows, size, device))))
    texts += [kept.text(size, device) for kept in sources.kept]
    drift = {
        TextKind.GENERATED: [*generated[:DRIFT_TEXTS], *cut[:DRIFT_TEXTS]],
        TextKind.TASK: list(ids[:DRIFT_TEXTS]),
    }
    rewarded = None
    if rows is not None and sources.training is not None and sources.training.compares:
        rewarded = held_out_answers(rows, sources.training, size, device)
    reader = Questions(Renderer(tokenizer) if data is None else data.renderer)
    return HeldOut(
        texts=texts,
        questions=_questions(reader, section, () if data is None else data.task.heldout),
        reader=reader,
        drift={kind: list(batches(sequences, size, device)) for kind, sequences in drift.items() if sequences},
        kept=sources.kept,
        rewarded=rewarded,
    )


def whole_and_cut(ids: Sequence[Sequence[int]], crop_seed: int, batch_size: int, device: torch.device) -> HeldOutText:
    """Return model-generated texts as one: complete, and again without their beginning."""
    both = [*ids, *crops(ids, crop_seed)]
    return HeldOutText(GENERATED_TEXT, TextKind.GENERATED, list(batches(both, batch_size, device)))


def task_batches(data: TaskTokens, batch_size: int, device: torch.device) -> list[Batch]:
    """Return a task's held-out rows, with the answers to be learned."""
    ids, labels = answers_to_learn(data.heldout.sequences[:])
    return list(batches(ids, batch_size, device, labels))


def general_texts(section: EvaluationSection) -> dict[str, Path]:
    """Return the files of general text by a unique display name."""
    if section.general_text is None:
        return GENERAL_TEXTS
    paths = [Path(name) for name in section.general_text]
    stems = [path.stem for path in paths]
    return {path.stem if stems.count(path.stem) == 1 else str(path): path for path in paths}


def _questions(reader: Questions, section: EvaluationSection, examples: Sequence[Example]) -> list[Question]:
    answerable = with_answers(examples)
    few = SAMPLE_ANSWERS if section.metric == "none" else None
    prompts = Path(section.general_prompts) if section.general_prompts else GENERAL_PROMPTS
    chosen = answerable[: few if section.num_answers is None else section.num_answers]
    return reader.of_task(chosen) + reader.general(prompts)


def evaluate(
    model_pair: ModelPair,
    on: HeldOut,
    section: EvaluationSection,
    scorer: Scorer | None,
    clock: StageTimer,
) -> Measurements:
    """Measure losses and predictions on every text, and answer and score every question."""
    compared = compare_texts(model_pair, on, clock)
    splitter = BatchSplitter("measuring", clock.warn, enabled=model_pair.processes.independent)
    prompts = sum(len(kept.source.prompts.held_out) for kept in on.kept)  # which the base has answered before
    with clock.stage("answering, as base and as tuned", 2 * len(on.questions) + prompts, "answers") as done:
        generation = Generation(section.max_new_tokens, section.batch_size, done, splitter, model_pair.processes)
        answers = answer_both(model_pair, on.reader, on.questions, generation, scorer)
        of_kept = kept_answers(model_pair, on.reader, on.kept, generation)
    texts = compared.texts
    results = kept_results(on.kept, of_kept, [text for text in texts if text.kind is TextKind.KEPT])
    return Measurements(
        texts=[text for text in texts if text.kind is not TextKind.KEPT],
        score=mean_score(answers, section.metric),
        answers=answers + [answer for each in of_kept.values() for answer in each],
        kept=results,
        preference=compared.preference,
    )


def compare_texts(model_pair: ModelPair, on: HeldOut, clock: StageTimer) -> Compared:
    """Measure losses and predictions on every text, and rewards of answers; all processes of the pair take part."""
    model_pair.eval()
    splitter = BatchSplitter("measuring", clock.warn, enabled=model_pair.processes.independent)
    tokens = sum(count_tokens(text.batches) for text in (*on.texts, *([on.rewarded] if on.rewarded else [])))
    with clock.stage("comparing losses and predictions", tokens, "tokens") as done:
        texts = [compare(model_pair, text, done, splitter) for text in on.texts]
        rewards = None if on.rewarded is None else measure_rewards(model_pair, on.rewarded, done, splitter)
        return Compared(texts, rewards)


def evaluate_layers(
    model_pair: ModelPair,
    on: HeldOut,
    clock: StageTimer,
    predicted: Mapping[str, Mapping[str, float]] | None = None,
    energy_kept: Mapping[str, Mapping[str, float]] | None = None,
) -> list[LayerResult]:
    """Measure how far every layer moved.

    Args:
        predicted: by layer, the drift that the gates' statistics predict.
        energy_kept: by layer, the share of the steps' energy that passed the gate.
    """
    measured: dict[str, dict[str, float]] = {}
    splitter = BatchSplitter("measuring drift of", clock.warn, enabled=model_pair.processes.independent)
    tokens = sum(map(count_tokens, on.drift.values()))
    with clock.stage("measuring how far each layer moved", tokens, "tokens") as done:
        for kind, text in on.drift.items():
            for name, drift in measured_drift(model_pair, text, done, splitter).items():
                measured.setdefault(name, {})[kind] = drift
    modules = {} if model_pair.adapted is None else adapted_layers(model_pair.adapted)
    return [
        LayerResult(
            name=name,
            drift=drift,
            predicted=dict((predicted or {}).get(name, {})),
            energy_kept=dict((energy_kept or {}).get(name, {})),
            update_norm=update_norm(modules[name]) if name in modules else None,
        )
        for name, drift in measured.items()
    ]
