"""Find the tasks that a model learned before: the recipes of the runs whose adapters a recipe builds on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from folora_q.errors import UserError, first_line
from folora_q.recipe import load_recipe
from folora_q.recipe.schema import ModelSection, Recipe
from folora_q.runs.folder import RunFolder

# Begins the display name of such a task.
EARLIER = "earlier task "
UNKNOWN = (
    "the data of the task that {name} learned is not known (model.adapter_data): the task is not measured, and only "
    "text that the base generates with the adapter protects it"
)


def earlier_recipes(section: ModelSection) -> tuple[list[tuple[str, Recipe]], list[str]]:
    """Return the recipes of all earlier tasks, the first task first, and warnings about adapters without one.

    Returns:
        (name, recipe) of each task, with names for display that are unique, and a warning for each adapter whose task
        is unknown.

    Raises:
        UserError: a recipe cannot be read.
    """
    found: list[tuple[str, Recipe]] = []
    unknown: list[str] = []
    seen: set[Path] = set()
    while section.adapter is not None and Path(section.adapter).resolve() not in seen:
        path = Path(section.adapter).resolve()
        seen.add(path)
        run = next((run for run in (RunFolder(path), RunFolder(path.parent)) if run.manifest.is_file()), None)
        recipe = None if run is None else _recipe_of(run)
        if section.adapter_data is not None:
            found.append((f"{EARLIER}{Path(section.adapter_data).stem}", load_recipe(Path(section.adapter_data))))
        elif recipe is not None:
            found.append((f"{EARLIER}{run.path.name if run else path.name}", recipe))
        else:
            unknown.append(UNKNOWN.format(name=section.adapter))
        if recipe is None:
            break
        section = recipe.model
    return with_unique_names(found[::-1]), unknown


def unknown_tasks(section: ModelSection) -> list[str]:
    """Return a warning for each earlier adapter whose task is not known."""
    return earlier_recipes(section)[1]


def unreadable_data(name: str, error: UserError) -> UserError:
    """Return the error for data of an earlier task that cannot be read."""
    return UserError(
        f"the data of the {name} cannot be read: {error.message}",
        "name a recipe with its data as model.adapter_data, or set proxy.earlier_share: 0",
    )


def with_unique_names(found: Sequence[tuple[str, Recipe]]) -> list[tuple[str, Recipe]]:
    """Number names that several tasks have."""
    names = [name for name, _ in found]
    return [
        (name if names.count(name) == 1 else f"{name} ({number})", recipe)
        for number, (name, recipe) in enumerate(found, 1)
    ]


def _recipe_of(run: RunFolder) -> Recipe | None:
    try:
        return run.read_recipe()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run.recipe} cannot be read: {first_line(error)}", "name a recipe with its data as model.adapter_data"
        ) from None
