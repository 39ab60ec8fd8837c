"""`folora-q init`: write a first recipe from a few questions or options."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast, get_args

import rich_click as click
from rich.markup import escape

from folora_q.cli.console import err, out, print_error, visible
from folora_q.data.column_guess import Guess, fields_given
from folora_q.data.first_look import FirstLook, columns_of, guess_for, look_at
from folora_q.data.formats import FORMATS
from folora_q.errors import UserError
from folora_q.recipe.dataset import FieldName, FormatName, Source
from folora_q.recipe.json_schema import json_schema
from folora_q.recipe.model_name import find_model
from folora_q.recipe.new import Answers, Card, new_recipe
from folora_q.recipe.paths import NotFoundError, is_hub_dataset
from folora_q.recipe.resolve import find_data
from folora_q.recipe.run_length import Amount
from folora_q.recipe.shipped import SCHEMA_FILE
from folora_q.runs.folder import check_run_folder
from folora_q.storage.files import atomic_write

MODEL = "Qwen/Qwen2.5-7B-Instruct"
CARDS = get_args(Card)
SIZE = re.compile(r"(\d+)(?:\.\d+)?\s*(?:g|gb|gib)?", re.IGNORECASE)
NONE = "-"
Value = TypeVar("Value")


@dataclass(frozen=True)
class Data:
    """The user's data.

    Attributes:
        path: as the recipe names it, relative to its folder.
        look: None for a hub dataset, which is not downloaded.
    """

    path: str
    format: FormatName
    guess: Guess | None = None
    look: FirstLook | None = None

    @property
    def amount(self) -> Amount:
        if self.look is None:
            return Amount()
        return Amount(self.look.rows, self.look.all_counted, self.look.characters)


@click.command("init")
@click.argument("path", default="recipe.yaml", type=click.Path(path_type=Path), help="The file to write.")
@click.option("--model", help=f"A hub id, a folder or a .gguf file, e.g. {MODEL}.")
@click.option("--data", help="Training data: a file, a folder, a glob, a URL or a hub id.")
@click.option(
    "--field",
    "given_fields",
    multiple=True,
    metavar="OURS=THEIRS",
    help="A column under another name, e.g. instruction=question; can be repeated. Default: guessed.",
)
@click.option("--gpu", metavar="|".join(CARDS), help="Memory of the GPU in GB, or cpu.")
@click.option("--output-dir", help="The run folder.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def command(
    path: Path,
    model: str | None,
    data: str | None,
    given_fields: tuple[str, ...],
    gpu: str | None,
    output_dir: str | None,
    overwrite: bool,
) -> None:
    """Write a first recipe for your data, with a comment on every line. Asks for what no option gives."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} already exists", "add --overwrite, or name another file")
    fields = _fields(given_fields)
    asked = _Question("Your data (file, folder, glob or hub id)", None, "--data")
    found = _answer(asked, data, lambda text: _data(text, path.parent, fields))
    name = _answer(_Question("Model", MODEL, "--model"), model, lambda text: _model(text, path.parent))
    card = _answer(_Question("Memory of your GPU in GB, or cpu", _card_here(), "--gpu"), gpu, _card)
    folder = _answer(_Question("Run folder", f"runs/{path.stem}", "--output-dir"), output_dir, _run_folder)
    mapped = {} if found.guess is None else {str(ours): theirs for ours, theirs in found.guess.fields.items()}
    answers = Answers(name, found.path, found.format, card, folder, found.amount, mapped)
    try:
        atomic_write(path, new_recipe(answers))
        atomic_write(path.parent / SCHEMA_FILE, json_schema())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    _print_written(path, found, answers)


def _print_written(path: Path, data: Data, answers: Answers) -> None:
    rows = f"rows of `{data.format}`" if data.guess is None else data.guess.words
    out.print(f"[green]✓[/] {escape(str(path))}  [dim]({escape(visible(rows))})[/]", soft_wrap=True)
    out.print(
        f"[green]✓[/] {escape(str(path.parent / SCHEMA_FILE))}  [dim](editors complete from it)[/]", soft_wrap=True
    )
    out.print(f"  {escape(answers.length.note)}", soft_wrap=True)
    if data.look is not None and data.look.unusable:
        unusable = f"{data.look.unusable:,} further rows cannot be used: folora-q validate --all-rows names the first"
        out.print(f"  [yellow]warning[/] {unusable}", soft_wrap=True)
    out.print("\n[bold]Next[/]")
    for verb in ("validate", "preview", "train"):
        out.print(f"  [cyan]folora-q {verb} {escape(shlex.quote(str(path)))}[/]", soft_wrap=True)


@dataclass(frozen=True)
class _Question:
    """A question, its default answer, and the option that answers it without a terminal."""

    text: str
    default: str | None
    flag: str


def _answer(question: _Question, given: str | None, read: Callable[[str], Value]) -> Value:
    """Return the value of an option or of an answer; in a terminal, repeat the question until an answer can be used."""
    if given is not None:
        return read(given)
    if not sys.stdin.isatty():
        if question.default is None:
            raise UserError(f"{question.flag} is required without a terminal", "pass it as an option")
        return read(question.default)
    while True:
        text = click.prompt(question.text, default=question.default, err=True)
        try:
            return read(text.strip())
        except UserError as error:
            print_error(error.message, error.hint)


def _fields(given: tuple[str, ...]) -> dict[FieldName, str]:
    known = get_args(FieldName)
    fields: dict[FieldName, str] = {}
    for pair in given:
        ours, equals, theirs = pair.partition("=")
        if not equals or ours not in known or not theirs:
            example = f"instruction=question; our names are {', '.join(known)}"
            raise UserError(f"cannot read --field {pair!r}", f"write OURS=THEIRS, e.g. {example}")
        fields[cast(FieldName, ours)] = theirs
    return fields


def _data(text: str, folder: Path, fields: dict[FieldName, str]) -> Data:
    """Look at the data: which format, which columns, how many rows."""
    try:
        place = find_data(Path.cwd(), text)
    except NotFoundError as error:
        raise UserError(error.reason, error.hint) from None
    source = Source(path=place, fields=fields)
    guess = fields_given(fields) if fields else None
    if is_hub_dataset(source):
        return Data(place, "messages" if guess is None else guess.format, guess)
    if guess is None and (guess := guess_for(source)) is not None:
        guess = _settled(guess, source)
        source = source.model_copy(update={"fields": guess.fields})
    look = look_at(source, FORMATS[guess.format].objective if guess is not None else "sft")
    local = Path(os.path.relpath(place, folder.resolve())).as_posix() if Path(place).is_absolute() else place
    return Data(local, look.format, guess, look)


def _settled(guess: Guess, source: Source) -> Guess:
    """Return the guess if it is sure or the user agrees, else what the user says."""
    columns = columns_of(source)
    if not sys.stdin.isatty():
        if guess.sure:
            return guess
        fields = " ".join(shlex.quote(f"--field={ours}={theirs}") for ours, theirs in guess.fields.items())
        raise UserError(
            f"the columns of {source.path} could be meant in several ways: {', '.join(columns)[:200]}",
            f"is it that {guess.words}? then add {fields}",
        )
    err.print(f"  [dim]columns: {escape(visible(', '.join(columns)[:200]))}[/]", soft_wrap=True)
    if guess.sure:
        err.print(f"  {escape(visible(guess.words))}", soft_wrap=True)
        return guess
    if click.confirm(f"Is it right that {guess.words}?", default=True, err=True):
        return guess
    kind = click.Choice([*columns, NONE])
    asked = click.prompt(f"Column with the question ({NONE} for none: plain text)", type=kind, err=True)
    answered = click.prompt("Column with the answer" if asked != NONE else "Column with the text", type=kind, err=True)
    if NONE in (answered, asked) and answered == NONE:
        raise UserError("no column is left to learn", "name the column with the answer, or with the text")
    return fields_given({"text": answered} if asked == NONE else {"instruction": asked, "output": answered})


def _model(text: str, folder: Path) -> str:
    """Return the model as the recipe names it: relative to the recipe's folder if it is here."""
    try:
        found = find_model(Path.cwd(), text)
    except NotFoundError as error:
        raise UserError(error.reason, error.hint) from None
    return found if found == text else Path(os.path.relpath(found, folder.resolve())).as_posix()


def _run_folder(text: str) -> str:
    check_run_folder(Path(text).expanduser(), overwrite=True)
    return text


def _card(text: str) -> Card:
    """Return the size of a card, which may be written as 12, 12GB or 12 gb: the largest known one that it holds."""
    sizes = [int(card) for card in CARDS if card.isdecimal()]
    if text.lower() == "cpu":
        return "cpu"
    found = SIZE.fullmatch(text)
    if found is None:
        raise UserError(f"{text!r} is not a memory size", f"give a number of GB such as {sizes[1]}, or cpu")
    fitting = [size for size in sizes if size <= int(found[1])]
    if not fitting:
        hint = f"give {min(sizes)} or more, or cpu; `folora-q estimate` says what a run needs"
        raise UserError(f"{text} is less than {min(sizes)} GB, the smallest card that recipes are written for", hint)
    return cast(Card, str(max(fitting)))


def _card_here() -> Card:
    """Return the card's memory from the driver, rounded down to a size with recipes; 8 if unknown."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "8"
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        megabytes = int(subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split()[0])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return "8"
    # Drivers report slightly less than the nominal size, e.g. 8,188 MiB for 8 GB.
    return cast(Card, next((card for card in ("24", "16", "12") if megabytes >= int(card) * 1000), "8"))
