"""Spend a forgetting budget: learn as much of the task as a limit on the KL, or on the rise of losses, allows.

The penalty tr(ΔW H ΔWᵀ) is known at every step from the r x r forms of the frozen A (`folora_q.core.shrink`). What is
limited, say the KL, is measured now and then, and the ratio of the last measurement to the penalty predicts it in
between. After each step B is shrunk along its directions of lowest quotient if the prediction exceeds the limit: so
training continues along the surface of equal penalty, towards the task. Steps are made longer until that surface is
reached, so that the budget is spent in the first part of the run, and the rest of the run uses it well.

The value differs much between texts, so that few of them give a wrong mean; but the ratio of the mean over many texts
to that over few of them changes little during a run. So most measurements read few texts, and four read all: when the
limit is reached, at half and at three quarters of the run, and at its end (a ratio estimator: Cochran, Sampling
Techniques, 6.2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any, NamedTuple

from torch.optim import Optimizer

from folora_q.core.shrink import FrozenRows
from folora_q.training.budget_state import BudgetState

# The limit to keep to, as a share of the budget: the rest is for the error of its measurement.
AIM = 0.97
# The share of the aim that counts as used: below it, steps are made longer.
FULL = 0.98
# Number of measurements in a run, besides the early ones after 1, 2, 4, ... steps; fewer while they are as predicted.
MEASUREMENTS = 12
# A prediction this near to its measurement, as a share of it, doubles the number of steps to the next one, to 8 times.
NEAR, MAX_GAP = 0.1, 8
# The share of the run's learning, by learning rates, in which the budget should be reached.
FILLING = 0.4
# The least share that it is to be reached in, from wherever the run is.
LEAST_LEFT = 0.05
# Number of measurements that read all texts, and the shares of the run's steps after which the second and the third are
# taken: early enough to use what is left.
COMPLETE, LATER = 4, (0.5, 0.75)
# Factors on the learning rate, and by how much it changes at a time.
MAX_PACE, MAX_CHANGE = 16.0, 2.0
# A measurement this many times as large as the first shows the update, not rounding.
CLEAR = 1.5
# The share of the budget to which the first measurement is believed to be rounding: more shows a large first step.
ROUNDING = 0.5
# Corrections after the last step, each followed by a measurement.
CORRECTIONS = 4


class Spent(NamedTuple):
    """What is limited, as measured on a few texts, and on all texts if those were read too."""

    few: float
    all: float | None = None


@dataclass(frozen=True)
class BudgetPlan:
    """What is spent, and over what.

    Attributes:
        limit: the budget, in nats per token.
        steps: of the run.
        learning: the sum of the schedule's learning rates over the run.
        measure: measures what is limited, with True on all texts that steer the budget, else on a part of them.
        tell: receives a line for each measurement.
    """

    limit: float
    steps: int
    learning: float
    measure: Callable[[bool], Spent]
    tell: Callable[[str], None] = lambda line: None

    @property
    def aim(self) -> float:
        return AIM * self.limit


class Budget:
    """The controller of a run's budget.

    Args:
        layers: all gated layers, with A frozen.

    Attributes:
        seconds: that measuring and shrinking took, in this process.
    """

    def __init__(self, plan: BudgetPlan, layers: FrozenRows) -> None:
        self.plan, self.layers, self.state = plan, layers, BudgetState()
        self.seconds = {"measuring": 0.0, "shrinking": 0.0}
        self._rates: list[float] = []

    def to_dict(self) -> dict[str, Any]:
        """Return the budget and its measurements, for run.json; `spent` is the last one."""
        state = self.state
        names = ("measured", "pace", "strength", "correction")
        return {"limit": self.plan.limit, "spent": self.spent} | {name: getattr(state, name) for name in names}

    @property
    def spent(self) -> float | None:
        """What was measured last."""
        return self.state.measured[-1][1] if self.state.measured else None

    @property
    def exceeded(self) -> bool:
        """Whether the last measurement is over the budget."""
        return self.spent is not None and self.spent > self.plan.limit

    def metrics(self) -> dict[str, float]:
        """Return what is spent by the present prediction, and how: for a line of metrics."""
        state = self.state
        found = {"budget_pace": state.pace, "budget_strength": state.strength}
        return found if (spent := self._predicted) is None else found | {"budget_spent": spent}

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - began

    def before_step(self, optimizer: Optimizer) -> None:
        """Apply the pace to the learning rates."""
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= self.state.pace

    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """Restore the learning rates, keep to the limit, measure if it is time, and choose the next pace.

        Args:
            step: the number of steps taken, including this one.
        """
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        state, rate = self.state, self._rates[0]
        state.learned = state.learned[0] + rate, state.learned[1] + rate * state.pace
        self._keep_to_the_limit()
        if self._is_measured(step):
            self._measure(step, self._is_complete(step))
            if step == self.plan.steps:
                self._correct(step)
            else:
                self._keep_to_the_limit()
                self._choose_pace()

    def conclude(self, step: int) -> None:
        """Keep an update to the limit that is not that of the last planned step: an earlier one was kept.

        Args:
            step: after which the model had this update.
        """
        self._measure(step, complete=True)
        self._correct(step)

    @property
    def _left(self) -> float:
        """What the update may cost: the aim without what rounding alone makes."""
        return max(self.plan.aim - (self.state.floor or 0.0), (1 - AIM) * self.plan.limit)

    @property
    def _every(self) -> int:
        """The least number of steps between two measurements, after the early ones."""
        return max(1, self.plan.steps // MEASUREMENTS)

    @property
    def _predicted(self) -> float | None:
        """What the present update is predicted to spend; None before the ratio is known."""
        state = self.state
        if state.rate is None:
            return None
        return state.rate * self.layers.energies().penalty + (state.floor or 0.0)

    def _is_measured(self, step: int) -> bool:
        early = step < self._every and step & (step - 1) == 0  # 1, 2, 4, ...
        return early or step >= max(self.state.due, self._every) or step in self._later

    @property
    def _later(self) -> set[int]:
        """The steps after which all texts are read, whatever was found before."""
        return {ceil(share * self.plan.steps) for share in (*LATER, 1.0)}

    def _is_complete(self, step: int) -> bool:
        """Whether the measurement after a step reads all texts."""
        return step in self._later or (self.state.filled and not self.state.complete)

    def _keep_to_the_limit(self) -> None:
        state = self.state
        if state.rate is None:
            return
        with self._timed("shrinking"):
            state.strength = self.layers.energies().strength_for(self._left / state.rate)
            if state.strength:
                state.filled = True
                self.layers.shrink(state.strength)

    def _measure(self, step: int, complete: bool) -> None:
        """Measure what is spent, on all texts if `complete`, and learn from it."""
        state, penalty, predicted = self.state, self.layers.energies().penalty, self._predicted
        if not penalty:  # no step has changed B
            return
        with self._timed("measuring"):
            spent = self.plan.measure(complete)
        if not all(value is None or isfinite(value) for value in spent):
            self.plan.tell(f"budget at step {step}: what is spent is not finite, and this measurement is ignored")
            return
        value = spent.few * state.correction
        if spent.all is not None:
            state.complete += 1
            state.correction = spent.all / spent.few if spent.few > 0 < spent.all else 1.0
            value = spent.all
        state.measured.append((step, value))
        near = state.filled and predicted is not None and abs(predicted - value) <= NEAR * value
        state.gap = min(2 * state.gap, MAX_GAP) if near else 1
        state.due = step + state.gap * self._every
        self._learn(value, penalty)
        how = f"shrunk with μ = {state.strength:.2g}" if state.filled else f"learning rate x {state.pace:.2g}"
        self.plan.tell(f"budget at step {step}: {value:.4f} of {self.plan.limit:g} is spent; {how}")

    def _learn(self, value: float, penalty: float) -> None:
        """Learn from a measurement what rounding makes, and what a unit of penalty costs."""
        state = self.state
        if state.floor is None:
            state.floor = value if value <= ROUNDING * self.plan.limit else 0.0
        state.floor = max(min(state.floor, value), 0.0)
        if value > CLEAR * state.floor:
            state.rate = (value - state.floor) / penalty
        elif state.rate is not None:  # it costs less than can be told from rounding
            state.rate = min(state.rate, max(state.rate / 2, (CLEAR - 1) * state.floor / penalty))

    def _correct(self, step: int) -> None:
        """Shrink until the last measurement, of all texts, is within the limit."""
        for _ in range(CORRECTIONS):
            if not self.exceeded:
                return
            self._keep_to_the_limit()
            self._measure(step, complete=True)

    def _choose_pace(self) -> None:
        """Choose the pace with which the limit is reached in time, from the speed since the last choice."""
        state, plan = self.state, self.plan
        if state.filled and (state.strength or (self._predicted or 0.0) > FULL * plan.aim):
            return
        if state.rate is None:
            state.pace = min(state.pace * MAX_CHANGE, MAX_PACE)
            return
        now = (state.rate * self.layers.energies().penalty) ** 0.5
        before, learned = state.before
        speed = (now - before) / max(state.learned[1] - learned, 1e-30)
        state.before = now, state.learned[1]
        if state.filled:  # less is spent than was predicted; the speed is not known, for the update was shrunk
            state.filled, state.pace = False, min(state.pace * MAX_CHANGE, MAX_PACE)
            return
        left = max(FILLING * plan.learning - state.learned[0], LEAST_LEFT * plan.learning)
        if speed > 0:
            wanted = (self._left**0.5 - now) / (speed * left)
            lowest, highest = state.pace / MAX_CHANGE, state.pace * MAX_CHANGE
            state.pace = min(max(wanted, lowest, 1.0), highest, MAX_PACE)
