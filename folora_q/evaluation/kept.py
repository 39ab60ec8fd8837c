"""Measure what a recipe keeps: scores of greedy answers, and the KL on what the base answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from folora_q.data.kept_prompts import KeptPrompt, KeptSource
from folora_q.data.tokens import IGNORED, Batch, batches, end_tokens, until_end
from folora_q.evaluation.capability_scores import SCORERS, KeptAnswer
from folora_q.evaluation.divergence import HeldOutText
from folora_q.evaluation.intervals import score_change
from folora_q.evaluation.model_pair import ModelPair
from folora_q.evaluation.task import Generation, Questions, greedy_tokens
from folora_q.recipe.capabilities import CAPABILITIES
from folora_q.runs.results import AnswerResult, KeptResult, TextKind, TextResult

Labelled = tuple[list[int], list[int]]  # tokens, and labels that say which of them count


@dataclass(frozen=True)
class Kept:
    """A capability or a file, with the base's greedy answers to all its prompts, up to their end tokens."""

    source: KeptSource
    penalty_answers: list[list[int]]
    held_out_answers: list[list[int]]

    @property
    def penalty(self) -> list[Labelled]:
        """Sequences for Σp; of a prompt with its answer, the answer counts."""
        return _labelled(self.source.prompts.penalty, self.penalty_answers, self.source.texts.penalty)

    @property
    def held_out(self) -> list[Labelled]:
        """Sequences on which base and tuned model are compared."""
        return _labelled(self.source.prompts.held_out, self.held_out_answers, self.source.texts.held_out)

    def penalty_text(self, batch_size: int | Callable[[int], int], device: torch.device) -> list[Batch]:
        """Return the sequences for Σp, the answers as greedy text."""
        answered = len(self.penalty_answers)
        parts = (self.penalty[:answered], True), (self.penalty[answered:], False)
        return [
            batch._replace(greedy=greedy)
            for part, greedy in parts
            for batch in batches([ids for ids, _ in part], batch_size, device, [labels for _, labels in part])
        ]

    def text(self, batch_size: int, device: torch.device) -> HeldOutText:
        """Return the held-out sequences as text for the KL."""
        ids, labels = zip(*self.held_out, strict=True)
        return HeldOutText(self.source.name, TextKind.KEPT, list(batches(ids, batch_size, device, labels)))


def _labelled(
    prompts: Sequence[KeptPrompt], answers: Sequence[list[int]], texts: Sequence[list[int]]
) -> list[Labelled]:
    answered = [
        (prompt.ids + answer, [IGNORED] * len(prompt.ids) + answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return answered + [(ids, ids) for ids in texts]


def kept_answers(
    model_pair: ModelPair, reader: Questions, kept: Sequence[Kept], generation: Generation
) -> dict[str, list[AnswerResult]]:
    """Answer the held-out prompts with the tuned model, and score them; the base's answers are known.

    Args:
        generation: its maximum length is replaced by that of each capability.
    """
    found: dict[str, list[AnswerResult]] = {}
    with model_pair.tuned() as model:
        ends = end_tokens(model)
        for each in kept:
            source, prompts = each.source, each.source.prompts.held_out
            settings = replace(generation, max_new_tokens=source.max_new_tokens)
            tuned = greedy_tokens(model, reader.tokenizer, [prompt.ids for prompt in prompts], settings)
            found[source.name] = [
                _result(
                    source,
                    prompt,
                    _read(source, reader, prompt, old),
                    _read(source, reader, prompt, until_end(new, ends)),
                )
                for prompt, old, new in zip(prompts, each.held_out_answers, tuned, strict=True)
            ]
    return found


def kept_results(
    kept: Sequence[Kept], answers: dict[str, list[AnswerResult]], texts: Sequence[TextResult]
) -> list[KeptResult]:
    """Return one result for each capability and file, in order.

    Args:
        texts: base and tuned model on the held-out sequences of each, in the same order.
    """
    return [_summed(each.source, answers[each.source.name], text) for each, text in zip(kept, texts, strict=True)]


def _summed(source: KeptSource, answers: Sequence[AnswerResult], text: TextResult) -> KeptResult:
    metric, score = None, None
    if source.capability is not None:
        metric = CAPABILITIES[source.capability].metric
        scores = np.array([(answer.base_score, answer.tuned_score) for answer in answers], dtype=np.float64)
        score = score_change(*scores.T)
    return KeptResult(source.name, metric, text.texts, score, text.kl, text.top1_agreement)


def _read(source: KeptSource, reader: Questions, prompt: KeptPrompt, ids: Sequence[int]) -> KeptAnswer:
    """Read an answer of one of the models, given as tokens."""
    return KeptAnswer(prompt.ask, reader.said(prompt.text, ids), reader.whole(ids), source.calls)


def _result(source: KeptSource, prompt: KeptPrompt, base: KeptAnswer, tuned: KeptAnswer) -> AnswerResult:
    score = None if source.capability is None else SCORERS[source.capability]
    return AnswerResult(
        kind="keep",
        prompt=list(prompt.ask.messages),
        reference=None,
        base=base.said.answer,
        tuned=tuned.said.answer,
        base_score=None if score is None else score(base),
        tuned_score=None if score is None else score(tuned),
        base_thought=base.said.thought or None,
        tuned_thought=tuned.said.thought or None,
        capability=source.name,
    )
