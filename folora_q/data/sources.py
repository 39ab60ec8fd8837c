"""Where rows come from: a file, a folder, a glob, or a dataset on a hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from folora_q.data.readers import READERS, Rows, read_file
from folora_q.data.rows import Row
from folora_q.errors import UserError, first_line
from folora_q.recipe.dataset import Source
from folora_q.recipe.paths import is_hub_dataset, matching_files

# In a folder these are data only where nothing else is: a README often lies beside the data.
PROSE = (".txt", ".md")


def read_source(source: Source) -> Rows:
    """The rows of a source in order; those that cannot be read come as RowErrors in their places.

    Raises:
        UserError: there is nothing to read, or it cannot be read at all.
    """
    if is_hub_dataset(source):
        yield from _read_hub(source)
        return
    for path in source_files(source):
        rows = 0
        for row in read_file(path):
            rows += 1
            yield row
        if not rows:
            raise UserError(f"{path} holds no rows")


def source_files(source: Source) -> list[Path]:
    """The files that a local source stands for, sorted; none for a hub dataset.

    Raises:
        UserError: there are none.
    """
    if is_hub_dataset(source):
        return []
    path = Path(source.path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        return matching_files(path)
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and file.suffix.lower() in READERS
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    tables = [file for file in files if file.suffix.lower() not in PROSE]
    if not files:
        raise UserError(f"the folder {path} holds no data file", f"data files end in {', '.join(READERS)}")
    return tables or files


def _read_hub(source: Source) -> Iterator[Row]:
    import datasets

    try:
        dataset = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
        for number, values in enumerate(dataset, 1):
            yield Row(f"{source.path} ({source.split}) row {number}", values)
    except Exception as error:  # the hub client raises whatever its transport does
        reason = first_line(error)
        raise UserError(
            f"cannot load the dataset {source.path} from the hub, and no file or folder of that name lies beside the "
            f"recipe: {reason}",
            "check the id, and `name` and `split` in the recipe's mapping; HF_HUB_OFFLINE must not be set",
        ) from error
