"""`folora-q init`: write a first recipe from a few questions or options."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import cast, get_args

import rich_click as click
from rich.markup import escape

from folora_q.cli.console import out
from folora_q.data.loading import examine
from folora_q.errors import UserError
from folora_q.recipe.dataset import FormatName, Source
from folora_q.recipe.json_schema import json_schema
from folora_q.recipe.new import Answers, Card, new_recipe
from folora_q.recipe.paths import HUB_ID, is_remote
from folora_q.recipe.shipped import SCHEMA_FILE
from folora_q.storage.files import atomic_write

MODEL = "Qwen/Qwen2.5-7B-Instruct"
CARDS = get_args(Card)
FIRST_ROWS = 100


@click.command("init")
@click.argument("path", default="recipe.yaml", type=click.Path(path_type=Path), help="The file to write.")
@click.option("--model", help=f"A hub id, a folder or a .gguf file, e.g. {MODEL}.")
@click.option("--data", help="Training data: a file, a folder, a glob, a URL or a hub id.")
@click.option("--gpu", type=click.Choice(CARDS), help="Memory of the GPU in GB, or cpu.")
@click.option("--output-dir", help="The run folder.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def command(
    path: Path, model: str | None, data: str | None, gpu: Card | None, output_dir: str | None, overwrite: bool
) -> None:
    """Write a first recipe for your data, with a comment on every line. Asks for what no option gives."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} already exists", "add --overwrite, or name another file")
    data = data or _ask("Your data (file, folder, glob or hub id)", None, "--data")
    format_name, written = _look_at(data, path.parent)
    model = model or _ask("Model", MODEL, "--model")
    gpu = gpu or cast(Card, _ask("Memory of your GPU in GB, or cpu", _card(), "--gpu", click.Choice(CARDS)))
    output_dir = output_dir or _ask("Run folder", f"runs/{path.stem}", "--output-dir")
    recipe = new_recipe(Answers(model, written, format_name, gpu, output_dir))
    try:
        atomic_write(path, recipe)
        atomic_write(path.parent / SCHEMA_FILE, json_schema())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    out.print(f"[green]✓[/] {escape(str(path))}  [dim](rows of `{format_name}`)[/]", soft_wrap=True)
    out.print(
        f"[green]✓[/] {escape(str(path.parent / SCHEMA_FILE))}  [dim](editors complete from it)[/]", soft_wrap=True
    )
    out.print("\n[bold]Next[/]")
    for verb in ("validate", "preview", "train"):
        out.print(f"  [cyan]folora-q {verb} {escape(shlex.quote(str(path)))}[/]", soft_wrap=True)


def _look_at(data: str, folder: Path) -> tuple[FormatName, str]:
    """Return the format of the rows, and the path relative to the recipe's folder."""
    if is_remote(data):
        return examine(Source(path=data), FIRST_ROWS, "raise").shape, data
    path = Path(data).expanduser().resolve()
    if not path.exists() and HUB_ID.fullmatch(data):
        return "messages", data
    facts = examine(Source(path=str(path)), FIRST_ROWS, "raise")
    return facts.shape, Path(os.path.relpath(path, folder.resolve())).as_posix()


def _ask(question: str, default: str | None, flag: str, kind: click.ParamType | None = None) -> str:
    if not sys.stdin.isatty():
        if default is None:
            raise UserError(f"{flag} is required without a terminal", "pass it as an option")
        return default
    return click.prompt(question, default=default, type=kind, err=True)


def _card() -> Card:
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
