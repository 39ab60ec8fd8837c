"""Trainer callbacks: report progress and metrics, and stop at the end of a step on a signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from folora_q.errors import Terminated
from folora_q.training.budget import Budget

Metrics = dict[str, float | int]


class BeforeTraining(TrainerCallback):
    """Runs an action right before the first step."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.action()


class Spending(TrainerCallback):
    """Calls a forgetting budget before and after every optimizer step; `budget()` returns it."""

    def __init__(self, budget: Callable[[], Budget | None]) -> None:
        self.budget = budget

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        if (budget := self.budget()) is not None:
            budget.before_step(optimizer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, *_: Any, optimizer: Any = None, **__: Any
    ) -> None:
        if (budget := self.budget()) is not None:
            budget.after_step(optimizer, state.global_step + 1)


class Reporting(TrainerCallback):
    """Calls `step_taken(1)` after every optimizer step and `logged(metrics)` for every line of metrics."""

    def __init__(self, step_taken: Callable[[int], None], logged: Callable[[Metrics], None]) -> None:
        self.step_taken, self.logged = step_taken, logged

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step_taken(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Metrics | None = None,
        **_: Any,
    ) -> None:
        if logs is not None:
            self.logged({"step": state.global_step, **logs})


class SavedAtTheEnd(TrainerCallback):
    """Always saves a checkpoint of the last step: the evaluation that follows takes long and can be interrupted."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save = control.should_save or state.global_step >= state.max_steps


class Stopping(TrainerCallback):
    """The first SIGINT or SIGTERM lets the step end, saves a checkpoint and stops; the second stops at once.

    Before the first step, when there is nothing to save, the first one stops at once as well.

    Args:
        tell: receives a line at the first signal.
        alone: there is one process. Otherwise all stop after the same step: the trainer tells each with `agree`.

    Attributes:
        asked: the signal that this process received.
        received: the signal to stop for.
    """

    def __init__(self, tell: Callable[[str], None], alone: bool = True) -> None:
        self.tell, self.alone = tell, alone
        self.asked: int | None = None
        self.received: int | None = None
        self.stepping = False

    def agree(self, stop: bool) -> None:
        """Stop after this step, if any process was asked to."""
        if stop and self.received is None:
            self.received = self.asked or signal.SIGTERM

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals in this block.

        Raises:
            KeyboardInterrupt: a signal was received; `Terminated` if it was SIGTERM.
        """
        if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
            self._stop_if_asked()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked is not None, number
        if self.alone or again or not self.stepping:
            self.received = number
        if again or not self.stepping:
            self._stop_if_asked()
        with suppress(RuntimeError):  # the signal interrupted the printing of another line
            self.tell("stopping after this step and a checkpoint; a second signal stops immediately")

    def _stop_if_asked(self) -> None:
        if self.received is not None:
            raise Terminated() if self.received == signal.SIGTERM else KeyboardInterrupt()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.stepping = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save = control.should_save or self.received is not None

    # A signal may also arrive while a step is logged or evaluated.
    on_log = on_evaluate = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.received is not None:
            self.tell(f"saved checkpoint-{state.global_step}")
        self._stop_if_asked()
