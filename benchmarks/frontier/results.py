"""One JSON file a run, named by everything that makes it what it is: a run that is there is not made again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from folora_q.files import atomic_write
from folora_q.recipe import Recipe

# Raised when the same settings come to give other numbers.
FORMAT = 1


@dataclass(frozen=True)
class Setting:
    """What runs must share to be compared.

    Attributes:
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
        here = json.dumps(f"{path.parent.absolute()}/")[1:-1]
        portable = json.loads(json.dumps(said).replace(here, ""))
        return cls(recipe.model.model_name_or_path, path.stem, digest(portable))


@dataclass(frozen=True)
class Key:
    """A run: a method's settings, with a seed, for so many steps."""

    on: Setting
    method: dict[str, Any]
    seed: int
    steps: int

    def path(self, folder: Path) -> Path:
        return folder / f"{digest(asdict(self))}.json"


@dataclass(frozen=True)
class Result:
    """What a run measured, beside the base; `seconds` and `peak_bytes` are of the training alone."""

    series: str
    learning_rate: float
    task: str
    seed: int
    steps: int
    base: dict[str, Any]
    tuned: dict[str, Any]
    preparing: float
    seconds: float
    peak_bytes: int | None
    device: str = "CPU"

    @property
    def task_loss(self) -> float:
        return self.tuned["loss"]["task"]

    @property
    def kl(self) -> float:
        """From the base, on held-out text of its own: the mean of whole and cut."""
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


def digest(settings: Any) -> str:
    """A name for what makes a file what it is."""
    text = json.dumps([FORMAT, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(path: Path, key: Key, result: Result) -> None:
    atomic_write(path, json.dumps({"key": asdict(key), "result": asdict(result)}, default=str) + "\n")


def kept(folder: Path, on: Setting) -> list[str]:
    """The lines that were written of runs on this setting."""
    lines = [path.read_text("utf-8") for path in sorted(folder.glob("*.json"))]
    return [line for line in lines if json.loads(line)["key"].get("on") == asdict(on)]


def read(line: str) -> Result:
    """What `write` wrote."""
    return Result(**json.loads(line)["result"])
