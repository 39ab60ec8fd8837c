"""Does the model do the task: greedy answers of base and tuned model, scored against their references."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.formats import Chat, Completion
from folora_q.data.halving import Halving
from folora_q.data.tokens import TEMPLATE_ERRORS, generation_inputs, prompt_ids
from folora_q.errors import RunFailed, UserError
from folora_q.evaluation.bootstrap import Tally, change
from folora_q.evaluation.contrast import Contrast
from folora_q.memory.positions import positions_of
from folora_q.recipe.schema import EvaluationSection
from folora_q.runs.results import AnswerResult, ScoreResult

# Takes (answer, reference) and says how right it is, between 0 and 1.
Scorer = Callable[[str, str], float]
GENERAL_PROMPTS = Path(__file__).with_name("general_prompts.txt")


@dataclass(frozen=True)
class Question:
    """Something to be answered by both models; `kind`, `prompt` and `reference` as in AnswerResult."""

    kind: Literal["task", "general"]
    prompt: list[dict[str, str]] | str
    reference: str | None
    ids: list[int]


def task_questions(examples: Sequence[Chat | Completion], tokenizer: Tokenizer) -> list[Question]:
    """Held-out examples as questions, but for those that the chat template refuses."""
    return [
        Question("task", example.prompt, example.reference, ids)
        for example in examples
        if (ids := _rendered(example, tokenizer)) is not None
    ]


def general_questions(path: Path, tokenizer: Tokenizer) -> list[Question]:
    """A prompt a line, as chats where the model has a template, else as the beginning of a text.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the general prompts {path}: {error}") from None
    if tokenizer.chat_template is None:
        return [Question("general", line, None, tokenizer(line)["input_ids"]) for line in lines]
    # The assistant's empty turn is what `prompt` ends before.
    turns = [[{"role": "user", "content": line}, {"role": "assistant", "content": ""}] for line in lines]
    chats = [Chat(str(path), messages) for messages in turns]
    return [
        Question("general", chat.prompt, None, ids)
        for chat in chats
        if (ids := _rendered(chat, tokenizer)) is not None  # a template may want a system prompt, say
    ]


def _rendered(example: Chat | Completion, tokenizer: Tokenizer) -> list[int] | None:
    try:
        return prompt_ids(tokenizer, example)
    except TEMPLATE_ERRORS:
        return None


def answer_both(
    contrast: Contrast,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    section: EvaluationSection,
    scorer: Scorer | None,
    on_progress: Callable[[int], None] = lambda answers: None,
    halving: Halving | None = None,
) -> list[AnswerResult]:
    """What both models say, in the order of the questions.

    Args:
        halving: what to do where memory runs out; None raises.
        scorer: scores answers to questions with a reference; None scores nothing.
        on_progress: called with answers given, 2 x len(questions) in all.
    """
    prompts = [question.ids for question in questions]
    settings = section.max_new_tokens, section.batch_size, on_progress, halving
    with contrast.base() as model:
        of_base = greedy_answers(model, tokenizer, prompts, *settings)
    with contrast.tuned() as model:
        of_tuned = greedy_answers(model, tokenizer, prompts, *settings)
    return [
        AnswerResult(
            kind=question.kind,
            prompt=question.prompt,
            reference=question.reference,
            base=base,
            tuned=tuned,
            base_score=_scored(scorer, base, question.reference),
            tuned_score=_scored(scorer, tuned, question.reference),
        )
        for question, base, tuned in zip(questions, of_base, of_tuned, strict=True)
    ]


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda answers: None,
    halving: Halving | None = None,
) -> list[str]:
    """Greedy answers to prompts given as tokens, in their order, without special tokens."""
    halving = halving or Halving("answering", enabled=False)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, str] = {}
    positions = positions_of(model.config.to_dict())
    # Beyond a table of positions a model fails; one more token is written without being read.
    context = positions.count + 1 if positions is not None and positions.table else sys.maxsize
    model.eval()

    def answer(start: int, stop: int) -> None:
        chosen = order[start:stop]
        inputs = generation_inputs([prompts[index] for index in chosen], tokenizer, model.device)
        with torch.no_grad():
            room = min(max_new_tokens, context - inputs["input_ids"].shape[1])
            output = model.generate(**inputs, do_sample=False, max_new_tokens=max(room, 1))
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.update(zip(chosen, texts, strict=True))
        on_progress(len(chosen))

    longest = max(map(len, prompts), default=0) + max_new_tokens
    for _ in halving.over(len(order), longest, answer, batch_size):
        pass
    return [answers[index] for index in range(len(prompts))]


def mean_score(answers: Sequence[AnswerResult], metric: str) -> ScoreResult | None:
    """The mean over all answers that were scored, if any were."""
    scores = [(a.base_score, a.tuned_score) for a in answers if a.base_score is not None]
    if not scores:
        return None
    of_base, of_tuned = np.array(scores, dtype=np.float64).T
    ones = np.ones(len(scores))
    return ScoreResult(metric, len(scores), change(Tally(of_base, ones), Tally(of_tuned, ones)))


def make_scorer(section: EvaluationSection, allow_code: bool) -> Scorer | None:
    """What scores answers, as the recipe says.

    Raises:
        UserError: the metric is a function of the user's, and it cannot be loaded, or `allow_code` is not given.
    """
    if section.metric == "exact_match":
        return lambda answer, reference: float(answer.strip() == reference.strip())
    if section.metric == "regex":
        pattern = re.compile(section.metric_pattern)
        return lambda answer, reference: _same_match(pattern, answer, reference)
    if section.metric == "function":
        return _users_function(section.metric_function, allow_code)
    return None


def _same_match(pattern: re.Pattern[str], answer: str, reference: str) -> float:
    found = _last_match(pattern, answer)
    return float(found is not None and found == _last_match(pattern, reference))


def _last_match(pattern: re.Pattern[str], text: str) -> tuple[str, ...] | None:
    """The groups of the last place that matches, or all of it where the pattern has none."""
    matches = list(pattern.finditer(text))
    return (matches[-1].groups("") or (matches[-1].group(),)) if matches else None


def _users_function(place: str, allow_code: bool) -> Scorer:
    path, _, name = place.rpartition(":")
    if not allow_code:
        raise UserError(
            f"evaluation.metric_function runs the Python in {path}",
            "look at it, then add --allow-code; a recipe alone cannot run code",
        )
    spec = importlib.util.spec_from_file_location("folora_q_metric", path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:  # whatever the user's file raises
        raise UserError(f"cannot load {name} from {path}: {type(error).__name__}: {error}") from error

    def score(answer: str, reference: str) -> float:
        try:
            found = float(function(answer, reference))
        except Exception as error:
            raise RunFailed(f"{name} in {path} failed on the answer {answer[:80]!r}: {error!r}") from error
        if not 0 <= found <= 1:
            raise RunFailed(f"{name} in {path} gave {found}, which is no score between 0 and 1")
        return found

    return score


def _scored(scorer: Scorer | None, answer: str, reference: str | None) -> float | None:
    return None if scorer is None or reference is None else scorer(answer, reference)
