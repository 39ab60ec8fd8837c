"""Multiple choice on real questions: the answer whose characters are likeliest, as lm-eval's acc_norm takes it.

All choices of a question stand in one sequence behind it. Each sees the question and itself, at the positions that it
would have alone, so the question is read once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.models.logits import head_logits

DATA = Path(__file__).parent / "data" / "questions.jsonl"
NOBODY = -1  # owner of padding


@dataclass(frozen=True)
class Question:
    """Tokens (t,), which choice each belongs to (the question itself: 0, choices from 1 on), and their positions."""

    ids: list[int]
    owners: list[int]
    positions: list[int]
    characters: list[int]
    answer: int


class Questions:
    """Questions that any model can be asked."""

    def __init__(self, tokenizer: Tokenizer, batch_size: int, path: Path = DATA) -> None:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        questions = sorted((_read(row, tokenizer) for row in rows), key=lambda question: -len(question.ids))
        self.batches = [questions[i : i + batch_size] for i in range(0, len(questions), batch_size)]

    @torch.no_grad()
    def accuracy(self, model: PreTrainedModel) -> float:
        """The share of questions whose right choice is the likeliest for its length."""
        right = [
            max(range(len(found)), key=lambda choice: found[choice] / question.characters[choice]) == question.answer
            for batch in self.batches
            for question, found in zip(batch, log_likelihoods(model, batch), strict=True)
        ]
        return sum(right) / len(right)


def _read(row: dict, tokenizer: Tokenizer) -> Question:
    prompt = tokenizer(f"Question: {row['question'].strip()}\nAnswer:")["input_ids"]
    ids, owners, positions = list(prompt), [0] * len(prompt), list(range(len(prompt)))
    for number, choice in enumerate(row["choices"], 1):
        tokens = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
        ids += tokens
        owners += [number] * len(tokens)
        positions += range(len(prompt), len(prompt) + len(tokens))
    return Question(ids, owners, positions, list(map(len, row["choices"])), row["answer"])


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, batch: list[Question]) -> list[list[float]]:
    """log p(choice | question) in nats, of every choice of every question."""
    width = max(len(question.ids) for question in batch)
    ids, owners, positions = (
        torch.tensor([values + [fill] * (width - len(values)) for values in of_all], device=model.device)
        for of_all, fill in (
            ([q.ids for q in batch], 0),
            ([q.owners for q in batch], NOBODY),
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
        of = torch.tensor(
            [start - 1 if position == start else place - 1 for place, position in enumerate(question.positions)][
                start:
            ],
            device=ids.device,
        )
        losses = cross_entropy(
            head_logits(model, hidden[row, of]), ids[row, start : len(question.ids)], reduction="none"
        )
        sums = torch.zeros(len(question.characters), device=losses.device)
        found.append(sums.index_add_(0, owners[row, start : len(question.ids)] - 1, -losses).tolist())
    return found


def _mask(owners: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, 1, t, t), added to the attention scores: what comes before, of the question and of the same choice."""
    same = (owners[:, None, :] == owners[:, :, None]) | (owners[:, None, :] == 0)
    earlier = torch.ones_like(same[0]).tril()
    seen = same & earlier
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
