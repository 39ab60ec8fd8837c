"""The ways in which sampled text is shown to the model: from its start, and cut from the middle.

At the first position a model keeps a massive activation, which carries most of a covariance's trace and most of a KL
divergence. Text without the real start shows what the rest needs (docs/method.md, section 7).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from folora_q.proxy.sample import ProxySample


def whole(samples: Sequence[ProxySample]) -> list[list[int]]:
    """Every sample from its beginning-of-text token on."""
    return [sample.ids for sample in samples]


def crops(samples: Sequence[ProxySample], seed: int) -> list[list[int]]:
    """Every sample from a random place in its first half on, without its beginning."""
    chooser = random.Random(seed)
    return [sample.ids[chooser.randint(1, len(sample.ids) // 2) :] for sample in samples]
