"""Cache of sampled text: one readable JSONL file per model, quantization, seed and settings."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.calibration.sample import ProxySample, SamplingContext, sample_proxy
from folora_q.data.batch_splitting import BatchSplitter
from folora_q.distributed.processes import ONE, Processes
from folora_q.models.parts import embedding_rows
from folora_q.progress import StageTimer
from folora_q.recipe.schema import ProxySection
from folora_q.storage.files import atomic_write, cache_folder
from folora_q.storage.untrusted import parse_json, read_lines

# Increased when the same settings give other text.
FORMAT = 2
# Between the seeds of two processes.
SEEDS_APART = 1_000_003


@dataclass(frozen=True)
class SampledModel:
    """The base model that text is sampled from, and what identifies it in the cache.

    Attributes:
        fingerprint: of its weights and their quantization.
        dtype: its compute dtype.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    fingerprint: str
    dtype: torch.dtype

    def cached(self, section: ProxySection) -> Path:
        """Return the file of the text that this model generates with these settings."""
        template = self.tokenizer.chat_template if section.source != "bos" else None
        return cache_path(self.fingerprint, str(self.dtype), template, section)


def load_or_sample(
    base: SampledModel, section: ProxySection, clock: StageTimer, processes: Processes = ONE
) -> list[ProxySample]:
    """Load the text that a model generated before with these settings, or sample it now, each process a part.

    Raises:
        UserError, RunError: as `sample_proxy`.
    """
    model, tokenizer = base.model, base.tokenizer
    path = base.cached(section)
    samples = processes.share(lambda: read_samples(path, embedding_rows(model)))
    if samples is not None:
        clock.note(f"sampled text read from {path}")
        return samples
    readers = processes.readers
    part = _part(section, readers)
    with clock.stage("sampling text from the base model", part.num_samples, "texts") as done:
        splitter = BatchSplitter("sampling", clock.warn, enabled=processes.independent)
        samples = sample_proxy(model, tokenizer, part, SamplingContext(done, splitter, processes))
    samples = [sample for each in readers.gather(samples) for sample in each]
    if not processes.first:
        return samples
    try:
        write_samples(path, samples, tokenizer)
        clock.note(f"sampled text saved in {path}")
    except OSError as error:  # the run has the text, which took long to sample
        clock.note(f"sampled text could not be saved in {path}: {error.strerror}")
    return samples


def _part(section: ProxySection, processes: Processes) -> ProxySection:
    """Return the settings of the texts that a process samples, all of them in `num_samples`."""
    count, rest = divmod(section.num_samples + section.num_heldout_samples, processes.count)
    seed = section.seed + SEEDS_APART * processes.rank
    mine = {"num_samples": count + (processes.rank < rest), "num_heldout_samples": 0, "seed": seed}
    return section.model_copy(update=mine)


def cache_path(fingerprint: str, dtype: str, chat_template: str | dict[str, str] | None, section: ProxySection) -> Path:
    """Return the file for a model (fingerprint: also its quantization), compute dtype, chat template and settings."""
    key = json.dumps([FORMAT, fingerprint, dtype, chat_template, settings_of_text(section)], sort_keys=True)
    return cache_folder() / "proxy" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"


def settings_of_text(section: ProxySection) -> dict[str, Any]:
    """Return the settings that the text depends on, except its batches, which change it only as a seed does."""
    return section.model_dump(mode="json", exclude={"batch_size", "statistics_memory", "public_share", "earlier_share"})


def write_samples(path: Path, samples: list[ProxySample], tokenizer: Tokenizer) -> None:
    """Write one sample per line: its source, its text for the reader, and its tokens."""
    lines = (
        json.dumps({"source": s.source, "text": tokenizer.decode(s.ids), "ids": s.ids}, ensure_ascii=False)
        for s in samples
    )
    atomic_write(path, "".join(line + "\n" for line in lines))


def read_samples(path: Path, vocabulary: int) -> list[ProxySample] | None:
    """Read the samples of a file; None if there is no file, or it holds anything else.

    Args:
        vocabulary: the number of tokens that the model knows; any other token makes the file invalid.
    """
    try:
        rows = [parse_json(line) for line in read_lines(path)]
    except (OSError, ValueError):
        return None
    samples = [sample for row in rows if (sample := _sample(row, vocabulary)) is not None]
    return samples if samples and len(samples) == len(rows) else None


def _sample(row: object, vocabulary: int) -> ProxySample | None:
    ids, source = (row.get("ids"), row.get("source")) if isinstance(row, dict) else (None, None)
    if not isinstance(source, str) or not isinstance(ids, list) or not ids:
        return None
    return ProxySample(ids, source) if all(type(token) is int and 0 <= token < vocabulary for token in ids) else None
