"""Two adapters of one base, added: what each does on the other's task, predicted from statistics, or measured."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from folora_q.calibration.gate_store import load_gates
from folora_q.errors import UserError, first_line
from folora_q.models.adapter_file import Delta, read_adapter
from folora_q.models.earlier_adapter import read_earlier, stack
from folora_q.models.trust import ADAPTER_CONFIG, NOTHING, PICKLED_ADAPTER, SAFE_ADAPTER, Trust
from folora_q.recipe.schema import Recipe
from folora_q.runs.earlier_tasks import with_unique_names
from folora_q.runs.folder import RunFolder
from folora_q.targets.find import Target, adapter_folder, find_target

# Files of an adapter's folder that are its own; tokenizer and generation settings are those of the sum too.
OWN_FILES = (ADAPTER_CONFIG, SAFE_ADAPTER, PICKLED_ADAPTER, "README.md")


@dataclass(frozen=True)
class LayerInterference:
    """Two changes of one layer on the text of the first one's task.

    Attributes:
        own, other: E‖ΔW x‖² of the first and of the second, in one unit for all layers.
        product: E⟨ΔW₁x, ΔW₂x⟩.
    """

    name: str
    own: float
    other: float
    product: float


@dataclass(frozen=True)
class Interference:
    """What a second adapter is predicted to do on the text of a first one's task.

    Attributes:
        of, by: names of the first and of the second.
        unknown: layers that the second changes and for which the first has no statistics.
    """

    of: str
    by: str
    layers: list[LayerInterference]
    unknown: list[str]

    @property
    def ratio(self) -> float:
        """E‖ΔW₂x‖² / E‖ΔW₁x‖², summed over the layers."""
        own = sum(layer.own for layer in self.layers)
        return sum(layer.other for layer in self.layers) / own if own > 0 else float("inf")

    @property
    def cosine(self) -> float:
        """The cosine between what both do: 1 if the second repeats the first, -1 if it undoes it."""
        own, other, product = (sum(getattr(each, key) for each in self.layers) for key in ("own", "other", "product"))
        return product / (own * other) ** 0.5 if own > 0 and other > 0 else 0.0


def predict_interference(first: str, second: str, trust: Trust = NOTHING) -> list[Interference]:
    """Predict from the covariances of both runs what each adapter does on the other's text.

    Returns:
        Both directions; only one if the other run has no gates.

    Raises:
        UserError: one is no run or adapter, they have different bases, or neither has gates.
    """
    targets = [find_target(name) for name in (first, second)]
    _require_one_base(targets)
    folders = [target.adapter for target in targets]
    for target, folder in zip(targets, folders, strict=True):
        if folder is None:
            raise UserError(f"{target.name} is not an adapter", "name two runs, or a run and an adapter")
    deltas = [read_adapter(folder, trust).deltas for folder in folders if folder is not None]
    found = [
        _on_text_of(target.run.gates, deltas[n], deltas[1 - n], (target.name, targets[1 - n].name))
        for n, target in enumerate(targets)
        if target.run is not None and target.run.gates.is_file()
    ]
    if not found:
        raise UserError(
            f"neither {first} nor {second} has the statistics of its task (gates.safetensors)",
            f"measure it instead: folora-q eval {first} {second}",
        )
    return found


def _on_text_of(gates: Path, own: dict[str, Delta], other: dict[str, Delta], names: tuple[str, str]) -> Interference:
    layers, known = [], load_gates(gates)
    for name, gate in known.items():
        pair = [deltas.get(f"{name}.weight") for deltas in (own, other)]
        if pair[0] is None or pair[1] is None:
            energy = [0.0 if each is None else _products([each], gate.forms(each.a)[1])[0] for each in pair]
            layers.append(LayerInterference(name, energy[0] * gate.unit, energy[1] * gate.unit, 0.0))
            continue
        both = [pair[0], pair[1]]
        _, utility = gate.forms(torch.cat([each.a for each in both]))
        mine, theirs, product = _products(both, utility)
        layers.append(LayerInterference(name, mine * gate.unit, theirs * gate.unit, product * gate.unit))
    unknown = [weight.removesuffix(".weight") for weight in other if weight.removesuffix(".weight") not in known]
    return Interference(*names, layers, unknown)


def _products(deltas: Sequence[Delta], form: torch.Tensor) -> list[float]:
    """Return tr(ΔWᵢ Σ ΔWⱼᵀ) for (1, 1), (2, 2) and (1, 2), from the form of all rows of A stacked."""
    starts = [0, *torch.tensor([len(each.a) for each in deltas]).cumsum(0).tolist()]

    def product(i: int, j: int) -> float:
        part = form[starts[i] : starts[i + 1], starts[j] : starts[j + 1]]
        left, right = (deltas[n].b.double() * deltas[n].scale for n in (i, j))
        return float(((left.T @ right) * part).sum())

    return [product(i, j) for i, j in ((0, 0), (1, 1), (0, 1)) if max(i, j) < len(deltas)]


@dataclass(frozen=True)
class Sum:
    """Two adapters as one target, and the tasks of both that are known, by name."""

    target: Target
    tasks: list[tuple[str, Recipe]]


def add_adapters(first: str, second: str, scratch: Path, trust: Trust = NOTHING) -> Sum:
    """Write the sum of two adapters into a folder; those of runs on an earlier adapter include it.

    Raises:
        UserError: one is no run or adapter, they have different bases, or one is more than a plain LoRA.
    """
    folders = [adapter_folder(Path(name)) for name in (first, second)]
    targets = [find_target(str(folder)) for folder in folders]
    _require_one_base(targets)
    for file in folders[0].iterdir():
        if file.is_file() and file.name not in OWN_FILES:
            shutil.copyfile(file, scratch / file.name)
    require_apart([Path(first), Path(second)], trust)
    read_earlier(second, trust)  # which refuses what is not a sum of products
    stack(read_earlier(first, trust), folders[1], scratch, torch.float32)
    kind = f"sum of two adapters on {targets[0].section.model_name_or_path}"
    target = Target(f"{first} + {second}", kind, targets[0].section, scratch)
    return Sum(target, with_unique_names(list(_tasks((first, second)))))


def require_apart(sources: Sequence[Path], trust: Trust = NOTHING) -> None:
    """Check that no run holds another of the adapters that are to be added (`model.adapter`).

    Raises:
        UserError: one was trained on another, whose change would count twice.
    """
    for source in sources:
        held = RunFolder(source).earlier
        below = read_earlier(str(held), trust).fingerprint if held.is_dir() else None
        for other in sources:
            if below is not None and other != source and read_earlier(str(other), trust).fingerprint == below:
                raise UserError(
                    f"{source} was trained on {other} and holds it already: added, it would count twice",
                    f"leave out {other}",
                )


def _tasks(names: Sequence[str]) -> Iterator[tuple[str, Recipe]]:
    for name in names:
        path = Path(name).resolve()
        run = next((run for run in (RunFolder(path), RunFolder(path.parent)) if run.recipe.is_file()), None)
        if run is None:
            continue
        try:
            yield f"task of {run.path.name}", run.read_recipe()
        except (OSError, ValueError) as error:
            raise UserError(f"{run.recipe} cannot be read: {first_line(error)}") from None


def _require_one_base(targets: Sequence[Target]) -> None:
    """Raise an error for adapters that name different bases, or different adapters below them."""
    one, other = (target.section for target in targets)
    if one.model_name_or_path != other.model_name_or_path or one.revision != other.revision:
        raise UserError(
            f"{targets[0].name} is an adapter of {one.model_name_or_path}, {targets[1].name} of "
            f"{other.model_name_or_path}: they cannot be added"
        )
