"""Load all rows of a recipe: read, parsed, split and mixed. Needs neither a model nor PyTorch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from folora_q.data.examples import Example, Text, content_of
from folora_q.data.formats import detect_format, to_example
from folora_q.data.rows import ErrorPolicy, RowError
from folora_q.data.sources import find, read_source
from folora_q.data.unused import filled_columns, unused_columns
from folora_q.errors import UserError
from folora_q.recipe.dataset import DataSection, FormatName, Source
from folora_q.recipe.objectives import ObjectiveName
from folora_q.recipe.paths import is_hub_dataset

# The maximum number of files or columns that a line names; run.json has all files.
MAX_NAMED = 10


@dataclass(frozen=True)
class SourceFacts:
    """Facts about the rows of one source.

    Attributes:
        path: as in the recipe.
        shape: the format of its rows, under the name that it has in recipes and in run.json.
        rows: the number of usable rows.
        read: the number of rows read.
        unread: files in its folder that are not read, with the reason.
        unused: columns that hold something which no example uses.
    """

    path: str
    shape: FormatName
    rows: int
    read: int
    unread: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """Remarks about files that are not read, by reason, and columns that are not used."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.unread.items():
            by_reason.setdefault(reason, []).append(name)
        remarks = []
        if by_reason:
            parts = (f"{_some(names)} ({reason})" for reason, names in by_reason.items())
            remarks.append(f"not read: {'; '.join(parts)}")
        if self.unused:
            remarks.append(f"columns not used: {_some([name[:40] for name in self.unused])}")
        return remarks


@dataclass(frozen=True)
class TaskData:
    """The task's examples.

    Attributes:
        train: in the order of the sources, each example as often as its source's weight says.
        heldout: from the eval_dataset, or held out from the sources; no row of it is in `train`.
        facts: by source, training before evaluation.
        skipped: rows that could not be used (`data.on_error: skip`).
        repeated: the number of held-out examples that are also in `train`, since the files repeat them.
    """

    train: list[Example]
    heldout: list[Example]
    facts: list[SourceFacts]
    skipped: list[RowError] = field(default_factory=list)
    repeated: int = 0


def read_task_data(section: DataSection, seed: int, objective: ObjectiveName = "sft") -> TaskData:
    """Read, hold out, weight and sample rows; every random choice depends on `seed`.

    Args:
        objective: `training.objective`, which determines the formats that rows may have.

    Raises:
        UserError: a source cannot be read, a row cannot be used (unless `on_error: skip`), or nothing is left.
    """
    error_policy: ErrorPolicy = ErrorPolicy(section.on_error == "skip")
    facts: list[SourceFacts] = []
    heldout: list[Example] = []
    train: list[Example] = []
    for number, source in enumerate(section.train_dataset):
        examples = _read(source, error_policy, facts, objective)
        chooser = random.Random(f"{seed} {number}")
        if section.eval_dataset is None:
            size = share_of(section.eval_size, number, len(section.train_dataset))
            examples, held = _hold_out(examples, size, chooser, source)
            heldout += held
        train += _weighted(examples, source.weight, chooser)
    for source in section.eval_dataset or []:
        heldout += _read(source, error_policy, facts, objective)
    train = _at_most(train, section.max_train_samples, seed)
    heldout = _at_most(heldout, section.max_eval_samples, seed)
    if not train:
        raise UserError("no training row is left", "check `weight` and `on_error` in the recipe's data section")
    known = {content_of(example) for example in train}
    repeated = sum(content_of(example) in known for example in heldout)
    return TaskData(train, heldout, facts, error_policy.skipped, repeated)


def examine(source: Source, rows: int | None, on_error: str, objective: ObjectiveName = "sft") -> SourceFacts:
    """Return the facts about a source, from its first rows, or from all if `rows` is None.

    Raises:
        UserError: as `read_task_data`, as far as these rows show it.
    """
    facts: list[SourceFacts] = []
    _read(source, ErrorPolicy(on_error == "skip"), facts, objective, rows)
    return facts[0]


def first_examples(source: Source, rows: int | None, on_error: str, objective: ObjectiveName = "sft") -> list[Example]:
    """Return the examples from a source's first rows, or from all rows with None.

    Raises:
        UserError: as `examine`.
    """
    return _read(source, ErrorPolicy(on_error == "skip"), [], objective, rows)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _read(
    source: Source,
    error_policy: ErrorPolicy,
    facts: list[SourceFacts],
    objective: ObjectiveName,
    most: int | None = None,
) -> list[Example]:
    found: list[FormatName] = []
    columns: set[str] = set()
    filled: set[str] = set()
    skipped_before = len(error_policy.skipped)
    there = find(source)
    if not there.parts and not there.unread and not is_hub_dataset(source):  # moved since the recipe was loaded
        raise UserError(f"no file at {source.path}")

    def examples() -> Iterator[Example | RowError]:
        for row in error_policy.pass_on(islice(read_source(source, there), most)):
            columns.update(row.values)
            try:
                name = detect_format(row, source, objective)
                if found and name != found[0]:
                    raise RowError(
                        row.where, f"its columns are those of `{name}`, but the rows before it are `{found[0]}`"
                    )
                example = to_example(row, name, source)
                found[:] = [name]
                filled.update(filled_columns(row, name, source))
                yield example
            except RowError as error:
                yield error

    usable = list(error_policy.pass_on(examples()))
    skipped = error_policy.skipped[skipped_before:]
    if not usable:
        raise UserError(
            f"no row of {source.path} can be used; the first: {skipped[0].message}"
            if skipped
            else f"{source.path} holds no rows"
        )
    mapped = [column for name, column in source.fields.items() if name not in ("role", "content")]
    if unknown := [column for column in mapped if column not in columns]:
        raise UserError(
            f"no row of {source.path} has the column `{unknown[0][:40]}`, which `fields` names",
            f"its columns are {', '.join(sorted(columns)[:8])}",
        )
    unused = tuple(unused_columns(filled, found[0], source))
    read = len(usable) + len(skipped)
    facts.append(SourceFacts(source.path, found[0], len(usable), read, there.unread, unused))
    return usable


def share_of(size: float, number: int, sources: int) -> float:
    """Return what one of several sources holds out: the same share, or its part of a number of rows."""
    return size if size < 1 else size // sources + (number < size % sources)


def require_left(rows: int, size: float, path: str) -> int:
    """Return how many of a source's rows are held out.

    Raises:
        UserError: none would be left to train on.
    """
    count = max(1, round(rows * size)) if 0 < size < 1 else int(size)
    if count >= rows:
        raise UserError(
            f"{Path(path).name} has {rows} row{'s' * (rows != 1)}: too few to hold {count} out for evaluation",
            "name a data.eval_dataset, or set a smaller data.eval_size",
        )
    return count


def _hold_out(
    examples: list[Example], size: float, chooser: random.Random, source: Source
) -> tuple[list[Example], list[Example]]:
    """Hold out a random share or number of one source's rows; both parts keep their order."""
    if len(examples) == 1 and isinstance(examples[0], Text) and 0 < size < 1:
        return _cut_in_two(examples[0], size)
    count = require_left(len(examples), size, source.path)
    held = set(chooser.sample(range(len(examples)), count))
    return (
        [example for index, example in enumerate(examples) if index not in held],
        [example for index, example in enumerate(examples) if index in held],
    )


def _cut_in_two(document: Text, share: float) -> tuple[list[Example], list[Example]]:
    """Hold out the end of a single document, from the start of a line."""
    place = document.text.find("\n", int(len(document.text) * (1 - share))) + 1
    if not document.text[place:].strip() or not document.text[:place].strip():
        raise UserError(f"{document.where} is too short to hold its end out", "name a data.eval_dataset")
    return [replace(document, text=document.text[:place])], [replace(document, text=document.text[place:])]


def _weighted(examples: list[Example], weight: float, chooser: random.Random) -> list[Example]:
    """Return every example floor(weight) times, and a random part of them once more."""
    whole, part = divmod(weight, 1)
    more = sorted(chooser.sample(range(len(examples)), round(len(examples) * part)))
    return examples * int(whole) + [examples[index] for index in more]


def _at_most(examples: list[Example], count: int | None, seed: int) -> list[Example]:
    if count is None or count >= len(examples):
        return examples
    return [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), count))]
