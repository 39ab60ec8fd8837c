"""Choose the files of a folder to read; no file is ignored without a reason."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from folora_q.data.file_readers import UNKNOWN_ENDING, unreadable
from folora_q.data.files import ending_of
from folora_q.data.saved_datasets import INFO, SPLITS, STATE, choose_split
from folora_q.data.splits import by_split, others

# In a folder these are data only if nothing else is: there is often a README next to the data.
PROSE = (".txt", ".md")
# Files that `datasets` writes next to .arrow files; they contain no rows.
ABOUT_ARROW = (STATE, INFO, SPLITS, "dataset_infos.json")


@dataclass
class Choice:
    """What is read from a folder; names are relative to it.

    Attributes:
        files: single files of rows, sorted.
        saved: folders that `save_to_disk` wrote, each a split; "." is the folder itself.
        unread: what is not read, and why.
    """

    files: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)


def names_in(folder: Path) -> tuple[list[str], dict[str, str]]:
    """List the files in a folder and its subfolders, and what is not searched, with the reason."""
    names: list[str] = []
    unread: dict[str, str] = {}

    def closed(error: OSError) -> None:
        unread[_relative(Path(os.fsdecode(error.filename)), folder) + "/"] = f"a folder: {error.strerror}"

    for place, folders, files in os.walk(folder, onerror=closed):
        here = Path(place)
        for name in list(folders):
            below = here / name
            reason = "hidden" if name.startswith(".") else "a link to a folder" if below.is_symlink() else None
            if reason is not None:
                folders.remove(name)
                unread[_relative(below, folder) + "/"] = reason
        for name in files:
            relative = _relative(here / name, folder)
            if (here / name).is_file():
                names.append(relative)
            else:
                unread[relative] = "not a file, or a broken link"
    return sorted(names), unread


def choose(name: str, names: Iterable[str], splits: dict[str, list[str]], wanted: str | None) -> Choice:
    """Choose what to read from a folder that contains these files.

    Args:
        name: what messages call the folder.
        names: relative to it.
        splits: the splits that each dataset_dict.json lists, by its folder.
        wanted: the split that the recipe names.

    Raises:
        UserError: it is unclear which split is meant.
    """
    known = set(names)
    saved = {folder for folder in map(_parent, known) if {_inside(folder, STATE), _inside(folder, INFO)} <= known}
    choice = Choice()
    for folder, found in splits.items():
        if there := [split for split in found if _inside(folder, split) in saved]:
            split = choose_split(name if folder == "." else f"{name}/{folder}", there, wanted)
            rest = sorted({_inside(folder, other) for other in there} - {_inside(folder, split)})
            choice.unread |= dict.fromkeys((f"{other}/" for other in rest), f"another split than {split}")
            saved -= set(rest)
            known = {each for each in known if not any(each.startswith(f"{other}/") for other in rest)}
    choice.saved = sorted(saved)
    with_arrow = {_parent(each) for each in known if each.endswith(".arrow")} | saved | set(splits)
    texts: list[str] = []
    for each in sorted(known):
        described = _parent(each) in with_arrow and PurePosixPath(each).name in ABOUT_ARROW
        if _parent(each) in {*saved, *splits} and (described or each.endswith(".arrow")):
            continue  # part of a saved dataset
        if (reason := _reason(each, described, known)) is not None:
            choice.unread[each] = reason
        else:
            (texts if ending_of(each)[0] in PROSE else choice.files).append(each)
    if not splits:
        passed = others(name, by_split([*choice.files, *choice.saved]), wanted)
        choice.files = [each for each in choice.files if each not in passed]
        choice.saved = [each for each in choice.saved if each not in passed]
        choice.unread |= passed
    if choice.files or choice.saved:
        choice.unread |= dict.fromkeys(texts, "a text file among tables")
    else:
        choice.files = texts
    return choice


def _reason(name: str, described: bool, known: set[str]) -> str | None:
    """Return why a single file is not read; None if it is."""
    if any(part.startswith(".") for part in PurePosixPath(name).parts):
        return "hidden"
    if described:
        return "it describes .arrow files"
    if (reason := unreadable(PurePosixPath(name).name)) is not None:
        return "not a data file, by its ending" if reason == UNKNOWN_ENDING else reason
    compression = ending_of(name)[1]
    if compression is not None and name[: -len(compression)] in known:
        return "its unpacked copy is next to it"
    return None


def _parent(name: str) -> str:
    return str(PurePosixPath(name).parent)


def _inside(folder: str, name: str) -> str:
    return str(PurePosixPath(folder) / name)


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
