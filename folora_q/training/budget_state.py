"""The state of a forgetting budget's controller, which checkpoints hold; reading it needs no PyTorch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class BudgetState:
    """What a resumed run needs.

    Attributes:
        rate: what is limited, per unit of penalty; None before it is known.
        floor: what rounding in 16 bits makes: measured after the first step, when the model had hardly changed.
        pace: the factor on the learning rate.
        strength: μ of the last shrinking; 0 if nothing was shrunk.
        learned: the sum of the steps' learning rates, without and with the pace.
        filled: whether the limit has been reached, and is still believed to be.
        complete: the number of measurements of all texts.
        correction: the ratio of the value on all texts to that on few of them; 1 before it is known.
        before: the square root of the predicted value, and the paced learning, at the last change of the pace.
        measured: steps with their measurements.
        due, gap: the step of the next measurement, and the number of steps between two, in units of the least number.
    """

    rate: float | None = None
    floor: float | None = None
    pace: float = 1.0
    strength: float = 0.0
    learned: tuple[float, float] = (0.0, 0.0)
    filled: bool = False
    complete: int = 0
    correction: float = 1.0
    before: tuple[float, float] = (0.0, 0.0)
    measured: list[tuple[int, float]] = field(default_factory=list)
    due: int = 0
    gap: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return asdict(self)
