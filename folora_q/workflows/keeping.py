"""Let the base model answer the prompts that a recipe keeps, or read its answers from the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from folora_q.calibration.sample import ProxySample
from folora_q.calibration.sample_cache import SampledModel, read_samples, write_samples
from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.kept_prompts import KeptPrompt, KeptSource
from folora_q.data.tokens import end_tokens, until_end
from folora_q.distributed.processes import ONE, Processes
from folora_q.evaluation.kept import Kept
from folora_q.evaluation.task import Generation, greedy_tokens
from folora_q.models.parts import embedding_rows
from folora_q.progress import StageTimer
from folora_q.storage.files import cache_folder

# Increased when the same prompts and settings give other answers.
FORMAT = 1
Answers = list[list[int]]


@dataclass(frozen=True)
class BaseAnswers:
    """Gets the base's greedy answers to prompts: from a cache by model, prompts and length, or from the model.

    Attributes:
        batch_size: prompts that are answered at a time.
        processes: divide the prompts.
    """

    base: SampledModel
    batch_size: int
    clock: StageTimer
    processes: Processes = ONE

    def kept(self, sources: Sequence[KeptSource]) -> list[Kept]:
        """Return each source with its answers; all processes must call this together."""
        halves = [_Half(source, prompts) for source in sources for prompts in source.prompts]
        rows = embedding_rows(self.base.model)
        paths = [self._cached(half) for half in halves]

        def read() -> list[Answers | None]:
            found = zip(halves, paths, strict=True)
            return [answers_in(half.prompts, read_samples(path, rows) or []) for half, path in found]

        answers = self.processes.share(read)
        missing = [number for number, known in enumerate(answers) if known is None]
        if not missing and any(answers):
            self.clock.note("the base's answers to the prompts to keep are read from the cache")
        for number, new in zip(missing, self._answer([halves[number] for number in missing]), strict=True):
            answers[number] = new
            if self.processes.first:
                self._save(paths[number], samples_of(halves[number].source, halves[number].prompts, new))
        complete = [known for known in answers if known is not None]
        return [Kept(*each) for each in zip(sources, complete[::2], complete[1::2], strict=True)]

    def _cached(self, half: _Half) -> Path:
        """Return the file of the base's answers to some prompts."""
        prompts = [prompt.ids for prompt in half.prompts]
        ends, length = sorted(end_tokens(self.base.model)), half.source.max_new_tokens
        facts = [FORMAT, self.base.fingerprint, str(self.base.dtype), ends, length, prompts]
        return cache_folder() / "keep" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.jsonl"

    def _answer(self, halves: Sequence[_Half]) -> list[Answers]:
        """Answer all prompts, each process every n-th of each list."""
        if not halves:
            return []
        readers, model = self.processes.readers, self.base.model
        mine = [[prompt.ids for prompt in half.prompts][readers.rank :: readers.count] for half in halves]
        splitter = BatchSplitter("answering", self.clock.warn, enabled=self.processes.independent)
        ends, found = end_tokens(model), []
        with self.clock.stage("answering the prompts to keep, as base", sum(map(len, mine)), "answers") as done:
            for half, prompts in zip(halves, mine, strict=True):
                settings = Generation(half.source.max_new_tokens, self.batch_size, done, splitter, self.processes)
                tokens = greedy_tokens(model, self.base.tokenizer, prompts, settings)
                found.append([until_end(ids, ends) for ids in tokens])
        of_all = readers.gather(found)
        return [_interleaved([part[number] for part in of_all]) for number in range(len(halves))]

    def _save(self, path: Path, samples: list[ProxySample]) -> None:
        try:
            write_samples(path, samples, self.base.tokenizer)
        except OSError as error:  # the run has the answers
            self.clock.note(f"the base's answers could not be saved in {path}: {error.strerror}")


@dataclass(frozen=True)
class _Half:
    """Prompts of a source: those for the penalty, or the held-out ones."""

    source: KeptSource
    prompts: Sequence[KeptPrompt]


def samples_of(source: KeptSource, prompts: Sequence[KeptPrompt], answers: Answers) -> list[ProxySample]:
    """Return prompts with their answers in the form of sampled text, for files that people can read."""
    return [ProxySample(prompt.ids + answer, source.name) for prompt, answer in zip(prompts, answers, strict=True)]


def answers_in(prompts: Sequence[KeptPrompt], samples: Sequence[ProxySample]) -> Answers | None:
    """Return the answers in samples; None if they are not those to these prompts."""
    if len(samples) != len(prompts):
        return None
    found = [sample.ids[len(prompt.ids) :] for prompt, sample in zip(prompts, samples, strict=True)]
    same = all(sample.ids[: len(prompt.ids)] == prompt.ids for prompt, sample in zip(prompts, samples, strict=True))
    return found if same and all(found) else None


def samples_of_all(kept: Sequence[Kept]) -> list[ProxySample]:
    """Return everything that the base answered, for the run folder."""
    answered = [(each.source, each.penalty_answers, each.held_out_answers) for each in kept]
    return [
        sample
        for source, *answers in answered
        for sample in samples_of(
            source, [*source.prompts.penalty, *source.prompts.held_out], [*answers[0], *answers[1]]
        )
    ]


def from_samples(sources: Sequence[KeptSource], samples: Sequence[ProxySample]) -> list[Kept] | None:
    """Return sources with the answers in the samples of `samples_of_all`; None if any are missing."""
    found: list[Kept] = []
    for source in sources:
        prompts = [*source.prompts.penalty, *source.prompts.held_out]
        answers = answers_in(prompts, [sample for sample in samples if sample.source == source.name])
        if answers is None:
            return None
        count = len(source.prompts.penalty)
        found.append(Kept(source, answers[:count], answers[count:]))
    return found


def _interleaved(parts: Sequence[Answers]) -> Answers:
    """Undo the division of a list among processes, each of which took every n-th item."""
    count = sum(map(len, parts))
    return [parts[number % len(parts)][number // len(parts)] for number in range(count)]
