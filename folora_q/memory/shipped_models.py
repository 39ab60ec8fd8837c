"""The numbers of config.json of much-used base models, which are shipped so that an estimate needs no network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from folora_q.storage.untrusted import read_object

FILE = Path(__file__).with_name("shipped_models.json")


@dataclass(frozen=True)
class ShippedModel:
    """Models of the same shape.

    Attributes:
        ids: hub ids.
        parameters: the published number of parameters, which a test compares with the model of `config`.
        config: the keys of config.json that determine the shape; others, such as the positions, are left out.
        date: the day on which they were checked.
    """

    ids: tuple[str, ...]
    parameters: int
    config: dict[str, Any]
    date: str


@cache
def shipped_models() -> tuple[ShippedModel, ...]:
    """Return all shipped models."""
    read = read_object(FILE)
    return tuple(
        ShippedModel(tuple(one["ids"]), one["parameters"], one["config"], read["date"]) for one in read["models"]
    )


def shipped_model(name: str) -> ShippedModel | None:
    """Return the shipped numbers of a hub id, in which a hub ignores case; None if there are none."""
    return _by_id().get(name.lower())


@cache
def _by_id() -> dict[str, ShippedModel]:
    return {name.lower(): model for model in shipped_models() for name in model.ids}
