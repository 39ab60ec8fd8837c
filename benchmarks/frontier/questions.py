"""Multiple choice on real questions: the answer whose characters are likeliest, as lm-eval's acc_norm takes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.tokens import IGNORED, Batch, batches
from folora_q.evaluation.logits import chunks, head_logits, hidden_states

DATA = Path(__file__).parent / "data" / "questions.jsonl"


@dataclass(frozen=True)
class Questions:
    """Every choice as a sequence whose labels are the choice's tokens, in the order of `place`.

    Attributes:
        place: (question, choice) of each sequence, as the batches hold them.
        characters: of each choice.
        answers: the right choice of each question.
    """

    batches: list[Batch]
    place: list[tuple[int, int]]
    characters: list[int]
    answers: list[int]

    def accuracy(self, model: PreTrainedModel) -> float:
        """The share of questions whose right choice is the likeliest for its length."""
        likelihood = [value for batch in self.batches for value in _log_likelihoods(model, batch)]
        best: dict[int, tuple[float, int]] = {}
        for (question, choice), value, length in zip(self.place, likelihood, self.characters, strict=True):
            best[question] = max(best.get(question, (-float("inf"), 0)), (value / length, choice))
        return sum(best[n][1] == right for n, right in enumerate(self.answers)) / len(self.answers)


def read_questions(tokenizer: Tokenizer, device: torch.device, batch_size: int) -> Questions:
    """Questions as `Question: ...\\nAnswer: choice`."""
    rows = [json.loads(line) for line in DATA.read_text("utf-8").splitlines()]
    sequences, labels, place, characters = [], [], [], []
    for number, row in enumerate(rows):
        prompt = tokenizer(f"Question: {row['question'].strip()}\nAnswer:")["input_ids"]
        for index, choice in enumerate(row["choices"]):
            ids = tokenizer(f" {choice}")["input_ids"]
            sequences.append(prompt + ids)
            labels.append([IGNORED] * len(prompt) + ids)
            place.append((number, index))
            characters.append(len(choice))
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))  # as `batches` puts them
    return Questions(
        list(batches(sequences, batch_size, device, labels)),
        [place[i] for i in order],
        [characters[i] for i in order],
        [row["answer"] for row in rows],
    )


@torch.no_grad()
def _log_likelihoods(model: PreTrainedModel, batch: Batch) -> list[float]:
    targets = batch.labels[:, 1:]
    counted = targets != IGNORED
    hidden = hidden_states(model, batch.input_ids, batch.attention_mask)[:, :-1][counted]
    wanted, owners = targets[counted], counted.nonzero()[:, 0]
    sums = torch.zeros(len(targets), device=hidden.device)
    for part in chunks(len(wanted)):
        losses = cross_entropy(head_logits(model, hidden[part]), wanted[part], reduction="none")
        sums.index_add_(0, owners[part], -losses)
    return sums.tolist()
