"""Batches of rows with two sequences: both answers of a pair, or an answer and a mismatched one."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from folora_q.data.tokens import IGNORED

Ids = Sequence[Sequence[int]]
# Columns of token ids and labels, by sequence: the first one of every row, the second one of a pair, and that of a
# labelled answer, which is never trained on: the row's prompt with the answer of another row.
FIRST, REJECTED = ("input_ids", "labels"), ("rejected_ids", "rejected_labels")
MISMATCHED = ("mismatched_ids", "mismatched_labels")
# The column that says whether a labelled answer is desirable.
DESIRABLE = "desirable"
# Seed of the order in which each row gets the answer of the next one.
ORDER_SEED = 0


def columns_of(names: Collection[str], trained: bool = False) -> tuple[tuple[str, str], ...]:
    """Return the columns of each sequence of a row, given the names of all its columns.

    Args:
        trained: only the sequences that are trained on.
    """
    second = (REJECTED,) if trained else (REJECTED, MISMATCHED)
    return (FIRST, *(each for each in second if each[0] in names))


def sequences_of(rows: Mapping[str, Any], trained: bool = False) -> tuple[Ids, Ids]:
    """Return ids and labels of all sequences of rows; those of one row follow each other.

    Args:
        rows: tokenized rows by column.
        trained: as in `columns_of`.
    """
    columns = columns_of(rows.keys(), trained)
    ids, labels = ([rows[names[part]] for names in columns] for part in (0, 1))
    return [each for row in zip(*ids, strict=True) for each in row], [
        each for row in zip(*labels, strict=True) for each in row
    ]


def answers_to_learn(rows: Mapping[str, Any]) -> tuple[Ids, Ids]:
    """Return ids and labels of the answers to be learned: of pairs the chosen ones, with a label the desirable ones."""
    ids, labels = (rows[name] for name in FIRST)
    if DESIRABLE not in rows:
        return ids, labels
    good = [place for place, desirable in enumerate(rows[DESIRABLE]) if desirable]
    return [ids[place] for place in good], [labels[place] for place in good]


def longest_first(ids: Ids) -> list[int]:
    """Return the order of rows of two sequences, (2 rows) ids, in which the longest rows come first."""
    return sorted(range(len(ids) // 2), key=lambda row: -max(len(ids[2 * row]), len(ids[2 * row + 1])))


def in_order(ids: Ids, labels: Ids) -> tuple[Ids, Ids]:
    """Return the sequences of rows of two with the longest rows first; both sequences of a row stay together."""
    places = [place for row in longest_first(ids) for place in (2 * row, 2 * row + 1)]
    return [ids[place] for place in places], [labels[place] for place in places]


def mismatched(ids: Ids, labels: Ids, max_length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return for each row its prompt with the answer of another row, as ids and labels cut to a length.

    The rows are brought into a random order that depends on their number alone, in which each row gets the answer of
    the next one, and the last row that of the first. So every answer is used once, as in TRL's KTOTrainer, which does
    the same within each batch.

    Args:
        ids, labels: of at least two rows; an answer begins at the first label that counts.
        max_length: the maximum number of tokens; a prompt is shorter, since its own answer follows it.
    """
    starts = [next(place for place, label in enumerate(row) if label != IGNORED) for row in labels]
    order = random.Random(ORDER_SEED).sample(range(len(ids)), len(ids))
    found: dict[int, tuple[list[int], list[int]]] = {}
    for row, other in zip(order, [*order[1:], order[0]], strict=True):
        prompt, start = list(ids[row][: starts[row]]), starts[other]
        made = prompt + list(ids[other][start:]), [IGNORED] * len(prompt) + list(labels[other][start:])
        found[row] = made[0][:max_length], made[1][:max_length]
    return [found[row][0] for row in range(len(ids))], [found[row][1] for row in range(len(ids))]


def padded_pairs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Collate rows with two sequences: ids, mask and labels (rows, 2, t), padded on the right, in the columns' order.

    Of labelled answers also `desirable`, (rows,) bool.
    """
    columns = columns_of(rows[0].keys())
    width = max(len(row[names[0]]) for row in rows for names in columns)
    ids = torch.zeros(len(rows), len(columns), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        for side, (of_ids, of_labels) in enumerate(columns):
            length = len(row[of_ids])
            ids[number, side, :length] = torch.tensor(row[of_ids])
            labels[number, side, :length] = torch.tensor(row[of_labels])
            mask[number, side, :length] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if DESIRABLE in rows[0]:
        inputs[DESIRABLE] = torch.tensor([row[DESIRABLE] for row in rows])
    return inputs
