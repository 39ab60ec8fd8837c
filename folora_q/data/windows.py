"""Windows of sampled text: from its start, and cropped from the middle.

At the first position a model has a massive activation, which makes up most of a covariance's trace and most of a KL
divergence. Text without its real start shows the rest (docs/method.md, section 7).
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def crops(sequences: Sequence[Sequence[int]], seed: int) -> list[Sequence[int]]:
    """Cut every sequence at a random position in its first half, and return what follows."""
    chooser = random.Random(seed)
    return [ids[chooser.randint(1, len(ids) // 2) :] for ids in sequences]
