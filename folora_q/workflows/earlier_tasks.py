"""Tasks that a model learned before: their rows, which are preserved, and their held-out rows, which are measured."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from folora_q.block_sizes import STATISTICS_LENGTH
from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.examples import with_answers
from folora_q.data.pairs import answers_to_learn
from folora_q.data.task_data import TaskTokens, chat_template, read_task, tokenize_task
from folora_q.data.windows import last_windows
from folora_q.errors import UserError
from folora_q.evaluation.divergence import HeldOutText
from folora_q.evaluation.evaluate import task_batches
from folora_q.evaluation.model_pair import ModelPair
from folora_q.evaluation.task import Generation, Questions, Scorer, answer_both, make_scorer, mean_score
from folora_q.models.tokenizer import load_tokenizer
from folora_q.models.trust import NOTHING, Trust
from folora_q.progress import StageTimer
from folora_q.recipe.schema import ModelSection, Recipe
from folora_q.runs.earlier_tasks import earlier_recipes, unreadable_data
from folora_q.runs.results import ScoreResult, TextKind


@dataclass(frozen=True)
class EarlierTask:
    """A task that was learned before.

    Attributes:
        name: for display, e.g. "earlier task bookings"; unique among the tasks of a run.
        recipe: of the run that learned it, or the one that names its data.
        scorer: scores answers; None where its recipe has no metric, or one that needs code that is not allowed.
    """

    name: str
    recipe: Recipe
    data: TaskTokens
    scorer: Scorer | None

    def rows(self, count: int, seed: int) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
        """Return tokens and labels of at most `count` training rows, cut to the length of the statistics."""
        ids, labels = answers_to_learn(self.data.train.sequences[:])
        chosen = random.Random(seed).sample(range(len(ids)), min(count, len(ids)))
        return last_windows([ids[row] for row in chosen], [labels[row] for row in chosen], STATISTICS_LENGTH)


def read_earlier_tasks(
    section: ModelSection, timer: StageTimer, allow_code: bool = False, trust: Trust = NOTHING, required: bool = True
) -> list[EarlierTask]:
    """Read and tokenize the rows of every earlier task.

    Args:
        section: the model, with the earlier adapter.
        required: data that cannot be read is an error; otherwise it is reported, and the task is left out.

    Raises:
        UserError: a recipe or its data cannot be read.
    """
    recipes, _ = earlier_recipes(section)
    return read_tasks(recipes, TaskReading(section, timer, allow_code, trust, required))


@dataclass(frozen=True)
class TaskReading:
    """How the rows of tasks are read.

    Attributes:
        section: the model whose tokenizer they get.
        required: data that cannot be read is an error; otherwise it is reported, and the task is left out.
    """

    section: ModelSection
    timer: StageTimer
    allow_code: bool = False
    trust: Trust = NOTHING
    required: bool = True


def read_tasks(named: Sequence[tuple[str, Recipe]], how: TaskReading) -> list[EarlierTask]:
    """Read and tokenize the rows of tasks, given by name and recipe.

    Raises:
        UserError: data that is required cannot be read.
    """
    tasks, note = [], how.timer.note
    for name, recipe in named:
        try:
            data = _tokenized(recipe, how)
        except UserError as error:
            unreadable = unreadable_data(name, error)
            if how.required:
                raise unreadable from error
            note(f"{unreadable.message}; it is not measured")
            continue
        runs_code = recipe.evaluation.metric == "function" and not how.allow_code
        if runs_code:
            note(f"the metric of the {name} is code, which --allow-code runs: only its loss is measured")
        scorer = None if runs_code else make_scorer(recipe.evaluation, how.allow_code)
        tasks.append(EarlierTask(name, recipe, data, scorer))
    return tasks


def held_out_texts(tasks: Sequence[EarlierTask], batch_size: int, device: torch.device) -> list[HeldOutText]:
    """Return the held-out rows of earlier tasks, for losses."""
    rows = ((task.name, task_batches(task.data, batch_size, device)) for task in tasks)
    return [HeldOutText(name, TextKind.EARLIER, batches) for name, batches in rows if batches]


def score_earlier(model_pair: ModelPair, tasks: Sequence[EarlierTask], timer: StageTimer) -> list[ScoreResult]:
    """Answer the held-out prompts of earlier tasks with both models, and score the answers by their own metrics."""
    scores = []
    splitter = BatchSplitter("measuring", timer.warn, enabled=model_pair.processes.independent)
    for task in tasks:
        section = task.recipe.evaluation
        answerable = with_answers(task.data.task.heldout)[: section.num_answers]
        if task.scorer is None or not answerable:
            continue
        reader = Questions(task.data.renderer)
        questions = reader.of_task(answerable)
        with timer.stage(f"answering the {task.name}", 2 * len(questions), "answers") as done:
            generation = Generation(section.max_new_tokens, section.batch_size, done, splitter, model_pair.processes)
            answers = answer_both(model_pair, reader, questions, generation, task.scorer)
        if (score := mean_score(answers, section.metric)) is not None:
            scores.append(ScoreResult(score.metric, score.answers, score.score, task.name))
    return scores


def _tokenized(recipe: Recipe, how: TaskReading) -> TaskTokens:
    """Tokenize a task as its own run did: with its template and lengths."""
    tokenizer = load_tokenizer(how.section, chat_template(recipe), how.trust)
    return tokenize_task(recipe, read_task(recipe, how.timer), tokenizer, how.timer)
