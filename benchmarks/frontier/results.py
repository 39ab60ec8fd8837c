"""Results as one JSON file for each run, named by a digest of all its settings: a run that exists is not repeated."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from folora_q.recipe import Recipe
from folora_q.storage.files import atomic_write

# Increased when the same settings begin to give other numbers.
FORMAT = 1
KEPT = Path(__file__).parent / "results" / "runs.jsonl"


@dataclass(frozen=True)
class Setting:
    """The setting that runs must share to be compared.

    Attributes:
        model: the model's name, without its folder.
        recipe: a digest of everything in the task's recipe, including the model.
    """

    model: str
    task: str
    recipe: str

    @classmethod
    def of(cls, path: Path, recipe: Recipe) -> Setting:
        """Return the setting of a task's recipe, read from this path; it is the same in another clone."""
        # The benchmark does not write the output folder.
        said = recipe.model_dump(mode="json", exclude_unset=True, exclude={"training": {"output_dir"}})
        said["model"]["model_name_or_path"] = model_name(recipe)
        here = json.dumps(f"{path.parent.absolute()}/")[1:-1]
        portable = json.loads(json.dumps(said).replace(here, ""))
        return cls(model_name(recipe), path.stem, digest(portable))


@dataclass(frozen=True)
class Key:
    """The identity of a run: its setting, the method's settings, the seed and the number of epochs."""

    on: Setting
    method: dict[str, Any]
    seed: int
    epochs: float

    def path(self, folder: Path) -> Path:
        return folder / f"{digest(asdict(self))}.json"


@dataclass(frozen=True)
class Result:
    """The measurements of a run and of the base, each a `Measured` as a dict.

    Attributes:
        tuned: measured with the adapter of the lowest held-out task loss.
        preparing: seconds before the first step.
        seconds: seconds of the training steps.
        best_step: the optimizer step of `tuned`.
        path: measurements during training by step, without scores.
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
        """The learning rate as text."""
        return rate_text(self.learning_rate)

    @property
    def task_loss(self) -> float:
        return self.tuned["loss"]["task"]

    @property
    def kl(self) -> float:
        """KL from the base on held-out text that it generated: the mean of complete and cropped texts."""
        return fmean(self.tuned["kl"].values())

    def rise(self, text: str) -> float:
        """Return the loss after training minus the loss before, on a text."""
        return self.tuned["loss"][text] - self.base["loss"][text]

    @property
    def general(self) -> list[str]:
        return [name for name in self.tuned["loss"] if name != "task" and name not in self.tuned["kl"]]

    @property
    def mean_rise(self) -> float:
        """The mean rise over the kinds of general text; an improvement counts as zero."""
        return sum(max(self.rise(name), 0.0) for name in self.general) / len(self.general)

    def along(self) -> list[Result]:
        """Return the run as a result at each of its measurements during training."""
        return [replace(self, tuned=measured, best_step=int(step), path={}) for step, measured in self.path.items()]


def rate_text(rate: float) -> str:
    """Return 2e-4 for 0.0002."""
    return np.format_float_scientific(rate, trim="-", exp_digits=1)


def model_name(recipe: Recipe) -> str:
    """Return the model's name, which does not depend on its folder."""
    return Path(recipe.model.model_name_or_path).name


def digest(settings: Any) -> str:
    """Return a digest of settings, for a file's name."""
    text = json.dumps([FORMAT, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """The runs of one table: those with the same recipe and number of epochs."""

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
    """Read all runs in a folder and in the repository: their lines by digest, and their results by cell."""
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
