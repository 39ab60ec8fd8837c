"""Windows of sampled text: from its start, and cropped from the middle.

At the first position a model keeps a massive activation, which carries most of a covariance's trace and most of a KL
divergence. Text without the real start shows what the rest needs (docs/method.md, section 7).
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def crops(sequences: Sequence[Sequence[int]], seed: int) -> list[Sequence[int]]:
    """Every sequence from a random place in its first half on, without its beginning."""
    chooser = random.Random(seed)
    return [ids[chooser.randint(1, len(ids) // 2) :] for ids in sequences]
