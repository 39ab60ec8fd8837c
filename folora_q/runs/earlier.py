"""The run that a folder holds already: where it is, whether it can be resumed, and what to do with it otherwise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from folora_q.errors import UserError, first_line
from folora_q.runs.folder import RunFolder
from folora_q.runs.lock import NAME as LOCK
from folora_q.storage.untrusted import read_object

# The objects of run.json that are read, and the types of their values.
OBJECTS, SCALARS = ("model", "data_sha256", "versions", "computing", "files_sha256"), (str, int, float, type(None))


def find_run(output_dir: str, recipe: Path | None) -> Path:
    """Return the folder of the run to resume: `training.output_dir` from where the run was probably started.

    That is the working directory or, if nothing is there, the recipe's folder or the nearest one above it.

    Args:
        recipe: the file that names the folder; None looks in the working directory only.

    Raises:
        UserError: there is no run; the message says where it was looked for.
    """
    given = Path(output_dir)
    if _is_begun(given):
        return given
    folders = () if recipe is None or given.is_absolute() else Path(os.path.abspath(recipe)).parents
    above = [folder / given for folder in folders]
    for place in above:
        if _is_begun(place):
            return place
    raise nothing_to_resume(given, *above[:1])


def require_run(folder: Path) -> None:
    """Check that a folder holds a run to resume, also one that was killed before its first file.

    Raises:
        UserError: it does not.
    """
    if not _is_begun(folder):
        raise nothing_to_resume(folder)


def nothing_to_resume(*folders: Path) -> UserError:
    """Return the error for --resume where no run was started."""
    places = " or ".join(dict.fromkeys(os.path.abspath(folder) for folder in folders))
    hint = "start one without --resume, or name its folder with training.output_dir=FOLDER"
    return UserError(f"there is no run to resume in {places}", hint)


def read_earlier(folder: RunFolder) -> dict[str, Any] | None:
    """Read run.json of a run that can be resumed; None if there is none.

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
            "`folora-q report` shows it; to train again, replace --resume with --overwrite",
        )
    return earlier


def _is_begun(folder: Path) -> bool:
    """Return whether a run was started in a folder; one that was killed at once leaves only its lock."""
    return RunFolder(folder).manifest.is_file() or (folder / LOCK).is_file()


def _check(earlier: dict[str, Any]) -> None:
    """Check the types of the values in run.json that are used here.

    Raises:
        ValueError: a type is wrong; the message is the end of a sentence.
    """
    if not isinstance(earlier.get("status"), str):
        raise ValueError("it has no status")
    for key in OBJECTS:
        found = earlier.get(key, {})
        if not isinstance(found, dict) or not all(isinstance(value, SCALARS) for value in found.values()):
            raise ValueError(f"its {key} is not an object of texts and numbers")
    if not isinstance(earlier.get("resumed", []), list):
        raise ValueError("its resumed is not a list")
