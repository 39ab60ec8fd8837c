"""Measure accuracy on multiple-choice questions: the answer is the likeliest choice per character (lm-eval's acc_norm).

All choices of a question follow it in one sequence. Each attends to the question and to itself, at the positions that
it would have alone, so the question is read once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.models.logits import head_logits

DATA = Path(__file__).parent / "data" / "questions.jsonl"
PADDING = -1  # owner of padding


@dataclass(frozen=True)
class Question:
    """A question and its choices as one sequence of t tokens.

    Attributes:
        owners: the choice that each token belongs to, from 1; the question's own tokens have 0.
        positions: each token's position.
        characters: the length of each choice.
        answer: the number of the right choice, from 0.
    """

    ids: list[int]
    owners: list[int]
    positions: list[int]
    characters: list[int]
    answer: int


class Questions:
    """Multiple-choice questions in batches, longest first."""

    def __init__(self, tokenizer: Tokenizer, batch_size: int, path: Path = DATA) -> None:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        questions = sorted((_read(row, tokenizer) for row in rows), key=lambda question: -len(question.ids))
        self.batches = [questions[i : i + batch_size] for i in range(0, len(questions), batch_size)]

    @torch.no_grad()
    def accuracy(self, model: PreTrainedModel) -> float:
        """Return the share of questions whose right choice is the likeliest for its length."""
        right = [
            max(range(len(found)), key=lambda choice: found[choice] / question.characters[choice]) == question.answer
            for batch in self.batches
            for question, found in zip(batch, log_likelihoods(model, batch), strict=True)
        ]
        return sum(right) / len(right)


def _read(row: dict, tokenizer: Tokenizer) -> Question:
    prompt = cast("list[int]", tokenizer(f"Question: {row['question'].strip()}\nAnswer:")["input_ids"])
    ids, owners, positions = list(prompt), [0] * len(prompt), list(range(len(prompt)))
    for number, choice in enumerate(row["choices"], 1):
        tokens = cast("list[int]", tokenizer(f" {choice}", add_special_tokens=False)["input_ids"])
        ids += tokens
        owners += [number] * len(tokens)
        positions += range(len(prompt), len(prompt) + len(tokens))
    return Question(ids, owners, positions, list(map(len, row["choices"])), row["answer"])


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, batch: list[Question]) -> list[list[float]]:
    """Return log p(choice | question) in nats, for every choice of every question."""
    width = max(len(question.ids) for question in batch)
    ids, owners, positions = (
        torch.tensor([values + [fill] * (width - len(values)) for values in rows], device=model.device)
        for rows, fill in (
            ([q.ids for q in batch], 0),
            ([q.owners for q in batch], PADDING),
            ([q.positions for q in batch], 0),
        )
    )
    hidden = model.base_model(
        input_ids=ids, attention_mask=_mask(owners, model.dtype), position_ids=positions, use_cache=False
    ).last_hidden_state
    found = []
    for row, question in enumerate(batch):
        start = question.owners.index(1)
        # A choice's first token is predicted from the question's last, each other one from the one before it.
        predicting = torch.tensor(
            [start - 1 if position == start else place - 1 for place, position in enumerate(question.positions)][
                start:
            ],
            device=ids.device,
        )
        losses = cross_entropy(
            head_logits(model, hidden[row, predicting]), ids[row, start : len(question.ids)], reduction="none"
        )
        sums = torch.zeros(len(question.characters), device=losses.device)
        found.append(sums.index_add_(0, owners[row, start : len(question.ids)] - 1, -losses).tolist())
    return found


def _mask(owners: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask (b, 1, t, t) to add to attention scores: tokens see the question and their choice, causally."""
    same = (owners[:, None, :] == owners[:, :, None]) | (owners[:, None, :] == 0)
    earlier = torch.ones_like(same[0]).tril()
    seen = same & earlier
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
