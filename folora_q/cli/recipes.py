"""`folora-q recipes`: list the shipped recipes with the memory that they need, or copy one."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import rich_click as click
from rich.markup import escape

from folora_q.cli.console import out
from folora_q.memory.estimate import GIB, estimate
from folora_q.memory.micro_batches import divided_among, of_one_process, plan_step
from folora_q.memory.shapes import shape_of
from folora_q.memory.shipped_models import shipped_model
from folora_q.recipe import load_recipe
from folora_q.recipe.shipped import ShippedRecipe, copy_recipe, shipped_recipes


@click.group("recipes", invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """List the shipped recipes, with their estimated peak of GPU memory.

    `folora-q train NAME` runs one; `folora-q recipes copy NAME` copies one for you to edit.
    """
    if ctx.invoked_subcommand is not None:
        return
    recipes = shipped_recipes()
    width = max(len(recipe.name) for recipe in recipes)
    for recipe in recipes:
        size = f"[bold]{_peak(recipe) / GIB:4.1f}[/] GiB"
        out.print(f"[cyan]{recipe.name:{width}}[/]  {size}  {escape(recipe.title)}", soft_wrap=True)
    out.print(
        "\nGiB: the estimated peak of memory of each GPU; `folora-q estimate` shows its parts",
        style="dim",
        soft_wrap=True,
    )
    out.print("folora-q train NAME                       [dim]runs one[/]")
    out.print("folora-q recipes copy NAME \\[FILE.yaml]    [dim]copies one for you to edit[/]")


def _peak(shipped: ShippedRecipe) -> int:
    """Return the estimated peak of a shipped recipe in bytes; a test checks that its model's numbers are shipped."""
    recipe = load_recipe(shipped.path, with_data=False)
    model = shipped_model(recipe.model.model_name_or_path)
    if model is None:
        raise KeyError(recipe.model.model_name_or_path)
    shape = shape_of(model.config)
    if shipped.cards is None:
        return estimate(recipe, shape).peak
    gpus, card = shipped.cards
    return plan_step(of_one_process(divided_among(recipe, gpus), gpus), replace(shape, gpus=gpus), card).memory.peak


@command.command("copy")
@click.argument("name", help="Name of a recipe, as listed.")
@click.argument(
    "target",
    default=".",
    type=click.Path(path_type=Path),
    help="A .yaml file or a folder. Default: the working directory.",
)
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
def copy(name: str, target: Path, overwrite: bool) -> None:
    """Copy the recipe NAME to TARGET, with its data if it brings any, and the schema that editors complete from."""
    files = copy_recipe(name, target, overwrite)
    for file in files:
        out.print(f"[green]✓[/] {escape(str(file))}", soft_wrap=True)
    out.print(f"\n[bold]Next[/]\n  [cyan]folora-q validate {escape(shlex.quote(str(files[0])))}[/]", soft_wrap=True)
