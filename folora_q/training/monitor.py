"""Report the state of training after every step, and every measurement during training."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from folora_q.progress import Measurement, Memory, TrainingEvent, TrainingStatus

# Weight of the newest loss in the smoothed one.
NEWEST = 0.1
# Number of steps that tokens per second are averaged over.
RECENT_STEPS = 16
LOSS, KL, RISE = "eval_loss", "eval_kl", "eval_rise_"


class StepReading(NamedTuple):
    """What is known of an optimizer step without a further synchronization with the device."""

    loss: float = math.nan
    grad_norm: float = math.nan
    tokens: int = 0


class SmoothedLoss:
    """An exponentially weighted mean of the finite losses so far, without a bias towards the first."""

    def __init__(self) -> None:
        self.total = self.weight = 0.0

    def add(self, loss: float) -> None:
        """Add the loss of a step."""
        if math.isfinite(loss):
            self.total += NEWEST * (loss - self.total)
            self.weight += NEWEST * (1 - self.weight)

    @property
    def value(self) -> float | None:
        """The mean; None before the first loss."""
        return self.total / self.weight if self.weight else None


class Pace:
    """Time since training began, the speed of the last steps, and the time left.

    The first step counts for neither: it includes setup. The time left is that of the steps, with what happens between
    them, and of the measurements, each as long as the last one.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.began = self.step_began = now()
        self.first_ended: float | None = None
        self.steps = 0
        self.measuring = self.last_measurement = 0.0  # seconds: since the first step, and of the last measurement
        self.recent: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)

    def begin(self) -> None:
        """Start the clock of a step."""
        self.step_began = self.now()

    def end(self, tokens: int) -> None:
        """Record a step that ended."""
        ended = self.now()
        if self.first_ended is None:
            self.first_ended = ended
            return
        self.steps += 1
        self.recent.append((tokens, ended - self.step_began))

    def measured(self, since: float) -> None:
        """Record that a measurement ended, which began at a time."""
        self.last_measurement = self.now() - since
        if self.first_ended is not None:
            self.measuring += self.last_measurement

    @property
    def elapsed(self) -> float:
        """Seconds since training began."""
        return self.now() - self.began

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of the last steps, without measurements and checkpoints; None before the second step."""
        seconds = sum(seconds for _, seconds in self.recent)
        return sum(tokens for tokens, _ in self.recent) / seconds if seconds else None

    def remaining(self, steps: int, measurements: int = 0) -> float | None:
        """Return the seconds that further steps and measurements take; None before the second step."""
        if not steps:
            return measurements * self.last_measurement
        if self.first_ended is None or not self.steps:
            return None
        a_step = (self.now() - self.first_ended - self.measuring) / self.steps
        return steps * a_step + measurements * self.last_measurement


class Monitor(TrainerCallback):
    """Shows a TrainingStatus after every step and every line of metrics, and a Measurement after each evaluation.

    Args:
        show: receives them.
        reading: returns what the trainer knows of the last step.
        memory: returns the memory in use.
    """

    def __init__(
        self,
        show: Callable[[TrainingEvent], None],
        reading: Callable[[], StepReading],
        memory: Callable[[], Memory | None],
    ) -> None:
        self.show, self.reading, self.memory = show, reading, memory
        self.pace, self.loss = Pace(), SmoothedLoss()
        self.rate: float | None = None
        self.status = TrainingStatus(0, 0)
        self.idle_since = self.pace.began  # the end of the last step, or of what precedes the first

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.idle_since = self.pace.now()  # the pre-flight check, of an earlier callback, has ended

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of: Any) -> None:
        self.pace.begin()
        scheduler = of.get("lr_scheduler")
        self.rate = None if scheduler is None else float(scheduler.get_last_lr()[0])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        reading = self.reading()
        self.pace.end(reading.tokens)
        self.loss.add(reading.loss)
        self.status = TrainingStatus(
            step=state.global_step,
            steps=state.max_steps,
            loss=self.loss.value,
            learning_rate=self.rate,
            grad_norm=reading.grad_norm if math.isfinite(reading.grad_norm) else None,
            tokens_per_second=self.pace.tokens_per_second,
            memory=self.memory(),
            elapsed=self.pace.elapsed,
            remaining=self.pace.remaining(state.max_steps - state.global_step, self._measurements_left(args, state)),
        )
        self.idle_since = self.pace.now()
        self.show(self.status)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None:
            return
        if "loss" in logs:
            self.show(replace(self.status, logged_loss=logs["loss"]))
        if LOSS in logs:
            self.pace.measured(self.idle_since)
            self.show(self._measurement(logs, state))

    @staticmethod
    def _measurements_left(args: TrainingArguments, state: TrainerState) -> int:
        every = state.eval_steps or 0
        if args.eval_strategy == "no" or every < 1:
            return 0
        return state.max_steps // every - (state.global_step - 1) // every

    def _measurement(self, logs: dict[str, float], state: TrainerState) -> Measurement:
        # The history is restored where a run is resumed, so it begins with the first measurement.
        first = next(line for line in [*state.log_history, {**logs, "step": state.global_step}] if LOSS in line)
        return Measurement(
            step=state.global_step,
            loss=logs[LOSS],
            change=logs[LOSS] - first[LOSS] if first["step"] < state.global_step else None,
            kl=logs.get(KL),
            rises={name.removeprefix(RISE): rise for name, rise in logs.items() if name.startswith(RISE)},
        )
