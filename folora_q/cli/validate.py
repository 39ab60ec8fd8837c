"""`folora-q validate`: check a recipe and the beginning of its data, without loading anything heavy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import rich_click as click
from rich.markup import escape

from folora_q.cli.console import out
from folora_q.cli.options import recipe_arguments
from folora_q.data.read import examine
from folora_q.data.templates import read_template
from folora_q.memory.config import read_config
from folora_q.models.stored_quantization import stored_quantization
from folora_q.models.unsupported import refuse_unsupported
from folora_q.recipe import Recipe
from folora_q.recipe.dataset import Source
from folora_q.recipe.paths import is_hub_dataset

# Enough rows to know a file's shape by; reading all is --all-rows.
FIRST_ROWS = 1000


@click.command("validate")
@recipe_arguments
@click.option(
    "--all-rows", is_flag=True, help=f"Check every row of the data, not the first {FIRST_ROWS:,} of each source."
)
def command(path: Path, overrides: tuple[str, ...], recipe: Recipe, all_rows: bool) -> None:
    """Check a RECIPE, its files and its data's rows. Nothing is downloaded, and no model is loaded."""
    if recipe.data.chat_template is not None:
        read_template(recipe.data.chat_template)
    facts = list(_facts(recipe, None if all_rows else FIRST_ROWS))
    out.print(f"[green]✓[/] {escape(str(path))} is valid", soft_wrap=True)
    for name, text in facts:
        out.print(f"  [dim]{name:9}[/] {escape(text)}", soft_wrap=True)
    if recipe.rate_advice is not None:
        out.print(f"  [yellow]note[/]      {escape(recipe.rate_advice)}", soft_wrap=True)


def _facts(recipe: Recipe, rows: int | None) -> Iterator[tuple[str, str]]:
    training, gate = recipe.training, recipe.gate
    yield "model", f"{recipe.model.model_name_or_path}, {_held(recipe)}"
    yield from (("train", _source(source, recipe, rows)) for source in recipe.data.train_dataset)
    if recipe.data.eval_dataset is None:
        share = recipe.data.eval_size
        yield "held out", f"{share:.0%} of these rows" if share < 1 else f"{share:g} of these rows"
    yield from (("held out", _source(source, recipe, rows)) for source in recipe.data.eval_dataset or [])
    evaluation = recipe.evaluation
    others = {
        "template": [recipe.data.chat_template],
        "texts": evaluation.general_text or [],
        "prompts": [evaluation.general_prompts],
        "metric": [evaluation.metric_function if evaluation.metric == "function" else None],
    }
    yield from ((name, file) for name, files in others.items() for file in files if file is not None)
    length = f"{training.max_steps:,} steps" if training.max_steps else f"{training.num_train_epochs:g} epochs"
    sequences = training.per_device_train_batch_size * training.gradient_accumulation_steps
    packed = ", packed" if training.packing else ""
    yield (
        "training",
        f"{length} of {sequences} sequences up to {training.max_length:,} tokens{packed}; learning rate "
        f"{training.learning_rate:g}, "
        f"{'optimizer by hardware' if training.optim == 'auto' else training.optim}",
    )
    yield "gate", gate.words if gate.enabled else "off: plain QLoRA"
    taken = " (holds a run already: --overwrite)" if (Path(training.output_dir) / "run.json").exists() else ""
    yield "run", training.output_dir + taken


def _held(recipe: Recipe) -> str:
    """How the model is held in training; of a local one, as its own config.json says.

    Raises:
        UserError: it is of a kind that cannot be fine-tuned.
    """
    name = recipe.model.model_name_or_path
    config = read_config(name) if Path(name).is_dir() else {}
    refuse_unsupported(name, config)
    stored = stored_quantization(config)
    how = f"({recipe.model.bnb_4bit_quant_type})" if stored is None else f"as it was saved ({stored})"
    return f"in 4 bits {how}"


def _source(source: Source, recipe: Recipe, rows: int | None) -> str:
    if is_hub_dataset(source):
        return f"{source.path} ({source.split}) from the hub, not looked at"
    facts = examine(source, rows, recipe.data.on_error)
    if facts.read != rows:
        return f"{source.path}: {facts.rows:,} rows of `{facts.shape}`"
    usable = "" if facts.rows == facts.read else f"{facts.rows:,} of "
    return f"{source.path}: {usable}the first {facts.read:,} rows, of `{facts.shape}`"
