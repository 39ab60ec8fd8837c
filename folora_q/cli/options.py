"""What commands share: a recipe with overrides."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import rich_click as click

from folora_q.recipe import load_recipe


def recipe_arguments(command: Callable[..., None]) -> Callable[..., None]:
    """RECIPE, overrides and --set; the command gets `path`, `overrides` and the checked `recipe`."""

    @click.argument(
        "path", metavar="RECIPE", type=click.Path(path_type=Path), help="A YAML file, e.g. recipes/demo.yaml."
    )
    @click.argument("overrides", nargs=-1, help="section.key=value, e.g. training.learning_rate=2e-4.")
    @click.option("--set", "more", multiple=True, metavar="KEY=VALUE", help="The same as an override; may be repeated.")
    @wraps(command)
    def with_recipe(*args: Any, path: Path, overrides: tuple[str, ...], more: tuple[str, ...], **kwargs: Any) -> None:
        given = (*overrides, *more)
        command(*args, path=path, overrides=given, recipe=load_recipe(path, given), **kwargs)

    return with_recipe
