"""Checkpoints with a manifest of SHA-256 checksums, written last; which are complete, and which are kept.

A checkpoint is written to a hidden folder next to its target and renamed once it is complete and on the disk
(`folora_q.storage.files.commit_directory`). Checkpoints are ordered by the steps in their names, never by the clock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from folora_q.errors import first_line
from folora_q.models.trust import is_inside
from folora_q.storage.files import atomic_write, remove_directory, sha256
from folora_q.storage.untrusted import read_object
from folora_q.training.checkpoint_schema import MAX_STATE_BYTES, PROGRESS, TRAINER_STATE

MANIFEST = "manifest.json"
# Without one of these, part of the training state would silently start from scratch.
REQUIRED = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", TRAINER_STATE, PROGRESS}
# Random states: of one process, or of the first of several.
RANDOM_STATES = ("rng_state.pth", "rng_state_0.pth")
# Weights of a complete model, which the Trainer would load instead of the adapter's.
PLACELESS = {
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors", "model.safetensors.index.json"),
    *("adapter_model.bin", "pytorch_model_fsdp.bin"),
}
# The settings as a pickle, which the Trainer writes and nothing reads.
UNREAD = "training_args.bin"
NAME = re.compile(r"checkpoint-(\d+)")
FORMAT = 1


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the path of a step's checkpoint, by transformers' convention."""
    return run / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    found = NAME.fullmatch(checkpoint.name)
    assert found is not None, checkpoint
    return int(found[1])


def checkpoints(run: Path) -> list[Path]:
    """List a run's checkpoints, complete or not, the latest step first."""
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def seal(folder: Path, step: int) -> None:
    """Write the manifest of a checkpoint whose other files are complete, and remove the file that nothing reads."""
    (folder / UNREAD).unlink(missing_ok=True)
    files = {
        str(path.relative_to(folder)): {"sha256": sha256(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    atomic_write(folder / MANIFEST, json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1) + "\n")


def damage(checkpoint: Path) -> str | None:
    """Describe what is wrong with a checkpoint, as the end of a sentence; None if every file is as it was saved.

    A manifest is not a signature: whoever can write to the folder can write one. So unexpected files are refused: the
    Trainer would load the weights of a complete model, or an adapter in a subfolder, if it found them.
    """
    try:
        manifest = read_object(checkpoint / MANIFEST)
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never finished"
    except (OSError, ValueError):
        return f"its {MANIFEST} cannot be read"
    step, files = manifest.get("step"), _files_of(manifest)
    if type(step) is not int or files is None:
        return f"its {MANIFEST} cannot be read"
    if step != step_of(checkpoint):
        return f"its {MANIFEST} belongs to step {step}"
    missing = sorted(REQUIRED - files.keys())
    if files.keys().isdisjoint(RANDOM_STATES):
        missing.append(RANDOM_STATES[0])
    if missing:
        return f"its {MANIFEST} does not name {missing[0]}"
    if outside := [name for name in files if not is_inside(name) or "/" in name]:
        return f"its {MANIFEST} names {outside[0]!r}, which is not a file in its folder"
    present = {path.name for path in checkpoint.iterdir() if path.is_dir() or not path.name.startswith(".")}
    if odd := sorted(present - files.keys() - {MANIFEST}) or sorted(files.keys() & PLACELESS):
        return f"it contains an unexpected file, {odd[0]}"
    problems = (_damage_of_file(checkpoint / name, *expected) for name, expected in files.items())
    return next(filter(None, problems), None)


def _damage_of_file(path: Path, expected: str, size: int) -> str | None:
    """Describe how a file differs from its SHA-256 and size in bytes; None if it does not."""
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path.name} has {found:,} bytes, not {size:,}"
        if (digest := sha256(path)) != expected:
            return f"{path.name} has the SHA-256 {digest[:12]}…, not {expected[:12]}…"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None


def _files_of(manifest: dict[str, Any]) -> dict[str, tuple[str, int]] | None:
    """Return SHA-256 and size by file name; None if the manifest is malformed."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("size")) is int
        for entry in files.values()
    ):
        return None
    return {name: (entry["sha256"], entry["size"]) for name, entry in files.items()}


def newest_whole(run: Path, needs_best: bool, tell: Callable[[str], None]) -> Path | None:
    """Return the latest checkpoint from which training can resume.

    Args:
        needs_best: the run keeps its best checkpoint, so the best one so far must be complete too.
        tell: receives a line for each later checkpoint that is not used.
    """
    for checkpoint in checkpoints(run):
        problem = damage(checkpoint) or (damage_of_best(checkpoint) if needs_best else None)
        if problem is None:
            return checkpoint
        tell(f"{checkpoint.name} is not used: {problem}")
    return None


def damage_of_best(checkpoint: Path) -> str | None:
    """Describe what is wrong with the best checkpoint that `checkpoint` refers to; None if nothing is."""
    try:
        best = read_object(checkpoint / TRAINER_STATE, MAX_STATE_BYTES).get("best_global_step") or None
    except (OSError, ValueError) as error:
        return f"{TRAINER_STATE} cannot be read: {first_line(error)}"
    if best is None:  # nothing had been evaluated yet
        return None
    if type(best) is not int or not 0 < best <= step_of(checkpoint):
        return f"its {TRAINER_STATE} has an invalid best_global_step"
    problem = damage(checkpoint_path(checkpoint.parent, best))
    return problem and f"the best checkpoint before it, checkpoint-{best}, is incomplete: {problem}"


def rotate(run: Path, kept: int, needed: Iterable[Path]) -> None:
    """Remove all but the latest checkpoints.

    Call this only once the newest checkpoint is complete: the removed ones are the fallback until then.

    Args:
        kept: number of checkpoints to keep, at least one.
        needed: checkpoints that are kept in any case; they count towards `kept`.
    """
    found = checkpoints(run)
    stay = {*found[:1], *(path for path in needed if path in found)}
    for path in found:
        if len(stay) >= kept:
            break
        stay.add(path)
    _remove(path for path in found if path not in stay)


def discard_after(run: Path, step: int) -> None:
    """Remove the checkpoints after a step, which are no longer needed."""
    _remove(path for path in checkpoints(run) if step_of(path) > step)


def _remove(unneeded: Iterable[Path]) -> None:
    for path in unneeded:
        with suppress(OSError):  # a leftover takes space, but does no harm
            remove_directory(path)
