"""Windows of sampled text: from its start, and cropped from the middle.

At the first position a model has a massive activation, which makes up most of a covariance's trace and most of a KL
divergence. Text without its real start shows the rest (docs/method.md, section 7).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from folora_q.data.tokens import IGNORED


def crops(sequences: Sequence[Sequence[int]], seed: int) -> list[Sequence[int]]:
    """Cut every sequence at a random position in its first half, and return what follows."""
    chooser = random.Random(seed)
    return [ids[chooser.randint(1, len(ids) // 2) :] for ids in sequences]


def last_windows(
    rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], length: int
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Cut every row to the `length` tokens up to its last trained token; return ids and labels."""
    ends = [next((at + 1 for at in reversed(range(len(row))) if row[at] != IGNORED), len(row)) for row in labels]
    spans = [
        slice(max(0, end - length), end) if len(row) > length else slice(None)
        for row, end in zip(labels, ends, strict=True)
    ]
    return [row[span] for row, span in zip(rows, spans, strict=True)], [
        row[span] for row, span in zip(labels, spans, strict=True)
    ]
