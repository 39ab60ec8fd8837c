"""What the Trainer says while it runs, handed on: one call a step, one a line of metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from folora_q.errors import RunFailed

Metrics = dict[str, float | int]


class BeforeTraining(TrainerCallback):
    """Does something when all is set up for the first step."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.action()


class Reporting(TrainerCallback):
    """Calls `step_taken(1)` after every optimizer step and `logged(metrics)` for every line of metrics.

    Raises:
        RunFailed: the training loss is not finite; the step is named.
    """

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
        if logs is None:
            return
        self.logged({"step": state.global_step, **logs})
        if "loss" in logs and not math.isfinite(logs["loss"]):
            raise RunFailed(
                f"the training loss is {logs['loss']} at step {state.global_step}", "lower training.learning_rate"
            )
