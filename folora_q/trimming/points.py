"""Measure an update along its paths, and choose the point with a given KL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from folora_q.data.batch_splitting import BatchSplitter
from folora_q.errors import UserError
from folora_q.evaluation.divergence import HeldOutText, compare
from folora_q.evaluation.model_pair import ModelPair
from folora_q.runs.results import Interval
from folora_q.trimming.paths import BY_QUOTIENTS, PATHS, Factors, Update

# Shares of the penalty that are measured: a few, and enough for a curve. A scale of .7 leaves half of the penalty.
FEW_SHARES = (1.0, 0.5, 0.25, 0.1)
SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.17, 0.1, 0.05, 0.02, 0.005)
# Bisections for a given KL: the share is then known to a hundredth of a power of two.
STEPS = 7
LEAST_SHARE = 1e-4


@dataclass(frozen=True)
class TrimPoint:
    """A measured point of a path.

    Attributes:
        share: of the penalty that is left.
        loss: on the task's held-out rows, the objective's; None without a task.
        kl: from the base on held-out model-generated text, in nats per token.
    """

    path: str
    share: float
    loss: float | None
    kl: Interval


@dataclass(frozen=True)
class Measuring:
    """What points are measured on.

    Attributes:
        chosen_on: model-generated text by which a point is chosen.
        reported_on: other such text, on which every reported KL is measured.
        task: returns the loss on the task's held-out rows; None without a task.
        splitter: splits batches if memory runs out.
        on_progress: called with 1 after each point.
    """

    model_pair: ModelPair
    update: Update
    chosen_on: HeldOutText
    reported_on: HeldOutText
    task: Callable[[], float] | None
    splitter: BatchSplitter
    on_progress: Callable[[int], None] = lambda points: None

    def point(self, path: str, share: float) -> TrimPoint:
        """Measure a point of a path."""
        return self.point_with(path, share, PATHS[path].shrink(self.update, share))

    def point_with(self, path: str, share: float, factors: Factors) -> TrimPoint:
        """Measure the update with these factors, under the name of a path."""
        with self.update.replaced(factors):
            kl = compare(self.model_pair, self.reported_on, splitter=self.splitter).kl
            loss = None if self.task is None else self.task()
        self.on_progress(1)
        return TrimPoint(path, share, loss, kl)

    def share_with(self, kl: float) -> float:
        """Return the largest share on the path by quotients whose KL is at most this, by the text to choose on.

        Raises:
            UserError: the KL is larger with hardly any of the update.
        """
        if self._kl(1.0) <= kl:
            return 1.0
        low, high = LEAST_SHARE, 1.0
        for _ in range(STEPS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self._kl(middle) <= kl else (low, middle)
        if low == LEAST_SHARE and (least := self._kl(low)) > kl:
            raise UserError(
                f"the KL is {least:.4f} with hardly any of the update, more than --kl {kl:g}: only adapters of linear "
                "layers are shrunk, and rounding in 16 bits alone can make .002",
                "give a larger --kl, or compute with --dtype float32",
            )
        return low

    def _kl(self, share: float) -> float:
        with self.update.at(BY_QUOTIENTS, share):
            found = compare(self.model_pair, self.chosen_on, splitter=self.splitter).kl.value
        self.on_progress(1)
        return found
