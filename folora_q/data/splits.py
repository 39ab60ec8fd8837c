"""Find a dataset's splits by file names, as `datasets` defines them: train.jsonl, data/test-00000.parquet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from folora_q.errors import UserError

TRAIN = "train"
WORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}


def by_split(names: Iterable[str]) -> dict[str, str | None]:
    """Return the split of each file or folder, by the words in its path; None if they name none or several."""
    found: dict[str, str | None] = {}
    for name in names:
        words = {word for part in PurePosixPath(name.lower()).parts for word in re.split("[^a-z]+", part)}
        splits = {SPLIT_OF[word] for word in words & SPLIT_OF.keys()}
        found[name] = splits.pop() if len(splits) == 1 else None
    return found


def others(place: str, splits: Mapping[str, str | None], wanted: str | None) -> dict[str, str]:
    """Return what is not read because it belongs to another split, with the reason.

    Without a wanted split, that is the validation and test data next to training data.

    Args:
        place: the folder, for the error.
        splits: the result of `by_split`.

    Raises:
        UserError: there is no such split.
    """
    there = {split for split in splits.values() if split is not None}
    if wanted is None or (wanted == TRAIN and TRAIN not in there):
        if not {TRAIN} < there:
            return {}
        return {name: f"another split than {TRAIN}" for name, split in splits.items() if split not in (None, TRAIN)}
    split = SPLIT_OF.get(wanted, wanted)
    if split not in there:
        listed = ", ".join(sorted(there)) or "none by the names of its files"
        raise UserError(
            f"{place} has no split {wanted[:60]!r}: it has {listed}", "set `split` of this source to one of them"
        )
    return {name: f"another split than {split}" for name, found in splits.items() if found != split}
