"""Resolve where rows come from: a file, a folder, a glob, a URL for fsspec, or a hub dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

from folora_q.data.file_readers import READERS, Rows, read_file
from folora_q.data.files import DataFile
from folora_q.data.folders import Choice, choose, names_in
from folora_q.data.remote import Remote, file_name
from folora_q.data.rows import Row
from folora_q.data.saved_datasets import SPLITS, SavedDataset, read_splits
from folora_q.data.splits import TRAIN
from folora_q.errors import UserError, first_line
from folora_q.recipe.dataset import Source
from folora_q.recipe.paths import is_hub_dataset, is_remote, matching_files, matching_folders


@dataclass(frozen=True)
class Found:
    """What a source refers to on this machine; empty for a hub dataset.

    Attributes:
        parts: what is read, in order.
        unread: what is also there but not read, with the reason.
    """

    parts: Sequence[DataFile | SavedDataset] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)

    def files(self) -> dict[str, Path]:
        """Return every file that is read, by its name in messages."""
        files: dict[str, Path] = {}
        for part in self.parts:
            if isinstance(part, DataFile):
                files[part.name] = part.path
            else:
                files |= {f"{part.name}/{file.relative_to(part.path).as_posix()}": file for file in part.files()}
        return files


def read_source(source: Source, found: Found | None = None) -> Rows:
    """Yield the rows of a source in order; those that cannot be read come as RowErrors in their places.

    Args:
        found: what the source refers to, if that is known already.

    Raises:
        UserError: there is nothing to read, or it cannot be read at all.
    """
    if is_hub_dataset(source):
        yield from _read_hub(source)
        return
    for part in (found or find(source)).parts:
        rows = 0
        for row in read_file(part) if isinstance(part, DataFile) else part.rows():
            rows += 1
            yield row
        if not rows:
            raise UserError(f"{part.name} holds no rows")


def find(source: Source) -> Found:
    """Find what a source refers to; remote files are downloaded.

    Raises:
        UserError: nothing is there, it cannot be reached, or it is unclear which split is meant.
    """
    if is_hub_dataset(source):
        return Found()
    if source.name is not None or source.revision is not None:
        key = "name" if source.name is not None else "revision"
        raise UserError(f"`{key}` is for hub datasets, and {source.path} is not one", f"remove `{key}`")
    if is_remote(source.path):
        return _find_remote(source)
    path = Path(source.path)
    if not path.is_dir():
        _refuse_split(source)
    if path.is_file():
        return Found([DataFile(path, str(path))])
    if not path.is_dir():
        files = [DataFile(match, str(match)) for match in matching_files(path)]
        return Found(files, {f"{folder}/": "a folder: name it, or use **" for folder in matching_folders(path)})
    names, unread = names_in(path)
    splits = {parent: read_splits(path / parent / SPLITS) for parent in _parents_of(SPLITS, names)}
    choice = choose(str(path), names, splits, source.split)
    _require_data(f"the folder {path}", choice)
    files = [DataFile(path / name, str(path / name)) for name in choice.files]
    saved = [SavedDataset(path / name, str(path / name)) for name in choice.saved]
    return Found([*saved, *files], choice.unread | unread)


def _find_remote(source: Source) -> Found:
    remote = Remote(source.path)
    there = remote.names()
    if list(there) == [""] or remote.is_pattern:
        _refuse_split(source)
    if list(there) == [""]:
        return Found([DataFile(remote.fetch(there[""], file_name(source.path)), source.path)])

    def file(name: str) -> DataFile:
        return DataFile(remote.fetch(there[name], name), f"{remote.protocol}://{there[name]}")

    if remote.is_pattern:
        return Found([file(name) for name in there])
    around = f"{remote.protocol}://{remote.path}"
    splits = {
        parent: read_splits(remote.fetch(there[name], name))
        for parent in _parents_of(SPLITS, there)
        if (name := str(PurePosixPath(parent) / SPLITS))
    }
    choice = choose(source.path, there, splits, source.split)
    _require_data(source.path, choice)
    others = {*choice.files, *choice.unread}
    saved: list[SavedDataset] = []
    for folder in choice.saved:
        parts = [name for name in there if str(PurePosixPath(name).parent) == folder and name not in others]
        copies = [remote.fetch(there[name], name) for name in parts]
        saved.append(SavedDataset(copies[0].parent, around if folder == "." else f"{around}/{folder}"))
    return Found([*saved, *map(file, choice.files)], choice.unread)


def _refuse_split(source: Source) -> None:
    """Raise an error if a split of files is requested; earlier versions wrote `train` into every recipe."""
    if source.split not in (None, TRAIN):
        raise UserError(
            f"`split` is {source.split!r}, but {source.path} names files, not a dataset with splits",
            "remove it; `weight` or data.max_train_samples select a part of the rows",
        )


def _parents_of(name: str, names: Iterable[str]) -> list[str]:
    """Return the folders that contain a file of this name, relative to the source's folder."""
    return [str(PurePosixPath(each).parent) for each in names if PurePosixPath(each).name == name]


def _require_data(place: str, choice: Choice) -> None:
    if not choice.files and not choice.saved:
        there = ", ".join(sorted(choice.unread)[:5])
        raise UserError(
            f"{place} holds no data file",
            f"data files end in {', '.join(READERS)}" + (f"; it holds {there}" if there else ""),
        )


def _read_hub(source: Source) -> Iterator[Row]:
    import datasets

    split = source.split or TRAIN
    try:
        dataset = datasets.load_dataset(source.path, source.name, split=split, revision=source.revision)
        for number, values in enumerate(dataset, 1):
            yield Row(f"{source.path} ({split}) row {number}", cast("dict[str, Any]", values))
    except Exception as error:  # the hub client raises whatever its transport does
        reason = first_line(error)
        raise UserError(
            f"cannot load the dataset {source.path} from the hub, and no file or folder of that name is next to the "
            f"recipe: {reason}",
            "check the id, and `name` and `split` in the recipe's mapping; HF_HUB_OFFLINE must not be set",
        ) from error
