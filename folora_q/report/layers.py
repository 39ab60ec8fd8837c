"""Arrange numbers of layers and gates as grids: kinds of modules by layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from folora_q.runs.results import GateResult, LayerResult, TextKind

# Longer numbers in names are not layer indices.
MAX_INDEX_DIGITS = 6
# Range of a logarithmic scale; smaller values are negligible, and would reduce the contrast.
DECADES = 5


@dataclass(frozen=True)
class LayerPlace:
    """The position of a module: `model.layers.11.mlp.down_proj` is `mlp.down_proj` of 11 in `model.layers`.

    Later numbers, as of experts, become `*`, so that experts are one kind.
    """

    stem: str
    index: int | None
    kind: str


@dataclass(frozen=True)
class Grid:
    """A quantity by kind of module and layer.

    Attributes:
        rows: kinds of module, or several that share a gate.
        columns: layers; None, at the end, is for modules outside of numbered layers.
        cells: by row; None if empty. Several modules of one kind (experts) are averaged.
    """

    rows: list[str]
    columns: list[int | None]
    cells: list[list[float | None]]

    @property
    def values(self) -> list[float]:
        return [value for row in self.cells for value in row if value is not None]


@dataclass(frozen=True)
class Scale:
    """Maps a quantity to a share of its range, from 0 to 1."""

    low: float
    high: float
    logarithmic: bool

    def share(self, value: float) -> float:
        if self.high <= self.low:
            return 0.5
        if self.logarithmic:
            if value <= self.low:
                return 0.0
            return min(math.log(value / self.low) / math.log(self.high / self.low), 1.0)
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


@dataclass(frozen=True)
class Quantity:
    """A quantity of layers or gates, with its title and meaning."""

    key: str
    title: str
    meaning: str
    logarithmic: bool
    grid: Grid

    @property
    def scale(self) -> Scale:
        return scale_of(self.grid.values, self.logarithmic)


def place_of(name: str) -> LayerPlace:
    """Parse a module's name."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if _is_index(part)), None)
    if number is None:
        return LayerPlace("", None, name)
    stem, rest = ".".join(parts[:number]), parts[number + 1 :]
    return LayerPlace(stem, int(parts[number]), ".".join("*" if _is_index(part) else part for part in rest) or stem)


def short_names(names: Iterable[str]) -> dict[tuple[str, str], str]:
    """Return for every (stem, kind) among the names its shortest unique ending."""
    kinds = list(dict.fromkeys((place.stem, place.kind) for place in map(place_of, names)))
    wholes = {key: ".".join(filter(None, key)).split(".") for key in kinds}
    ends = {key: key[1].split(".") for key in kinds}
    short: dict[tuple[str, str], str] = {}
    for key, end in ends.items():
        for length in range(1, len(end) + 1):
            if sum(other[-length:] == end[-length:] for other in ends.values()) == 1:
                short[key] = ".".join(end[-length:])
                break
        else:
            short[key] = ".".join(wholes[key])
    return short


def joint_name(names: Sequence[str]) -> str:
    """Abbreviate the names of modules that share a gate: q/k/v_proj."""
    end = commonprefix([name[::-1] for name in names])[::-1]
    end = end[end.find("_") :] if "_" in end else ""
    if len(names) < 2 or not all(name.removesuffix(end) for name in names):
        return "/".join(names)
    return "/".join(name.removesuffix(end) for name in names) + end


def grid_of(values: Iterable[tuple[Sequence[str], float]]) -> Grid:
    """Arrange values by kind and layer of their modules; non-finite values are left out."""
    entries = [(list(names), value) for names, value in values if names and math.isfinite(value)]
    short = short_names(name for names, _ in entries for name in names)
    found: dict[str, dict[int | None, list[float]]] = {}
    for names, value in entries:
        places = [place_of(name) for name in names]
        row = joint_name(list(dict.fromkeys(short[place.stem, place.kind] for place in places)))
        found.setdefault(row, {}).setdefault(places[0].index, []).append(value)
    indices = {index for row in found.values() for index in row}
    columns: list[int | None] = [*sorted(index for index in indices if index is not None)]
    if None in indices:
        columns.append(None)
    means = {row: {i: sum(values) / len(values) for i, values in cells.items()} for row, cells in found.items()}
    return Grid(list(means), columns, [[cells.get(index) for index in columns] for cells in means.values()])


def scale_of(values: Iterable[float], logarithmic: bool) -> Scale:
    """Return the range of the values; a linear scale starts at 0."""
    if not logarithmic:
        return Scale(0.0, max(values, default=0.0), False)
    positive = [value for value in values if value > 0]
    if not positive:
        return Scale(0.0, 0.0, True)
    high = max(positive)
    return Scale(max(min(positive), high / 10**DECADES), high, True)


def layer_quantities(layers: Sequence[LayerResult]) -> list[Quantity]:
    """Return how far every layer moved; unknown quantities are left out."""
    return _known(
        [
            *(
                _drift(layers, kind, text)
                for kind, text in ((TextKind.GENERATED, "generated text"), (TextKind.TASK, "task text"))
            ),
            Quantity(
                "norm",
                "Size of the update",
                "‖ΔW‖, the Frobenius norm of the change",
                False,
                _grid_of_layers(layers, lambda layer: layer.update_norm),
            ),
        ]
    )


def gate_quantities(gates: Sequence[GateResult], layers: Sequence[LayerResult], steps: bool = True) -> list[Quantity]:
    """Return what the gates are and, if `steps` go through them, how much of each step they let pass."""
    return _known(
        [
            Quantity(
                "quotient",
                "Top quotient γ",
                "how much the task uses the best direction of the layer’s input, per unit of what model-generated text "
                "loses",
                True,
                grid_of((gate.modules, max(gate.quotients)) for gate in gates if gate.quotients),
            ),
            Quantity(
                "gate",
                "Mean gate value",
                "the share of a step that passes, averaged over all directions of the layer’s input",
                False,
                grid_of((gate.modules, gate.mean_value) for gate in gates if steps and gate.dim > 0),
            ),
            *(_energy(layers, matrix) for matrix in ("a", "b")),
        ]
    )


def _drift(layers: Sequence[LayerResult], kind: str, text: str) -> Quantity:
    return Quantity(
        f"drift-{kind}",
        f"Drift on {text}",
        f"how far the layer’s output moved on {text}, held out; squared, relative to its size",
        True,
        _grid_of_layers(layers, lambda layer: layer.drift.get(kind)),
    )


def _energy(layers: Sequence[LayerResult], matrix: str) -> Quantity:
    return Quantity(
        f"energy-{matrix}",
        f"Energy kept of {matrix.upper()}’s steps",
        f"the share of the optimizer’s steps of {matrix.upper()}, squared, that the gate let pass in training",
        False,
        _grid_of_layers(layers, lambda layer: layer.energy_kept.get(matrix)),
    )


def _grid_of_layers(layers: Sequence[LayerResult], of: Callable[[LayerResult], float | None]) -> Grid:
    return grid_of(([layer.name], value) for layer in layers if (value := of(layer)) is not None)


def _known(found: Iterable[Quantity]) -> list[Quantity]:
    return [quantity for quantity in found if quantity.grid.rows]


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) <= MAX_INDEX_DIGITS
