"""Resume a run: what has changed, which checkpoint is complete, and what can be reused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any

from folora_q.errors import RunError, UserError
from folora_q.recipe.paths import listed, short
from folora_q.recipe.schema import Recipe
from folora_q.runs.folder import RunFolder
from folora_q.storage.files import sha256
from folora_q.training.checkpoints import discard_after, newest_whole, step_of

# Packages whose version can change results.
COMPARED_VERSIONS = ("folora-q", "torch", "transformers", "peft", "trl", "bitsandbytes")
# The inputs of the sampled text and of the gates, by the first word of a change.
OF_TEXT = {"proxy", "model", "recipe"}
MADE_FROM = {
    "proxy.jsonl": OF_TEXT,
    "keep.jsonl": {"model", "recipe", "keep", "data"},
    "gates.safetensors": OF_TEXT | {"gate", "keep", "data", "adapter"},
}
# Changes of these settings change the shapes of a checkpoint's tensors.
MAKE_SHAPES = (
    *("adapter.r:", "adapter.target_modules:", "adapter.exclude_modules:", "adapter.modules_to_save:"),
    *("gate.rule:", "gate.enabled:", "training.optim:"),
)
# Hardware facts that change results, and those that only change the order in which sums are rounded.
RESULT_CHANGING_HARDWARE, ROUNDING_ONLY_HARDWARE = ("device", "dtype"), ("name", "threads", "processes")
SHORT = Repr()
SHORT.maxstring = SHORT.maxother = 60


@dataclass(frozen=True)
class Manifests:
    """The run.json of a run as it was, and as it would be for a run that starts now."""

    earlier: dict[str, Any]
    new: Mapping[str, Any]


@dataclass
class Resumption:
    """A run that is resumed.

    Attributes:
        earlier: its run.json as it was found.
        checkpoint: the checkpoint to resume from; None starts training again.
        changes: differences from the earlier run, one line each; the first word names what is affected.
        force: resume in spite of changes.
    """

    earlier: dict[str, Any]
    checkpoint: Path | None
    changes: list[str]
    force: bool

    @property
    def step(self) -> int:
        return step_of(self.checkpoint) if self.checkpoint is not None else 0

    def require_model(self, fingerprint: str) -> dict[str, str]:
        """Check that the base model is the same as before.

        Returns:
            Checksums of the files that remain valid.

        Raises:
            UserError: the base model differs, without `force`.
        """
        before = self.earlier.get("model", {}).get("fingerprint")
        if before is not None and before != fingerprint:
            self.changes.append(f"model fingerprint: {str(before)[:12]}… → {fingerprint[:12]}…")
            _refuse(self)
        return self._right_parts()

    def require_gates(self, path: Path) -> None:
        """Check that recomputed gates equal those that the checkpoint was trained with.

        Raises:
            RunError: they differ, without `force`.
        """
        expected = self._right_parts().get(path.name)
        if self.checkpoint is not None and not self.force and expected not in (None, sha256(path)):
            raise RunError(
                f"{path} was damaged, and recomputing the gates gave different ones",
                "use the new gates with --force, or start again with --overwrite",
            )

    def keeps(self, path: Path) -> bool:
        """Whether a file of the run (sampled text or gates) is complete and still valid."""
        expected = self._right_parts().get(path.name)
        return expected is not None and path.is_file() and sha256(path) == expected

    def manifest(self, new: Mapping[str, Any]) -> dict[str, Any]:
        """Return run.json of the resumed run, with time and step of each resume and the changes that were forced."""
        entry = {"at": new["started"], "step": self.step, **({"forced": self.changes} if self.changes else {})}
        kept = {key: self.earlier[key] for key in ("started", "model") if key in self.earlier}
        resumed = [*self.earlier.get("resumed", []), entry]
        return {**new, **kept, "files_sha256": self._right_parts(), "resumed": resumed}

    def _right_parts(self) -> dict[str, str]:
        """Return checksums of the files that no change affects; a change once forced does not count again."""
        touched = {re.split(r"[.: ]", change)[0] for change in self.changes}
        known = self.earlier.get("files_sha256", {})
        return {name: known[name] for name, makers in MADE_FROM.items() if name in known and not touched & makers}


def prepare_resume(
    folder: RunFolder, recipe: Recipe, manifests: Manifests, force: bool, tell: Callable[[str], None]
) -> Resumption:
    """Choose the checkpoint to resume from, and remove what was written after it.

    Args:
        force: resume in spite of changes.
        tell: receives a line for the checkpoint that is used, and for each that is not.

    Raises:
        UserError: something changed without `force`, or no checkpoint fits the changed recipe.
    """
    changes = [*_recipe_changes(folder, recipe), *_other_changes(manifests)]
    resumption = Resumption(manifests.earlier, None, changes, force)
    _refuse(resumption)
    for change in changes:
        tell(f"changed, accepted with --force: {change}")
    for change in _hardware_changes(manifests, ROUNDING_ONLY_HARDWARE):
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
    """Return prefixes of changes after which no checkpoint fits; `optim: auto` depends on the device."""
    by_device = recipe.training.optimizer_on(True) != recipe.training.optimizer_on(False)
    return (*MAKE_SHAPES, "hardware device:") if by_device else MAKE_SHAPES


def _refuse(resumption: Resumption) -> None:
    if resumption.changes and not resumption.force:
        raise UserError(
            f"cannot resume: the configuration has changed since the run started:\n       {listed(resumption.changes)}",
            "revert the changes, or pass --force (recorded in run.json)",
        )


def _recipe_changes(folder: RunFolder, recipe: Recipe) -> Iterator[str]:
    """Yield the recipe's keys whose values changed since the run started, except its folder, which may be moved."""
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


def _other_changes(manifests: Manifests) -> Iterator[str]:
    earlier, new = manifests.earlier, manifests.new
    before, now = earlier.get("data_sha256", {}), new["data_sha256"]
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            was, is_now = (str(found.get(name) or "none")[:12] for found in (before, now))
            yield f"data file {short(name)}: SHA-256 {was} → {is_now}"
    before, now = earlier.get("versions", {}), new["versions"]
    for name in COMPARED_VERSIONS:
        if name in before and before[name] != now.get(name):
            yield f"version of {name}: {short(before[name])} → {now.get(name)}"
    yield from _hardware_changes(manifests, RESULT_CHANGING_HARDWARE)


def _hardware_changes(manifests: Manifests, names: Sequence[str]) -> Iterator[str]:
    before, now = manifests.earlier.get("computing", {}), manifests.new["computing"]
    for name in names:
        if name in before and before[name] != now[name]:
            yield f"hardware {name}: {short(before[name])} → {now[name]}"
