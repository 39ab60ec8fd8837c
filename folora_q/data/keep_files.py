"""Read the user's files of prompts and texts to keep (`keep.files`). No PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from folora_q.data.capability_prompts import Ask
from folora_q.data.file_readers import read_file
from folora_q.data.files import DataFile
from folora_q.data.rows import Row, RowError
from folora_q.data.tools import parse_tools
from folora_q.data.turns import parse_turns
from folora_q.errors import UserError
from folora_q.recipe.capabilities import MIN_HELD_OUT, as_capability
from folora_q.recipe.dataset import Source

ROWS = 'each row has a `prompt`, `messages`, or a `text`, e.g. {"prompt": "How do I reset my router?"}'


@dataclass(frozen=True)
class KeepFile:
    """Content of a file: prompts, or texts.

    Attributes:
        name: for tables.
    """

    name: str
    prompts: list[Ask]
    texts: list[str]


def read_keep_files(paths: list[str]) -> list[KeepFile]:
    """Read files of prompts or texts; each has a unique name.

    Raises:
        UserError: a file cannot be read, a row is neither, or there are too few prompts.
    """
    stems = [Path(path).stem for path in paths]
    return [
        read_keep_file(Path(path), stem if stems.count(stem) == 1 and as_capability(stem) is None else path)
        for path, stem in zip(paths, stems, strict=True)
    ]


def read_keep_file(path: Path, name: str) -> KeepFile:
    """Read a file of prompts or texts.

    Raises:
        UserError: as `read_keep_files`.
    """
    prompts: list[Ask] = []
    texts: list[str] = []
    for row in read_file(DataFile(path, str(path))):
        if isinstance(row, RowError):
            raise UserError(f"keep.files: {row.where}: {row.reason}", ROWS)
        try:
            found = _parsed(row)
        except RowError as error:
            raise UserError(f"keep.files: {error.where}: {error.reason}", ROWS) from None
        if isinstance(found, str):
            texts.append(found)
        else:
            prompts.append(found)
        if prompts and texts:
            raise UserError(f"keep.files: {row.where}: {path} holds both prompts and texts", "make two files of it")
    if not texts and len(prompts) < 2 * MIN_HELD_OUT:
        raise UserError(
            f"keep.files: {path} has {len(prompts)} prompts, and every second one is held out: at least "
            f"{2 * MIN_HELD_OUT} are needed",
            "add prompts",
        )
    return KeepFile(name, prompts, texts)


def _parsed(row: Row) -> Ask | str:
    """Return the prompt or the text of a row.

    Raises:
        RowError: it has neither.
    """
    values, where = row.values, row.where
    for key in ("messages", "prompt"):
        value = values.get(key)
        if key == "prompt" and isinstance(value, str) and value.strip():
            return Ask([{"role": "user", "content": value}], parse_tools(values.get("tools"), where, "tools"))
        if isinstance(value, list):
            turns = [turn.message for turn in parse_turns(value, Source(path=where), where, key)]
            while turns and turns[-1]["role"] == "assistant":  # the base writes its own answer
                turns.pop()
            if not turns:
                raise RowError(where, f"`{key}` has no turn before the assistant's")
            return Ask(turns, parse_tools(values.get("tools"), where, "tools"))
    if isinstance(text := values.get("text"), str) and text.strip():
        return text
    raise RowError(where, "it has no prompt and no text")
