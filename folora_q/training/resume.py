"""Resume a run: what has changed, which checkpoint is complete, and what can be reused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any

from folora_q.errors import RunError, UserError, first_line
from folora_q.recipe.paths import listed, short
from folora_q.recipe.schema import Recipe
from folora_q.runs.folder import RunFolder
from folora_q.storage.files import sha256
from folora_q.storage.untrusted import read_object
from folora_q.training.checkpoints import discard_after, newest_whole, step_of

# Another version of one of these may compute something else.
COMPARED_VERSIONS = ("folora-q", "torch", "transformers", "peft", "trl", "bitsandbytes")
# What the sampled text and the gates are made from, by the first word of a change.
OF_TEXT = {"proxy", "model", "recipe"}
MADE_FROM = {"proxy.jsonl": OF_TEXT, "gates.safetensors": OF_TEXT | {"gate", "data", "adapter"}}
# A checkpoint's weights have other shapes after these.
MAKE_SHAPES = (
    *("adapter.r:", "adapter.target_modules:", "adapter.exclude_modules:", "adapter.modules_to_save:"),
    *("gate.rule:", "gate.enabled:", "training.optim:"),
)
# Of the hardware: what makes other numbers, and what only rounds sums in another order.
RESULT_CHANGING_HARDWARE, ROUNDING_ONLY_HARDWARE = ("device", "dtype"), ("name", "threads")
# What is read of run.json: objects, of which each value is one of these.
OBJECTS, SCALARS = ("model", "data_sha256", "versions", "computing", "files_sha256"), (str, int, float, type(None))
SHORT = Repr()
SHORT.maxstring = SHORT.maxother = 60


@dataclass
class Resumption:
    """A run that goes on.

    Attributes:
        earlier: its run.json as it was found.
        checkpoint: what training goes on from; None begins it anew.
        changes: what is not as it was, a line each, the first word of it naming what it touches.
        force: go on all the same.
    """

    earlier: dict[str, Any]
    checkpoint: Path | None
    changes: list[str]
    force: bool

    @property
    def step(self) -> int:
        return step_of(self.checkpoint) if self.checkpoint is not None else 0

    def require_model(self, fingerprint: str) -> dict[str, str]:
        """See that the base model is the same one.

        Returns:
            Checksums of the parts that are still the right ones, now that everything is known.

        Raises:
            UserError: it is another one, and nothing is forced.
        """
        before = self.earlier.get("model", {}).get("fingerprint")
        if before is not None and before != fingerprint:
            self.changes.append(f"model fingerprint: {str(before)[:12]}… → {fingerprint[:12]}…")
            _refuse(self)
        return self._right_parts()

    def require_gates(self, path: Path) -> None:
        """See that gates which had to be made again are those that the checkpoint was trained with.

        Raises:
            RunError: they came out otherwise, and nothing is forced.
        """
        expected = self._right_parts().get(path.name)
        if self.checkpoint is not None and not self.force and expected not in (None, sha256(path)):
            raise RunError(
                f"{path} was damaged, and recomputing the gates gave different ones",
                "use the new gates with --force, or start again with --overwrite",
            )

    def keeps(self, path: Path) -> bool:
        """Whether the sampled text, or the gates, of the run are whole and still the right ones."""
        expected = self._right_parts().get(path.name)
        return expected is not None and path.is_file() and sha256(path) == expected

    def manifest(self, new: Mapping[str, Any]) -> dict[str, Any]:
        """run.json of the run that goes on: what it had, when and from where it went on, and what was forced."""
        entry = {"at": new["started"], "step": self.step, **({"forced": self.changes} if self.changes else {})}
        kept = {key: self.earlier[key] for key in ("started", "model") if key in self.earlier}
        resumed = [*self.earlier.get("resumed", []), entry]
        return {**new, **kept, "files_sha256": self._right_parts(), "resumed": resumed}

    def _right_parts(self) -> dict[str, str]:
        """Checksums of the parts that no change has touched; a change that was forced once is none the next time."""
        touched = {re.split(r"[.: ]", change)[0] for change in self.changes}
        known = self.earlier.get("files_sha256", {})
        return {name: known[name] for name, makers in MADE_FROM.items() if name in known and not touched & makers}


def read_earlier(folder: RunFolder) -> dict[str, Any] | None:
    """run.json of a run that can go on; None if there is no run.

    Raises:
        UserError: the run is complete, or its run.json cannot be read.
    """
    try:
        earlier = read_object(folder.manifest)
        _check(earlier)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder.manifest} cannot be read: {first_line(error)}", "start again with --overwrite"
        ) from None
    if earlier["status"] == "complete":
        raise UserError(
            f"the run in {folder.path} is complete: there is nothing to resume",
            "`folora-q report` shows it; --overwrite instead of --resume starts it again",
        )
    return earlier


def _check(earlier: dict[str, Any]) -> None:
    """See that what is read of run.json here is of the kind that is written there.

    Raises:
        ValueError: it is not; the message is the end of a sentence.
    """
    if not isinstance(earlier.get("status"), str):
        raise ValueError("it says no status")
    for key in OBJECTS:
        found = earlier.get(key, {})
        if not isinstance(found, dict) or not all(isinstance(value, SCALARS) for value in found.values()):
            raise ValueError(f"its {key} is not an object of texts and numbers")
    if not isinstance(earlier.get("resumed", []), list):
        raise ValueError("its resumed is not a list")


def prepare_resume(
    folder: RunFolder,
    earlier: dict[str, Any],
    recipe: Recipe,
    new: Mapping[str, Any],
    force: bool,
    tell: Callable[[str], None],
) -> Resumption:
    """What to go on from; what came after it is removed from the folder.

    Args:
        earlier, new: run.json as it was, and as it would be for a run that begins now.
        force: go on in spite of changes.
        tell: takes a line for the checkpoint that is used, and for each that is not.

    Raises:
        UserError: something changed since and nothing is forced, or it fits no checkpoint.
    """
    changes = [*_recipe_changes(folder, recipe), *_other_changes(earlier, new)]
    resumption = Resumption(earlier, None, changes, force)
    _refuse(resumption)
    for change in changes:
        tell(f"changed, accepted with --force: {change}")
    for change in _hardware_changes(earlier, new, ROUNDING_ONLY_HARDWARE):
        tell(f"{change}; sums may be rounded differently from an uninterrupted run")
    resumption.checkpoint = newest_whole(folder.path, recipe.keeps_best, tell)
    unfit = [change for change in changes if change.startswith(_making_shapes(recipe))]
    if resumption.checkpoint is None:
        tell("there is no complete checkpoint: training starts again")
    elif unfit:
        raise UserError(f"no checkpoint of {folder.path} fits {unfit[0]}", "start again with --overwrite")
    else:
        tell(f"resuming from {resumption.checkpoint.name}")
    discard_after(folder.path, resumption.step)
    folder.discard_unfinished()
    folder.cut_metrics(resumption.step)
    return resumption


def _making_shapes(recipe: Recipe) -> tuple[str, ...]:
    """How changes begin after which no checkpoint fits; `optim: auto` is another optimizer on another device."""
    by_device = recipe.training.optimizer_on(True) != recipe.training.optimizer_on(False)
    return (*MAKE_SHAPES, "hardware device:") if by_device else MAKE_SHAPES


def _refuse(resumption: Resumption) -> None:
    if resumption.changes and not resumption.force:
        raise UserError(
            f"cannot resume: the configuration has changed since the run started:\n       {listed(resumption.changes)}",
            "revert the changes, or pass --force (recorded in run.json)",
        )


def _recipe_changes(folder: RunFolder, recipe: Recipe) -> Iterator[str]:
    """Keys of the recipe with another value than a run was begun with; its folder may have been moved."""
    try:
        before = folder.read_recipe().model_dump(mode="json")
    except FileNotFoundError:  # killed before it was written: nothing had been done
        return
    except (OSError, ValueError):
        yield f"recipe: {folder.recipe} cannot be read"
        return
    for section, now in recipe.model_dump(mode="json").items():
        for key, value in now.items():
            if value != before[section][key] and (section, key) != ("training", "output_dir"):
                yield f"{section}.{key}: {SHORT.repr(before[section][key])} → {SHORT.repr(value)}"


def _other_changes(earlier: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    before, now = earlier.get("data_sha256", {}), new["data_sha256"]
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            was, is_now = (str(found.get(name) or "none")[:12] for found in (before, now))
            yield f"data file {short(name)}: SHA-256 {was} → {is_now}"
    before, now = earlier.get("versions", {}), new["versions"]
    for name in COMPARED_VERSIONS:
        if name in before and before[name] != now.get(name):
            yield f"version of {name}: {short(before[name])} → {now.get(name)}"
    yield from _hardware_changes(earlier, new, RESULT_CHANGING_HARDWARE)


def _hardware_changes(earlier: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    before, now = earlier.get("computing", {}), new["computing"]
    for name in names:
        if name in before and before[name] != now[name]:
            yield f"hardware {name}: {short(before[name])} → {now[name]}"
