"""One JSON file a run, named by everything that makes it what it is: a run that is there is not made again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from folora_q.recipe import Recipe
from folora_q.storage.files import atomic_write

# Raised when the same settings come to give other numbers.
FORMAT = 1
KEPT = Path(__file__).parent / "results" / "runs.jsonl"


@dataclass(frozen=True)
class Setting:
    """What runs must share to be compared.

    Attributes:
        model: its name, without the folder that it lies in.
        recipe: a digest of all that the task's recipe says, the model too.
    """

    model: str
    task: str
    recipe: str

    @classmethod
    def of(cls, path: Path, recipe: Recipe) -> Setting:
        """The setting of a task's recipe, read from this path; the same in another clone."""
        # The benchmark does not write the output folder.
        said = recipe.model_dump(mode="json", exclude_unset=True, exclude={"training": {"output_dir"}})
        said["model"]["model_name_or_path"] = model_name(recipe)
        here = json.dumps(f"{path.parent.absolute()}/")[1:-1]
        portable = json.loads(json.dumps(said).replace(here, ""))
        return cls(model_name(recipe), path.stem, digest(portable))


@dataclass(frozen=True)
class Key:
    """What makes a run what it is: the method's settings, the seed and the number of epochs."""

    on: Setting
    method: dict[str, Any]
    seed: int
    epochs: float

    def path(self, folder: Path) -> Path:
        return folder / f"{digest(asdict(self))}.json"


@dataclass(frozen=True)
class Result:
    """What a run measured, and the base: each a `Measured` as a dict.

    Attributes:
        tuned: with the adapter of the lowest held-out task loss.
        best_step: the optimizer step that it is of.
        path: what was measured during training, by step; losses and KL alone.
        seconds: of the training alone.
    """

    series: str
    learning_rate: float
    task: str
    seed: int
    steps: int
    base: dict[str, Any]
    tuned: dict[str, Any]
    preparing: float
    seconds: float
    device: str = "CPU"
    best_step: int = 0
    path: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def rate(self) -> str:
        """The learning rate, for people."""
        return rate_text(self.learning_rate)

    @property
    def task_loss(self) -> float:
        return self.tuned["loss"]["task"]

    @property
    def kl(self) -> float:
        """From the base, on held-out text that it generated: the mean of whole and cut texts."""
        return (self.tuned["kl"]["own text"] + self.tuned["kl"]["own text, cut"]) / 2

    def rise(self, text: str) -> float:
        """Loss after - loss before."""
        return self.tuned["loss"][text] - self.base["loss"][text]

    @property
    def general(self) -> list[str]:
        return [name for name in self.tuned["loss"] if name not in ("task", "own text", "own text, cut")]

    @property
    def mean_rise(self) -> float:
        """Over the kinds of general text; a text that got better counts as one that stayed as it was."""
        return sum(max(self.rise(name), 0.0) for name in self.general) / len(self.general)

    def along(self) -> list[Result]:
        """The run as it was at each point where it was measured."""
        return [replace(self, tuned=measured, best_step=int(step), path={}) for step, measured in self.path.items()]


def rate_text(rate: float) -> str:
    """2e-4 for 0.0002."""
    return np.format_float_scientific(rate, trim="-", exp_digits=1)


def model_name(recipe: Recipe) -> str:
    """The same wherever the model lies."""
    return Path(recipe.model.model_name_or_path).name


def digest(settings: Any) -> str:
    """A name for what makes a file what it is."""
    text = json.dumps([FORMAT, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """What is compared in one table; runs of other recipes or lengths are never mixed."""

    on: Setting
    epochs: float

    def __str__(self) -> str:
        return f"{self.on.task}, {Path(self.on.model).stem}, {self.epochs:g} epochs"

    @property
    def slug(self) -> str:
        return f"{self.on.task}-{Path(self.on.model).stem}-{self.epochs:g}"


def write(path: Path, key: Key, result: Result) -> None:
    atomic_write(path, json.dumps({"key": asdict(key), "result": asdict(result)}, default=str) + "\n")


def read_all(output: Path, kept: Path = KEPT) -> tuple[dict[str, str], dict[Cell, list[Result]]]:
    """Every run in a folder, and those that the repository keeps: their lines by name, and what they measured."""
    lines = {}
    if kept.exists():
        for line in kept.read_text("utf-8").splitlines():
            lines[digest(json.loads(line)["key"])] = line
    lines |= {path.stem: path.read_text("utf-8").strip() for path in sorted(output.glob("*.json"))}
    found: dict[Cell, list[Result]] = {}
    for line in lines.values():
        row = json.loads(line)
        cell = Cell(Setting(**row["key"]["on"]), row["key"]["epochs"])
        found.setdefault(cell, []).append(Result(**row["result"]))
    return lines, found
