"""Choose the texts that a run's gates are computed from, compute the gates, and measure their penalty."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.block_sizes import STATISTICS_LENGTH
from folora_q.calibration.collect import StatisticsSettings, build_gates, row_penalties
from folora_q.calibration.sample import ProxySample
from folora_q.calibration.texts import penalty_text, public_windows, with_earlier_tasks
from folora_q.core import SpectralGate
from folora_q.data.pairs import DESIRABLE, sequences_of
from folora_q.data.tokens import Batch, batches, count_predicted
from folora_q.data.windows import crops, last_windows
from folora_q.distributed.processes import ONE, Processes
from folora_q.evaluation.kept import Kept
from folora_q.progress import StageTimer
from folora_q.recipe.schema import Recipe
from folora_q.recipe.training import TrainingSection

Gates = Mapping[str, SpectralGate]
# The most texts on which the penalty of A's rows is measured: a ratio of sums over thousands of tokens.
PENALTY_TEXTS = 64
Samples = Sequence[ProxySample]
# Tokens and labels of earlier tasks' rows.
EarlierRows = tuple[list[Sequence[int]], list[Sequence[int]]]


def task_text(
    rows: Mapping[str, Any], training: TrainingSection, size: int | Callable[[int], int], device: torch.device
) -> list[Batch]:
    """Return the task's rows as text for its statistics, with the slope of the objective in the loss of one token.

    The slope is that where the model is its base, B = 0, so that every reward r is 0, and z of objective kto too.

    - dpo: -log σ(r₊ - r₋) has the derivative -β/2 in log π(chosen) and β/2 in log π(rejected).
    - kto: w (1 - σ(±(r - z))) has ∓w σ'(0) β = ∓w β/4 in log π(answer), with the weight w of the row's label. z has no
      gradient, so the mismatched answers have none.

    Statistics divide by the number of labelled tokens, and these losses are means over rows: so the slope is multiplied
    by the root of their ratio.

    Args:
        rows: tokenized rows by column.
        size: sequences per batch, or a function of their length.
    """
    ids, labels = last_windows(*sequences_of(rows, trained=True), STATISTICS_LENGTH)
    match training.objective:
        case "sft":
            return list(batches(ids, size, device, labels))
        case "dpo":
            parts = [(training.beta / 2, range(len(ids)))]
        case "kto":
            of_label = {True: training.desirable_weight, False: training.undesirable_weight}
            parts = [
                (weight * training.beta / 4, [row for row, label in enumerate(rows[DESIRABLE]) if label == desirable])
                for desirable, weight in of_label.items()
            ]
    sloped = [
        (slope, batch)
        for slope, chosen in parts
        for batch in batches([ids[row] for row in chosen], size, device, [labels[row] for row in chosen])
    ]
    per_row = (count_predicted([batch for _, batch in sloped]) / len(rows["input_ids"])) ** 0.5
    return [batch._replace(slope=slope * per_row) for slope, batch in sloped]


@dataclass(frozen=True)
class CalibrationText:
    """Text sampled from the base model: for the statistics, and held out."""

    seen: Samples
    held_out: Samples


@dataclass(frozen=True)
class Calibration:
    """Collects statistics with a recipe's settings.

    Attributes:
        task: the training rows, with columns `input_ids` and `labels`, and those of pairs or labelled answers.
        on_gpu: whether activations are recomputed if the recipe leaves that open.
        identity: of the base model and how it computes, for the cache of Σp; None does not use it.
        kept: what the recipe keeps, as the base answers it.
        processes: read the texts together.
        earlier: rows of the tasks that were learned before.
    """

    recipe: Recipe
    tokenizer: Tokenizer
    task: Dataset
    timer: StageTimer
    on_gpu: bool
    identity: str | None = None
    processes: Processes = ONE
    kept: Sequence[Kept] = ()
    earlier: EarlierRows = field(default_factory=lambda: ([], []))

    @property
    def settings(self) -> StatisticsSettings:
        recipe = self.recipe
        recompute = recipe.statistics_recompute_on(self.on_gpu)
        return StatisticsSettings(recipe.gate, recipe.proxy.statistics_memory, recompute, processes=self.processes)

    def gates(self, model: PeftModel, samples: Samples) -> dict[str, SpectralGate]:
        """Collect statistics of the penalty's text and of the task's, and compute the gates."""
        recipe, device, size = self.recipe, model.device, self.recipe.statistics_batch_size
        count = min(recipe.gate.num_task_samples, len(self.task))
        rows = self.task[random.Random(recipe.training.seed).sample(range(len(self.task)), count)]
        task = task_text(rows, recipe.training, size, device)
        # A different seed than for the held-out crops, so that their offsets differ.
        whole = [sample.ids for sample in samples]
        written, public = [*whole, *crops(whole, recipe.proxy.seed + 1)], public_windows(self.tokenizer)
        kept = list(self._kept_texts(size, device))
        share, rest = recipe.proxy.public_share, 1 - sum(part for _, part in kept)
        parts = [(list(batches(written, size, device)), rest * (1 - share))]
        parts += [(list(batches(public, size, device)), rest * share), *kept]
        penalty = penalty_text(parts)
        inputs = [self.identity, written, public, share, *self._kept_facts()]
        if self.earlier[0]:
            earlier = list(batches(self.earlier[0], size, device, self.earlier[1]))
            penalty = with_earlier_tasks(penalty, earlier, recipe.proxy.earlier_share)
            inputs += [self.earlier, recipe.proxy.earlier_share]
        read = json.dumps(inputs)
        key = None if self.identity is None else hashlib.sha256(read.encode()).hexdigest()
        settings = replace(self.settings, penalty_key=key)
        return build_gates(model, penalty, task, settings, self.timer)

    def _kept_texts(self, size: Callable[[int], int], device: torch.device) -> Iterator[tuple[list[Batch], float]]:
        """Yield the answers and texts to keep, each with its share in the penalty."""
        share = self.recipe.keep.share / max(len(self.kept), 1)
        for each in self.kept if share else ():
            yield each.penalty_text(size, device), share

    def _kept_facts(self) -> list[object]:
        """Return what is kept, for the cache of Σp; nothing if nothing is."""
        share = self.recipe.keep.share
        return [[each.penalty for each in self.kept], share] if self.kept and share else []

    def penalties(self, model: PeftModel, gates: Gates, text: CalibrationText) -> dict[str, tuple[float, float]]:
        """Measure the penalty of A's rows on text that the gates were computed from, and on as much held-out text."""
        size, device = self.recipe.statistics_batch_size, model.device
        count = min(len(text.held_out), PENALTY_TEXTS)
        both = text.seen[:count], text.held_out[:count]
        seen, unseen = (list(batches([sample.ids for sample in of], size, device)) for of in both)
        penalties = row_penalties(model, gates, (seen, unseen), self.settings, self.timer)
        inside, outside = (sum(both[of] for both in penalties.values()) for of in (0, 1))
        if outside > 0 and inside > 0:
            ratio = f"{outside / inside:.2g} times the in-sample penalty"
            self.timer.note(f"penalty of A's directions on held-out model-generated text: {ratio}")
        return penalties
