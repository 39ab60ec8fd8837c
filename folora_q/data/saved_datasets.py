"""Read folders that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from folora_q.data.rows import Row
from folora_q.errors import UserError, first_line
from folora_q.storage.untrusted import read_object

# Files that `save_to_disk` writes next to the .arrow files of a dataset, and around several datasets.
STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


@dataclass(frozen=True)
class SavedDataset:
    """One saved split.

    Attributes:
        path: its folder.
        name: what messages call it.
    """

    path: Path
    name: str

    def rows(self) -> Iterator[Row]:
        """Yield the rows, in order.

        Raises:
            UserError: it is damaged.
        """
        import datasets

        try:
            named = [entry["filename"] for entry in read_object(self.path / STATE)["_data_files"]]
            if outside := [name for name in named if name != Path(name).name]:
                raise ValueError(f"{STATE} names a file outside of it: {outside[0][:100]}")
            if not named:
                return  # `datasets` saves an empty dataset, but cannot load it
            dataset = datasets.Dataset.load_from_disk(str(self.path))
            dataset = dataset.with_format(None)  # it may have been saved as tensors
            dataset.data.table.validate(full=True)  # arrow trusts offsets, also those that point outside of its memory
            for number, values in enumerate(dataset, 1):
                yield Row(f"{self.name} row {number}", dict(values))
        except Exception as error:  # arrow, JSON and the file system each raise their own
            raise UserError(
                f"{self.name} is not a saved dataset that can be read: {first_line(error)}",
                "save it again with `save_to_disk`, or write it with `to_json` or `to_parquet`",
            ) from error

    def files(self) -> list[Path]:
        """List its files."""
        return sorted(file for file in self.path.rglob("*") if file.is_file())


def read_splits(path: Path) -> list[str]:
    """Return the splits that a dataset_dict.json lists.

    Raises:
        UserError: it cannot be read.
    """
    try:
        splits = read_object(path).get("splits")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    return [split for split in splits if isinstance(split, str)] if isinstance(splits, list) else []


def choose_split(name: str, splits: list[str], wanted: str | None) -> str:
    """Choose among splits that were saved together: the one that is wanted, else train, else the only one.

    Raises:
        UserError: no split has that name, or none is wanted and it is unclear which one to read.
    """
    listed = ", ".join(splits) or "none"
    if wanted is not None:
        if wanted in splits:
            return wanted
        raise UserError(
            f"{name} has no split {wanted[:60]!r}: it has {listed}", "set `split` of this source to one of them"
        )
    if len(splits) == 1:
        return splits[0]
    if "train" in splits:
        return "train"
    raise UserError(f"{name} has the splits {listed}", "set `split` of this source to the one to read")
