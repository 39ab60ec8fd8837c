"""Let the base model answer the prompts that a recipe keeps, or read its answers from the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from folora_q.calibration.sample import ProxySample
from folora_q.calibration.sample_cache import SampledModel, read_samples, write_samples
from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.kept_prompts import KeptSource
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
        rows = embedding_rows(self.base.model)
        paths = {source.name: self.cached(source) for source in sources}

        def read() -> dict[str, Answers]:
            found = {source.name: answers_of(source, read_samples(paths[source.name], rows)) for source in sources}
            return {name: answers for name, answers in found.items() if answers is not None}

        known = self.processes.share(read)
        missing = [source for source in sources if _prompts(source) and source.name not in known]
        if missing:
            known |= self._answer(missing)
            if self.processes.first:
                self._save({paths[source.name]: samples_of(source, known[source.name]) for source in missing})
        elif known:
            self.clock.note("the base's answers to the prompts to keep were read from the cache")
        return [with_answers(source, known.get(source.name, [])) for source in sources]

    def cached(self, source: KeptSource) -> Path:
        """Return the file of the base's answers to a source's prompts."""
        facts = [FORMAT, self.base.fingerprint, str(self.base.dtype), source.max_new_tokens, _prompts(source)]
        return cache_folder() / "keep" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.jsonl"

    def _answer(self, sources: Sequence[KeptSource]) -> dict[str, Answers]:
        """Answer all prompts, each process a part of every source's."""
        readers, model = self.processes.readers, self.base.model
        mine = {source.name: _prompts(source)[readers.rank :: readers.count] for source in sources}
        splitter = BatchSplitter("answering", self.clock.warn, enabled=not self.processes.sharded)
        title, ends = "answering the prompts to keep, as base", end_tokens(model)
        found: dict[str, Answers] = {}
        with self.clock.stage(title, sum(map(len, mine.values())), "answers") as done:
            for source in sources:
                settings = Generation(source.max_new_tokens, self.batch_size, done, splitter, self.processes)
                tokens = greedy_tokens(model, self.base.tokenizer, mine[source.name], settings)
                found[source.name] = [until_end(ids, ends) for ids in tokens]
        parts = readers.gather(found)
        return {source.name: _interleaved([part[source.name] for part in parts]) for source in sources}

    def _save(self, files: Mapping[Path, list[ProxySample]]) -> None:
        try:
            for path, samples in files.items():
                write_samples(path, samples, self.base.tokenizer)
        except OSError as error:  # the run has the answers
            self.clock.note(f"the base's answers could not be saved: {error.strerror}")


def samples_of(source: KeptSource, answers: Answers) -> list[ProxySample]:
    """Return prompts with their answers in the form of sampled text, for files that people can read."""
    return [ProxySample(ids + answer, source.name) for ids, answer in zip(_prompts(source), answers, strict=True)]


def answers_of(source: KeptSource, samples: Sequence[ProxySample] | None) -> Answers | None:
    """Return the answers in samples of a source; None if they are not those to its prompts."""
    prompts = _prompts(source)
    if samples is None or len(samples) != len(prompts):
        return None
    found = [sample.ids[len(ids) :] for ids, sample in zip(prompts, samples, strict=True)]
    same = all(sample.ids[: len(ids)] == ids for ids, sample in zip(prompts, samples, strict=True))
    return found if same and all(found) else None


def with_samples(sources: Sequence[KeptSource], samples: Sequence[ProxySample]) -> list[Kept] | None:
    """Return sources with the answers in samples of all of them; None if any are missing."""
    found: list[Kept] = []
    for source in sources:
        answers = answers_of(source, [sample for sample in samples if sample.source == source.name])
        if answers is None:
            return None
        found.append(with_answers(source, answers))
    return found


def with_answers(source: KeptSource, answers: Answers) -> Kept:
    """Return a source with the answers to its prompts, first those for the penalty."""
    count = len(source.prompts.penalty)
    return Kept(source, answers[:count], answers[count:])


def _prompts(source: KeptSource) -> list[list[int]]:
    """Return the tokens of all prompts of a source."""
    return [prompt.ids for prompt in (*source.prompts.penalty, *source.prompts.held_out)]


def _interleaved(parts: Sequence[Answers]) -> Answers:
    """Undo the division of a list among processes, each of which took every n-th item."""
    count = sum(map(len, parts))
    return [parts[number % len(parts)][number // len(parts)] for number in range(count)]
