"""`folora-q estimate`: estimate a run's memory, and propose changes if it does not fit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import rich_click as click
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from folora_q.cli.console import err, out, print_table, starting
from folora_q.cli.options import recipe_arguments
from folora_q.cli.preflight import examined
from folora_q.distributed.launch import TORCHRUN
from folora_q.memory.advice import Advice, advise
from folora_q.memory.config import read_config
from folora_q.memory.estimate import GIB, MARGIN, PARTS, MemoryEstimate, estimate
from folora_q.memory.longest_context import SMALLEST_BATCHES, longest_context
from folora_q.memory.micro_batches import StepPlan, divided_among, of_one_process, plan_step
from folora_q.memory.shapes import ModelShape
from folora_q.memory.shapes_from_meta import Built, find_shape
from folora_q.models.stored_quantization import StoredQuantization, stored_quantization
from folora_q.models.unsupported import refuse_unsupported
from folora_q.recipe import Recipe

CARDS = (8.0, 12.0, 16.0, 24.0)
BAR_WIDTH = 40
HELD, WORKING = "cyan", "magenta"
FROZEN = ("4-bit weights", "their constants", "16-bit weights", "gathered layers")
# Where the base is, by `model.fsdp`; auto is how it is counted without a card.
BASES = dict.fromkeys(("auto", "none"), "each holds the complete base") | {
    "shard": "each holds a part of every decoder layer",
    "offload": "the decoder layers are in the host's memory, a part of each for every GPU",
}


@click.command("estimate")
@partial(recipe_arguments, with_data=False)
@click.option("--gpu", "card", type=click.FloatRange(min=1), metavar="GB", help="Memory of the GPU: 8, 12, 16, 24, ...")
@click.option("--gpus", type=click.IntRange(min=1), default=1, metavar="N", help="Number of GPUs that share each step.")
@click.option("--longest", is_flag=True, help="Show the longest sequences that fit, instead of the memory.")
@click.pass_context
def command(
    ctx: click.Context,
    path: Path,
    overrides: tuple[str, ...],
    recipe: Recipe,
    card: float | None,
    gpus: int,
    longest: bool,
) -> None:
    """Estimate a RECIPE's peak memory by stage and component, from the model's config.json alone.

    The data need not exist. Of much-used models the numbers of config.json are shipped, for use without a network.

    Exit code 1: it does not fit the GPU of --gpu. Then it proposes changes, the least harmful first.
    """
    shape, stored = _shape(recipe, ctx.obj["debug"])
    model = examined(recipe, path, overrides, ctx.obj["debug"], ask_the_hub=False)  # config.json is local by now
    if stored is not None:  # the recipe's quantization settings are for models in 16 bits
        held = {"bnb_4bit_quant_type": stored.quant_type, "bnb_4bit_use_double_quant": stored.double_quant}
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=held)})
    recipe, shape = of_one_process(divided_among(recipe, gpus), gpus), replace(shape, gpus=gpus)
    if longest:
        _print_longest(recipe, shape, CARDS if card is None else (card,))
        return
    found = estimate(recipe, shape)
    if card is not None:  # as it would run there
        recipe, found = (plan := plan_step(recipe, shape, card)).recipe, plan.memory
    _print_head(recipe, shape, found)
    if gpus > 1:
        base = BASES[recipe.model.fsdp]
        out.print(f"[dim]on each of {gpus} GPUs, which share the steps; {base}[/]\n", soft_wrap=True)
    for note in model.notes:
        out.print(f"[yellow]note[/] {escape(note)}\n", soft_wrap=True)
    print_table(_table(found))
    _print_cards([(each, plan_step(recipe, shape, each)) for each in (CARDS if card is None else (card,))])
    _print_host_and_disk(found, gpus)
    if card is not None and not found.fits(card):
        program = "folora-q" if gpus == 1 else TORCHRUN.format(gpus)
        _print_advice(
            advise(recipe, shape, card).of_all(gpus), card, f"{program} train {shlex.quote(str(path))}", overrides
        )
        ctx.exit(1)


def _shape(recipe: Recipe, debug: bool) -> tuple[ModelShape, StoredQuantization | None]:
    """Return the model's shapes and, if it was saved in 4 bits, its quantization."""
    name = recipe.model.model_name_or_path
    with err.status(
        f"looking for config.json of {escape(name)}"
    ):  # without a network the hub's client keeps trying for long
        config = read_config(name, recipe.model.revision)
    refuse_unsupported(name, config)
    stored = stored_quantization(config)

    def build(config: Mapping[str, Any]) -> Built:
        with starting(debug) as progress:
            from folora_q.models.meta import parameter_shapes
        progress.note(
            f"models of the type {config.get('model_type')} are not in our table, so this one was built without weights"
        )
        return parameter_shapes(config)

    return find_shape(config, stored.skipped or () if stored is not None else (), build), stored


def _print_head(recipe: Recipe, shape: ModelShape, found: MemoryEstimate) -> None:
    sizes = f"{shape.parameters / 1e9:,.2f} billion parameters, {shape.quantized / shape.parameters:.0%} in 4 bits"
    name = escape(recipe.model.model_name_or_path)
    out.print(f"[bold]{name}[/]: {sizes}; {found.trained / 1e6:,.1f} million trained", soft_wrap=True)
    if shape.experts:
        share = shape.experts / shape.parameters
        out.print(f"{share:.0%} of them are experts, which stay in 16 bits and have no adapter", soft_wrap=True)
    training = recipe.training
    rows, passes = training.per_device_train_batch_size, training.gradient_accumulation_steps
    step = f"{rows} x {training.max_length:,} tokens" + f", {passes} times per step" * (passes != 1)
    out.print(f"[dim]{step}, all rows at their longest[/]\n", soft_wrap=True)


def _table(found: MemoryEstimate) -> Table:
    """Return the table of components by stage, in GiB; a dot is less than 5 MiB."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("GiB")
    for stage in found.stages:
        table.add_column(stage.name, justify="right", style="bold" if stage is found.largest else "")
    for name in PARTS:
        if not any(stage.device.get(name) for stage in found.stages):
            continue
        table.add_row(name, *(_gib(stage.device.get(name, 0)) for stage in found.stages))
    table.add_section()
    table.add_row("[bold]peak[/]", *(_gib(stage.on_device) for stage in found.stages))
    return table


def _gib(size: int) -> str:
    if size == 0:
        return ""
    return f"{size / GIB:,.2f}" if size >= 0.005 * GIB else "·"


def _print_cards(plans: Sequence[tuple[float, StepPlan]]) -> None:
    """Print a bar for each card: frozen weights, and all other memory at the peak, as the step is cut there."""
    out.print()
    for card, plan in plans:
        found = plan.memory
        frozen = sum(found.largest.device.get(name, 0) for name in FROZEN)
        bar = Text(f"{card:>3g} GB  ")
        filled = min(round(BAR_WIDTH * found.peak / GIB / card), BAR_WIDTH)
        still = min(round(BAR_WIDTH * frozen / GIB / card), filled)
        bar.append("█" * still, HELD).append("█" * (filled - still), WORKING)
        bar.append("░" * (BAR_WIDTH - filled), "bright_black")
        if found.fits(card):
            bar.append(f"  fits, {card - found.peak / GIB:.1f} free", "green")
        elif found.peak <= card * GIB:
            bar.append(f"  too tight, {card - found.peak / GIB:.1f} free", "yellow")
        else:
            bar.append(f"  does not fit, {found.peak / GIB:.1f} needed", "red")
        out.print(bar, soft_wrap=True)
        if found.fits(card):
            out.print(f"{' ' * 8}[dim]{plan}[/]", soft_wrap=True)
    rest = f"the rest, at the peak; {MARGIN:.0%} is kept free"
    out.print(f"{' ' * 8}[{HELD}]█[/][dim] frozen weights [/][{WORKING}]█[/][dim] {rest}[/]", soft_wrap=True)


def _print_longest(recipe: Recipe, shape: ModelShape, cards: Sequence[float]) -> None:
    """Print the longest `training.max_length` for each card, with and without activation offloading."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("card", "training.max_length", "with activation_offloading"):
        table.add_column(heading, justify="right")
    for card in cards:
        lengths = [longest_context(recipe, shape, card, offloading) for offloading in (False, True)]
        table.add_row(f"{card:g} GB", *(f"{length:,}" if length else "too small" for length in lengths))
    print_table(table)
    smallest = ", ".join(
        f"{section}.{key}={value}" for section, values in SMALLEST_BATCHES.items() for key, value in values.items()
    )
    out.print(
        f"\n[dim]In tokens, one sequence at a time, with activation checkpointing and {smallest}. By arithmetic: not "
        f"measured on a GPU. {MARGIN:.0%} of the card is kept free.[/]"
    )


def _print_host_and_disk(found: MemoryEstimate, processes: int) -> None:
    busiest = max(found.stages, key=lambda stage: stage.on_host)
    each = f", for each of {processes} processes" if processes > 1 else ""
    out.print(f"\nhost memory  {found.host / GIB:,.1f} GiB, at most ({busiest.name}){each}", soft_wrap=True)
    parts = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in found.disk.items() if size >= 5e7)
    out.print(f"disk         {sum(found.disk.values()) / 1e9:,.1f} GB: {parts}", soft_wrap=True)


def _print_advice(advice: Advice, card: float, command: str, overrides: Sequence[str]) -> None:
    if advice.changes:
        out.print(f"\n[bold]To fit {card:g} GB[/], least harmful first" if advice.fits else "\n[bold]What helps[/]")
    for change in advice.changes:
        out.print(f"  [cyan]{_settings(change.overrides)}[/]", soft_wrap=True)
        out.print(f"      {change.saves / GIB:,.2f} GiB less; {change.cost}", style="dim", soft_wrap=True)
    if not advice.fits:
        out.print(
            f"\n[bold]Even so it takes {advice.after.peak / GIB:,.1f} GiB[/]: use a smaller model, or a larger card.",
            soft_wrap=True,
        )
        return
    kept = [given for given in overrides if given.partition("=")[0].strip() not in advice.overrides]
    given = " ".join([*map(shlex.quote, kept), _settings(advice.overrides)])
    out.print(f"\nthen {advice.after.peak / GIB:,.2f} GiB:", soft_wrap=True)
    out.print(f"  [cyan]{escape(command)} {escape(given)}[/]", soft_wrap=True)


def _settings(overrides: Mapping[str, object]) -> str:
    return " ".join(f"{key}={_written(value)}" for key, value in overrides.items())


def _written(value: object) -> str:
    """Format a value for a shell."""
    if isinstance(value, list):
        return shlex.quote(f"[{', '.join(map(str, value))}]")
    return str(value).lower() if isinstance(value, bool) else f"{value}"
