"""Tasks that a model learned before: their rows, which are preserved, and their held-out rows, which are measured."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from folora_q.block_sizes import STATISTICS_LENGTH
from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.formats import Text
from folora_q.data.task_data import TaskTokens, chat_template, read_task, tokenize_task
from folora_q.data.tokens import batches
from folora_q.data.windows import last_windows
from folora_q.errors import UserError, first_line
from folora_q.evaluation.divergence import HeldOutText
from folora_q.evaluation.model_pair import ModelPair
from folora_q.evaluation.task import Generation, Questions, Scorer, answer_both, make_scorer, mean_score
from folora_q.models.tokenizer import load_tokenizer
from folora_q.models.trust import NOTHING, Trust
from folora_q.progress import StageTimer
from folora_q.recipe import load_recipe
from folora_q.recipe.schema import ModelSection, Recipe
from folora_q.runs.folder import RunFolder
from folora_q.runs.results import ScoreResult, TextKind

UNKNOWN = (
    "the data of the task that {name} learned is not known (model.adapter_data): it is not measured, and protected only by "
    "text that the base generates with it"
)


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
        train = self.data.train.sequences
        chosen = random.Random(seed).sample(range(len(train)), min(count, len(train)))
        rows = train[chosen]
        return last_windows(rows["input_ids"], rows["labels"], STATISTICS_LENGTH)


def earlier_recipes(section: ModelSection) -> tuple[list[tuple[str, Recipe]], list[str]]:
    """Return the recipes of all earlier tasks by name, the first task first, and the adapters whose task is unknown.

    Raises:
        UserError: a recipe cannot be read.
    """
    found: list[tuple[str, Recipe]] = []
    unknown: list[str] = []
    seen: set[Path] = set()
    while section.adapter is not None and Path(section.adapter).resolve() not in seen:
        path = Path(section.adapter).resolve()
        seen.add(path)
        run = next((run for run in (RunFolder(path), RunFolder(path.parent)) if run.manifest.is_file()), None)
        recipe = None if run is None else _recipe_of(run)
        if section.adapter_data is not None:
            found.append((Path(section.adapter_data).stem, load_recipe(Path(section.adapter_data))))
        elif recipe is not None:
            found.append((run.path.name if run else path.name, recipe))
        else:
            unknown.append(section.adapter)
        if recipe is None:
            break
        section = recipe.model
    return _with_unique_names(found[::-1]), unknown


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
    recipes, unknown = earlier_recipes(section)
    for name in unknown:
        timer.warn(UNKNOWN.format(name=name))
    tasks = []
    for name, recipe in recipes:
        try:
            data = _tokenized(section, recipe, timer, trust)
        except UserError as error:
            reason = f"the data of the {name} cannot be read: {error.message}"
            if required:
                hint = "name a recipe with its data as model.adapter_data, or set proxy.earlier_share: 0"
                raise UserError(reason, hint) from error
            timer.note(f"{reason}; it is not measured")
            continue
        metric_runs_code = recipe.evaluation.metric == "function" and not allow_code
        if metric_runs_code:
            timer.note(f"the metric of the {name} is code, which --allow-code runs: only its loss is measured")
        scorer = None if metric_runs_code else make_scorer(recipe.evaluation, allow_code)
        tasks.append(EarlierTask(name, recipe, data, scorer))
    return tasks


def held_out_texts(tasks: Sequence[EarlierTask], batch_size: int, device: object) -> list[HeldOutText]:
    """Return the held-out rows of earlier tasks, for losses."""
    found = []
    for task in tasks:
        rows = task.data.heldout.sequences
        read = batches(rows["input_ids"][:], batch_size, device, rows["labels"][:])  # pyright: ignore[reportArgumentType]
        found.append(HeldOutText(task.name, TextKind.EARLIER, list(read)))
    return found


def score_earlier(model_pair: ModelPair, tasks: Sequence[EarlierTask], timer: StageTimer) -> list[ScoreResult]:
    """Answer the held-out prompts of earlier tasks with both models, and score the answers by their own metrics."""
    scores = []
    splitter = BatchSplitter("measuring", timer.warn, enabled=not model_pair.processes.sharded)
    for task in tasks:
        section = task.recipe.evaluation
        answerable = [each for each in task.data.task.heldout if not isinstance(each, Text)][: section.num_answers]
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


def _tokenized(section: ModelSection, recipe: Recipe, timer: StageTimer, trust: Trust) -> TaskTokens:
    """Tokenize an earlier task as its own run did: with its template and lengths."""
    tokenizer = load_tokenizer(section, chat_template(recipe), trust)
    return tokenize_task(recipe, read_task(recipe, timer), tokenizer, timer)


def _recipe_of(run: RunFolder) -> Recipe | None:
    try:
        return run.read_recipe()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run.recipe} cannot be read: {first_line(error)}", "name a recipe with its data as model.adapter_data"
        ) from None


def _with_unique_names(found: Sequence[tuple[str, Recipe]]) -> list[tuple[str, Recipe]]:
    names = [name for name, _ in found]
    unique: Callable[[int, str], str] = lambda n, name: name if names.count(name) == 1 else f"{name} ({n})"  # noqa: E731
    return [(f"earlier task {unique(n, name)}", recipe) for n, (name, recipe) in enumerate(found, 1)]
