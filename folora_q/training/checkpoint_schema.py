"""Validate the JSON files of a checkpoint before the Trainer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from folora_q.storage.untrusted import MIB, read_text

# What the Trainer does not save and an exact continuation needs: see `folora_q.training.fault_tolerant_trainer`.
PROGRESS = "progress.json"
TRAINER_STATE = "trainer_state.json"
# A line of metrics takes 200 bytes, and the state has all of them.
MAX_STATE_BYTES = 64 * MIB
Count = Annotated[int, Field(ge=0)]


class Saved(BaseModel):
    """A file of ours or of the Trainer's: a number is no text, and the other way round."""

    model_config = ConfigDict(strict=True)


class SavedProgress(Saved):
    """progress.json."""

    loss_sum: float
    loss_total: float
    last_logged: Count
    ended: bool
    exceeded: tuple[Count, float] | None
    skipped: tuple[Count, Count]
    losses: tuple[list[float], list[float]]
    rows_that_fit: tuple[Count | None, Count | None]
    tokens: int | float
    metrics: dict[Literal["train", "eval"], dict[str, list[int | float]]]


class Callback(Saved):
    """A callback's own state: what it is made with, and what it has counted."""

    args: dict[str, float | bool | None]
    attributes: dict[Literal["early_stopping_patience_counter"], Count]


class SavedState(Saved):
    """trainer_state.json, as far as the Trainer computes with it; versions of transformers differ in the rest."""

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
    """One of a checkpoint's files.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else than what is saved there; the message begins with its name.
    """
    try:
        return kind.model_validate_json(read_text(path, MAX_STATE_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(": ".join([path.name, ".".join(map(str, first["loc"])), first["msg"]])) from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
