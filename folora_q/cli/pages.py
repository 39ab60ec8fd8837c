"""Shared by commands that write a page: check its target, write it, and print its location."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.markup import escape

from folora_q.cli.console import out, visible
from folora_q.errors import UserError
from folora_q.storage.files import atomic_write

# Present near the beginning of every page of ours.
OURS = b'name="generator" content="folora-q"'
BEGINNING = 2048


def check_target(path: Path) -> None:
    """Check whether a page may be written to a path.

    Raises:
        UserError: it is a folder, or an existing file that is not a folora-q page.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder", f"name a file in it: --output {path / 'report.html'}")
    with _writing(path):
        if path.exists():
            with path.open("rb") as file:
                if OURS not in file.read(BEGINNING):
                    raise UserError(f"{path} already exists and is not a folora-q page", "name another --output")


def write(path: Path, content: str | bytes) -> None:
    """Write a page or a figure atomically.

    Raises:
        UserError: it cannot be written.
    """
    with _writing(path):
        atomic_write(path, content)


def print_page(path: Path) -> None:
    """Print the path of a page, and a link that terminals open."""
    out.print(f"[bold]{escape(visible(str(path)))}[/]", soft_wrap=True)
    out.print(f"[cyan]{escape(path.resolve().as_uri())}[/]", soft_wrap=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "name another --output") from error
