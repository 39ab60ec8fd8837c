"""Options that commands share: a recipe with overrides, and what a model is trusted to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import rich_click as click
from rich.markup import escape

from folora_q.cli.console import err
from folora_q.models.trust import CODE_FLAG, PICKLE_FLAG, Trust
from folora_q.recipe import load_recipe
from folora_q.recipe.shipped import recipe_file


def recipe_arguments(command: Callable[..., None], with_data: bool = True) -> Callable[..., None]:
    """Add RECIPE, overrides and --set; the command receives `path`, `overrides` and the validated `recipe`.

    Args:
        with_data: the files of data and text must exist.
    """

    @click.argument(
        "path",
        metavar="RECIPE",
        type=click.Path(path_type=Path),
        help="A YAML file, or the name of a shipped recipe, e.g. demo.",
    )
    @click.argument("overrides", nargs=-1, help="section.key=value, e.g. training.learning_rate=2e-4.")
    @click.option("--set", "more", multiple=True, metavar="KEY=VALUE", help="Same as an override; can be repeated.")
    @wraps(command)
    def with_recipe(*args: Any, path: Path, overrides: tuple[str, ...], more: tuple[str, ...], **kwargs: Any) -> None:
        given = (*overrides, *more)
        if (file := recipe_file(path)) != path:
            err.print(f"[dim]recipe: {escape(str(file))}[/]", soft_wrap=True)
        command(*args, path=path, overrides=given, recipe=load_recipe(path, given, with_data), **kwargs)

    return with_recipe


CODE_OPTION = click.option(
    CODE_FLAG, "remote_code", is_flag=True, help="Run the Python code that comes with a model. Read it first."
)


def code_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add --trust-remote-code, for a command that loads no weights; it receives `trust`."""

    @CODE_OPTION
    @wraps(command)
    def with_trust(*args: Any, remote_code: bool, **kwargs: Any) -> None:
        command(*args, trust=Trust(remote_code), **kwargs)

    return with_trust


def trust_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --trust-remote-code and --allow-pickle; the command receives `trust`."""

    @CODE_OPTION
    @click.option(PICKLE_FLAG, "pickle", is_flag=True, help="Load pickled weights (.bin); only their tensors are read.")
    @wraps(command)
    def with_trust(*args: Any, remote_code: bool, pickle: bool, **kwargs: Any) -> None:
        command(*args, trust=Trust(remote_code, pickle), **kwargs)

    return with_trust
