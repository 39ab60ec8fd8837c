"""Score greedy answers of the base and the tuned model against references."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.examples import Chat, Completion
from folora_q.data.rendering import Renderer, RenderError
from folora_q.data.thoughts import Said, ThoughtSyntax
from folora_q.data.tokens import TEMPLATE_ERRORS, decoded, generation_inputs, text_ids
from folora_q.data.turns import Message
from folora_q.distributed.processes import ONE, Processes
from folora_q.errors import RunError, UserError
from folora_q.evaluation.intervals import score_change
from folora_q.evaluation.model_pair import ModelPair
from folora_q.memory.positions import positions_of
from folora_q.recipe.evaluation import EvaluationSection
from folora_q.runs.results import AnswerResult, ScoreResult

# Scores an answer against its reference, between 0 and 1.
Scorer = Callable[[Said, Said], float]
GENERAL_PROMPTS = Path(__file__).with_name("general_prompts.txt")


@dataclass(frozen=True)
class Generation:
    """How greedy answers are generated.

    Attributes:
        max_new_tokens: the maximum length of an answer, in tokens.
        batch_size: the number of prompts that are answered at a time.
        on_progress: called with the number of new answers of one model.
        splitter: splits batches if memory runs out; the default raises.
        processes: share the model; if it is sharded, they generate the same answers together.
    """

    max_new_tokens: int
    batch_size: int
    on_progress: Callable[[int], None] = lambda answers: None
    splitter: BatchSplitter = field(default_factory=lambda: BatchSplitter("answering", enabled=False))
    processes: Processes = ONE


@dataclass(frozen=True)
class Question:
    """A prompt that both models answer; `kind` and `prompt` as in AnswerResult.

    Attributes:
        reference: the right answer as the chat template renders it, if one is known.
        ids: the prompt's tokens.
        asked: the prompt as text, if a chat template renders it.
    """

    kind: Literal["task", "general"]
    prompt: list[Message] | str
    reference: Said | None
    ids: list[int]
    asked: str | None = None


class Questions:
    """Makes questions for one model and reads the answers, both with its chat template.

    Args:
        renderer: renders with the template of the task's rows.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.tokenizer = renderer.tokenizer
        self.syntax = ThoughtSyntax(renderer)

    def of_task(self, examples: Sequence[Chat | Completion]) -> list[Question]:
        """Make questions of held-out examples, except those on which the chat template fails."""
        return [question for example in examples if (question := self._of_example(example)) is not None]

    def general(self, path: Path) -> list[Question]:
        """Read one prompt per line, as chats if the model has a template, else as the beginning of a text.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the general prompts {path}: {error}") from None
        if not self.renderer.has_template:
            return [Question("general", line, None, text_ids(self.tokenizer, line)) for line in lines]
        found = []
        for line in lines:
            messages: list[Message] = [{"role": "user", "content": line}]
            try:
                asked = self.renderer.prompt(messages)
            except TEMPLATE_ERRORS:
                continue  # e.g. a template that requires a system prompt
            found.append(Question("general", messages, None, self.renderer.ids(asked), asked))
        return found

    def read(self, question: Question, ids: Sequence[int]) -> Said:
        """Read an answer, given as tokens."""
        return self.said(question.asked, ids)

    def said(self, asked: str | None, ids: Sequence[int]) -> Said:
        """Split an answer, given as tokens, into thought and answer.

        Args:
            asked: the prompt's text, if a chat template renders it.
        """
        if asked is None:
            return Said(decoded(self.tokenizer, ids, skip_special_tokens=True))
        return self.syntax.split(ids, asked)

    def whole(self, ids: Sequence[int]) -> str:
        """Return an answer's complete text, with its special tokens."""
        return decoded(self.tokenizer, ids)

    def _of_example(self, example: Chat | Completion) -> Question | None:
        if isinstance(example, Completion):
            ids = text_ids(self.tokenizer, example.prompt)
            return Question("task", example.prompt, Said(example.completion), ids)
        try:
            turn = self.renderer.turn(example.messages, example.answer, example.tools)
        except (RenderError, *TEMPLATE_ERRORS):
            return None
        # An empty thought that was not trained is part of the prompt here too.
        asked = turn.asked + turn.said[: turn.opening]
        said = turn.said[turn.opening :].rstrip()  # a template may add a line break after the end of the turn
        return Question(
            "task", example.prompt, self.syntax.split(self.renderer.ids(said), asked), self.renderer.ids(asked), asked
        )


def answer_both(
    model_pair: ModelPair,
    reader: Questions,
    questions: Sequence[Question],
    generation: Generation,
    scorer: Scorer | None,
) -> list[AnswerResult]:
    """Answer questions with both models, in their order.

    Args:
        scorer: scores answers to questions with a reference; None scores nothing.
    """
    prompts = [question.ids for question in questions]
    with model_pair.base() as model:
        of_base = greedy_tokens(model, reader.tokenizer, prompts, generation)
    with model_pair.tuned() as model:
        of_tuned = greedy_tokens(model, reader.tokenizer, prompts, generation)
    return [
        _result(question, reader.read(question, base), reader.read(question, tuned), scorer)
        for question, base, tuned in zip(questions, of_base, of_tuned, strict=True)
    ]


def _result(question: Question, base: Said, tuned: Said, scorer: Scorer | None) -> AnswerResult:
    reference = question.reference
    return AnswerResult(
        kind=question.kind,
        prompt=question.prompt,
        reference=None if reference is None else reference.answer,
        base=base.answer,
        tuned=tuned.answer,
        base_score=None if scorer is None or reference is None else scorer(base, reference),
        tuned_score=None if scorer is None or reference is None else scorer(tuned, reference),
        reference_thought=(reference.thought or None) if reference else None,
        base_thought=base.thought or None,
        tuned_thought=tuned.thought or None,
    )


def greedy_tokens(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], generation: Generation
) -> list[list[int]]:
    """Generate greedy answers to prompts given as tokens, in order; padding may follow the end of an answer."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, list[int]] = {}
    positions = positions_of(model.config.to_dict())
    # A model fails beyond its table of positions; the last token generated is not fed back.
    context = positions.count + 1 if positions is not None and positions.table else sys.maxsize
    model.eval()

    def answer(start: int, stop: int) -> None:
        chosen = order[start:stop]
        inputs = generation_inputs([prompts[index] for index in chosen], tokenizer, model.device)
        with torch.no_grad():
            room = min(generation.max_new_tokens, context - inputs["input_ids"].shape[1])
            output = generation.processes.generate(model, **inputs, do_sample=False, max_new_tokens=max(room, 1))
        answers.update(zip(chosen, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True))
        generation.on_progress(len(chosen))

    longest = max(map(len, prompts), default=0) + generation.max_new_tokens
    for _ in generation.splitter.over(len(order), longest, answer, generation.batch_size):
        pass
    return [answers[index] for index in range(len(prompts))]


def mean_score(answers: Sequence[AnswerResult], metric: str) -> ScoreResult | None:
    """Return the mean over all scored answers, if there are any."""
    scores = [(a.base_score, a.tuned_score) for a in answers if a.base_score is not None]
    if not scores:
        return None
    of_base, of_tuned = np.array(scores, dtype=np.float64).T
    return ScoreResult(metric, len(scores), score_change(of_base, of_tuned))


def make_scorer(section: EvaluationSection, allow_code: bool) -> Scorer | None:
    """Return the scorer that the recipe names.

    Raises:
        UserError: the metric is a user's function that cannot be loaded, or `allow_code` is False.
    """
    if section.metric == "exact_match":
        return lambda said, reference: float(said.answer.strip() == reference.answer.strip())
    if section.metric == "regex":
        pattern = re.compile(section.metric_pattern)
        return lambda said, reference: _same_match(pattern, said.answer, reference.answer)
    if section.metric == "function" and section.metric_function is not None:
        return _users_function(section.metric_function, allow_code)
    return None


def _same_match(pattern: re.Pattern[str], answer: str, reference: str) -> float:
    found = _last_match(pattern, answer)
    return float(found is not None and found == _last_match(pattern, reference))


def _last_match(pattern: re.Pattern[str], text: str) -> tuple[str, ...] | None:
    """Return the groups of the last match, or the match itself if the pattern has no groups."""
    matches = list(pattern.finditer(text))
    return (matches[-1].groups("") or (matches[-1].group(),)) if matches else None


def _users_function(place: str, allow_code: bool) -> Scorer:
    path, _, name = place.rpartition(":")
    if not allow_code:
        raise UserError(
            f"evaluation.metric_function runs the Python in {path}",
            "read it, then add --allow-code; a recipe alone cannot run code",
        )
    spec = importlib.util.spec_from_file_location("folora_q_metric", path)
    assert spec is not None and spec.loader is not None, "the recipe's check requires a .py file"
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:  # whatever the user's file raises
        raise UserError(f"cannot load {name} from {path}: {type(error).__name__}: {error}") from error

    wanted = _parameters(function)

    def score(said: Said, reference: Said) -> float:
        thoughts = {"thought": said.thought, "reference_thought": reference.thought}
        try:
            asked_for = {key: thought for key, thought in thoughts.items() if key in wanted}
            found = float(function(said.answer, reference.answer, **asked_for))
        except Exception as error:
            raise RunError(f"{name} in {path} failed on the answer {said.answer[:80]!r}: {error!r}") from error
        if not 0 <= found <= 1:
            raise RunError(f"{name} in {path} gave {found}, which is not a score between 0 and 1")
        return found

    return score


def _parameters(function: Callable[..., object]) -> set[str]:
    """Return the names of a function's parameters, or none if they cannot be determined."""
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()
