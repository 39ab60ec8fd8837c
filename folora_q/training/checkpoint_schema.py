"""Validate the JSON files of a checkpoint before the Trainer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from folora_q.storage.untrusted import MIB, read_text
from folora_q.training.budget_state import BudgetState

# What exact resumption needs and the Trainer does not save: see `folora_q.training.resumable_trainer`.
PROGRESS = "progress.json"
TRAINER_STATE = "trainer_state.json"
# The state holds all lines of metrics, of about 200 bytes each.
MAX_STATE_BYTES = 64 * MIB
Count = Annotated[int, Field(ge=0)]


class Saved(BaseModel):
    """Base class with strict types: text is not accepted as a number, nor a number as text."""

    model_config = ConfigDict(strict=True)


class SavedProgress(Saved):
    """Content of progress.json."""

    loss_sum: float
    loss_total: float
    last_logged: Count
    ended: bool
    exceeded: tuple[Count, float] | None
    skipped: tuple[Count, Count]
    losses: tuple[list[float], list[float]]
    rows_that_fit: tuple[Count | None, Count | None]
    compiled: bool = False
    budget: BudgetState | None = None
    tokens: int | float
    metrics: dict[Literal["train", "eval"], dict[str, list[int | float]]]


class Callback(Saved):
    """State of a callback: its arguments, and its counters."""

    args: dict[str, float | bool | None]
    attributes: dict[Literal["early_stopping_patience_counter"], Count]


class SavedState(Saved):
    """The fields of trainer_state.json that the Trainer computes with; the others differ between versions."""

    epoch: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    global_step: Count
    max_steps: Count = 0
    num_train_epochs: Count = 0
    train_batch_size: Count | None = None
    logging_steps: float = 0
    eval_steps: float | None = None
    save_steps: float = 0
    num_input_tokens_seen: float = 0
    total_flos: float = 0
    log_history: list[dict[str, Any]]
    best_metric: float | None = None
    best_global_step: Count | None = None
    best_model_checkpoint: str | None = None
    stateful_callbacks: dict[Literal["TrainerControl", "EarlyStoppingCallback"], Callback]


Kind = TypeVar("Kind", bound=Saved)


def read_saved(path: Path, kind: type[Kind]) -> Kind:
    """Read and validate one JSON file of a checkpoint.

    Raises:
        OSError: the file cannot be read.
        ValueError: the content is invalid; the message begins with the file's name.
    """
    try:
        return kind.model_validate_json(read_text(path, MAX_STATE_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(": ".join([path.name, ".".join(map(str, first["loc"])), first["msg"]])) from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
