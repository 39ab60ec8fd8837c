"""Check the run folder and the base model, for `validate`, `estimate` and `train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from folora_q.cli.console import err, starting
from folora_q.distributed.launch import rank
from folora_q.preflight.model import Examined, examine_model
from folora_q.recipe import Recipe, places_in
from folora_q.recipe.load import OVERRIDE
from folora_q.recipe.shipped import recipe_file
from folora_q.recipe.target_modules import Modules
from folora_q.runs.earlier import find_run, read_earlier
from folora_q.runs.folder import RunFolder, check_run_folder
from folora_q.runs.lock import require_unlocked


def placed(recipe: Recipe, path: Path, overrides: Sequence[str], resume: bool, overwrite: bool) -> Recipe:
    """Check the run folder without importing anything heavy, and return the recipe with the folder to resume in.

    Raises:
        UserError: there is no run to resume, a run already exists, or another process writes in the folder.
    """
    folder = Path(recipe.training.output_dir)
    if resume:
        given_here = places_in(path, overrides)(("training", "output_dir")).startswith(OVERRIDE)
        folder = find_run(str(folder), None if given_here else recipe_file(path))
        if folder != Path(recipe.training.output_dir):
            err.print(f"[dim]resuming the run in {escape(str(folder))}[/]", soft_wrap=True)
    if rank() == 0:  # which may hold the lock before another of its processes comes here
        require_unlocked(folder)
        if resume:
            read_earlier(RunFolder(folder))
        else:
            check_run_folder(folder, overwrite)
    training = recipe.training.model_copy(update={"output_dir": str(folder)})
    return recipe.model_copy(update={"training": training})


def examined(recipe: Recipe, path: Path, overrides: Sequence[str], debug: bool, ask_the_hub: bool) -> Examined:
    """Check the recipe's model; transformers is imported only for architectures missing from our table.

    Raises:
        UserError: it cannot be trained according to the recipe.
    """

    def build(config: Mapping[str, Any]) -> Modules:
        with starting(debug):
            from folora_q.models.meta import modules_without_weights
        return modules_without_weights(config)

    return examine_model(recipe, places_in(path, overrides), build, ask_the_hub)
