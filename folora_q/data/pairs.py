"""Batches of pairs: a prompt with a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from folora_q.data.tokens import IGNORED

# The columns of tokenized pairs, by answer: ids and labels.
COLUMNS = (("input_ids", "labels"), ("rejected_ids", "rejected_labels"))
Ids = Sequence[Sequence[int]]


def both_answers(rows: Mapping[str, Ids]) -> tuple[Ids, Ids]:
    """Return ids and labels of the sequences of pairs, each chosen one followed by its rejected one.

    Args:
        rows: columns of tokenized pairs. Other rows are returned as they are.
    """
    columns = COLUMNS if "rejected_ids" in rows else COLUMNS[:1]
    ids, labels = ([rows[names[part]] for names in columns] for part in (0, 1))
    return [each for pair in zip(*ids, strict=True) for each in pair], [
        each for pair in zip(*labels, strict=True) for each in pair
    ]


def in_order(ids: Ids, labels: Ids) -> tuple[Ids, Ids]:
    """Return the sequences of pairs with the longest pairs first; both answers stay together."""
    order = sorted(range(0, len(ids), 2), key=lambda first: -max(len(ids[first]), len(ids[first + 1])))
    places = [place for first in order for place in (first, first + 1)]
    return [ids[place] for place in places], [labels[place] for place in places]


def padded_pairs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Collate tokenized pairs: ids, mask and labels (pairs, 2, t), padded on the right, the chosen answer first."""
    width = max(len(row[names[0]]) for row in rows for names in COLUMNS)
    ids = torch.zeros(len(rows), 2, width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        for side, (of_ids, of_labels) in enumerate(COLUMNS):
            length = len(row[of_ids])
            ids[number, side, :length] = torch.tensor(row[of_ids])
            labels[number, side, :length] = torch.tensor(row[of_labels])
            mask[number, side, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
