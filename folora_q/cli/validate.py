"""`folora-q validate`: check a recipe, the model's configuration and the data without loading anything heavy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import rich_click as click
from rich.markup import escape

from folora_q.cli.console import out
from folora_q.cli.options import recipe_arguments
from folora_q.cli.preflight import examined
from folora_q.cli.wording import counted
from folora_q.data.loading import SourceFacts, examine, require_left, share_of
from folora_q.data.splits import TRAIN
from folora_q.data.templates import read_template
from folora_q.errors import UserError
from folora_q.memory.config import read_config
from folora_q.models.stored_quantization import stored_quantization
from folora_q.preflight.keeping import examine_keep, kept_in_words
from folora_q.preflight.lengths import examine_lengths
from folora_q.preflight.model import examine_rows
from folora_q.recipe import Recipe
from folora_q.recipe.dataset import DataSection, Source
from folora_q.recipe.paths import is_hub_dataset, is_remote
from folora_q.recipe.size_advice import heldout_advice, step_advice
from folora_q.runs.earlier_tasks import EARLIER, earlier_recipes, unreadable_data
from folora_q.runs.folder import RunFolder, check_run_folder, held_run

# Number of rows to check without --all-rows.
FIRST_ROWS = 1000


@click.command("validate")
@recipe_arguments
@click.option("--all-rows", is_flag=True, help=f"Check every row, not only the first {FIRST_ROWS:,} of each source.")
@click.pass_obj
def command(settings: dict[str, bool], path: Path, overrides: tuple[str, ...], recipe: Recipe, all_rows: bool) -> None:
    """Check a RECIPE, the model's configuration and the data. Nothing is downloaded, and no model is loaded."""
    if recipe.data.chat_template is not None:
        read_template(recipe.data.chat_template)
    check_run_folder(Path(recipe.training.output_dir), overwrite=True)
    model = examined(recipe, path, overrides, settings["debug"], ask_the_hub=False)
    rows = None if all_rows else FIRST_ROWS
    data = recipe.data
    train, heldout = ([_look_at(source, rows, recipe) for source in given or []] for given in _sources(data))
    _require_training_rows(data, train)
    earlier, unmeasured = _look_at_earlier(recipe, rows)
    facts = [*_facts(recipe, train, heldout), *(("earlier", text) for text in earlier)]
    examine_rows(recipe, model, rows)
    too_long = examine_lengths(recipe, rows)
    left_out = examine_keep(recipe)
    out.print(f"[green]✓[/] {escape(str(path))} is valid", soft_wrap=True)
    for name, text in facts:
        out.print(f"  [dim]{name:9}[/] {escape(text)}", soft_wrap=True)
    for warning in _size_warnings(recipe, train, heldout):
        out.print(f"  [yellow]warning[/]   {escape(warning)}", soft_wrap=True)
    for warning in [*too_long, *recipe.advice]:
        out.print(f"  [yellow]warning[/]   {escape(warning)}", soft_wrap=True)
    for note in [*model.notes, *left_out, *unmeasured]:
        out.print(f"  [yellow]note[/]      {escape(note)}", soft_wrap=True)


@dataclass(frozen=True)
class Look:
    """The result of reading a data source.

    Attributes:
        text: a description for display.
        facts: None if it was not read.
        whole: whether all of its rows were read.
    """

    text: str
    facts: SourceFacts | None = None
    whole: bool = False


def _sources(data: DataSection) -> tuple[list[Source], list[Source] | None]:
    return data.train_dataset, data.eval_dataset


def _look_at(source: Source, rows: int | None, recipe: Recipe) -> Look:
    if is_hub_dataset(source):
        return Look(f"{source.path} ({source.split or TRAIN}) from the hub, not checked")
    if is_remote(source.path):
        return Look(f"{source.path}, not checked: `folora-q preview` reads it")
    facts = examine(source, rows, recipe.data.on_error, recipe.training.objective)
    remarks = "".join(f"; {remark}" for remark in facts.remarks)
    if facts.read != rows:
        return Look(f"{source.path}: {facts.rows:,} rows of `{facts.shape}`{remarks}", facts, whole=True)
    usable = "" if facts.rows == facts.read else f"{facts.rows:,} of "
    text = f"{source.path}: {usable}the first {facts.read:,} rows, of `{facts.shape}`{remarks}"
    return Look(text, facts)


def _look_at_earlier(recipe: Recipe, rows: int | None) -> tuple[list[str], list[str]]:
    """Read the data of earlier tasks; return a line for each source, and notes on tasks that cannot be measured.

    Raises:
        UserError: rows of an earlier task are to be preserved, and cannot be read.
    """
    tasks, notes = earlier_recipes(recipe.model)
    found = []
    for name, task in tasks:
        try:
            looks = [_look_at(source, rows, task) for given in _sources(task.data) for source in given or []]
        except UserError as error:
            unreadable = unreadable_data(name, error)
            if recipe.preserves_earlier_rows:
                raise unreadable from error
            notes.append(f"{unreadable.message}; it is not measured")
        else:
            found += [f"{name.removeprefix(EARLIER)}: {look.text}" for look in looks]
    return found, notes


def _require_training_rows(data: DataSection, train: Sequence[Look]) -> None:
    """Check that rows are left after some are held out, for sources that were read in full.

    Raises:
        UserError: none is left.
    """
    for number, look in enumerate(train):
        if data.eval_dataset is None and look.whole and look.facts is not None and look.facts.shape != "text":
            require_left(look.facts.rows, share_of(data.eval_size, number, len(train)), look.facts.path)


def _facts(recipe: Recipe, train: Sequence[Look], heldout: Sequence[Look]) -> Iterator[tuple[str, str]]:
    training, gate = recipe.training, recipe.gate
    yield "model", f"{recipe.model.model_name_or_path}, {_held(recipe)}"
    if recipe.model.adapter is not None:
        yield "adapter", f"{recipe.model.adapter}, frozen; a second one is trained on it"
    yield from (("train", look.text) for look in train)
    if recipe.data.eval_dataset is None:
        share = recipe.data.eval_size
        yield "held out", f"{share:.0%} of these rows" if share < 1 else f"{share:g} of these rows"
    yield from (("held out", look.text) for look in heldout)
    evaluation = recipe.evaluation
    others = {
        "template": [recipe.data.chat_template],
        "texts": evaluation.general_text or [],
        "prompts": [evaluation.general_prompts],
        "metric": [evaluation.metric_function if evaluation.metric == "function" else None],
    }
    yield from ((name, file) for name, files in others.items() for file in files if file is not None)
    length = counted(training.max_steps, "step") if training.max_steps else counted(training.num_train_epochs, "epoch")
    sequences = training.per_device_train_batch_size * training.gradient_accumulation_steps
    packed = ", packed" if training.packing else ""
    what = "sequences" if training.sequences_per_row == 1 else "pairs of answers"
    yield (
        "training",
        f"{length} of {sequences} {what} up to {training.max_length:,} tokens{packed}; learning rate "
        f"{training.learning_rate:g}, "
        f"{'optimizer by hardware' if training.optim == 'auto' else training.optim}",
    )
    yield "gate", gate.words if gate.enabled else "off: plain QLoRA"
    if (kept := kept_in_words(recipe)) is not None:
        yield "keep", kept
    yield "run", training.output_dir + _taken(Path(training.output_dir))


def _taken(folder: Path) -> str:
    """Say that the run folder holds a run, and which options train there nevertheless."""
    if not RunFolder(folder).manifest.exists():
        return ""
    what, unfinished = held_run(folder)
    return f" (already holds {what}: {'--resume or ' if unfinished else ''}--overwrite)"


def _size_warnings(recipe: Recipe, train: Sequence[Look], heldout: Sequence[Look]) -> list[str]:
    """Return warnings about too few rows, if each is a sequence and all were read; `preview` and `train` know more."""
    looks = [*train, *heldout]
    if recipe.training.packing or not all(look.whole and look.facts and look.facts.shape != "text" for look in looks):
        return []
    data, size = recipe.data, recipe.data.eval_size
    rows = [look.facts.rows for look in train if look.facts]
    share = [max(1, round(count * size)) if size < 1 else 0 for count in rows]
    held = sum(share) if size < 1 else int(size)
    left = [count - out for count, out in zip(rows, share, strict=True)]
    if data.eval_dataset is not None:
        held, left = sum(look.facts.rows for look in heldout if look.facts), rows
    weighted = sum(count * source.weight for count, source in zip(left, data.train_dataset, strict=True))
    trained = round(weighted) - (held if data.eval_dataset is None and size >= 1 else 0)
    found = (
        step_advice(recipe.training, max(1, min(trained, data.max_train_samples or trained))),
        heldout_advice(data, trained, min(held, data.max_eval_samples or held)),
    )
    return [advice for advice in found if advice is not None]


def _held(recipe: Recipe) -> str:
    """Describe the model's quantization in training; for a local model, from its config.json."""
    name = recipe.model.model_name_or_path
    config = read_config(name) if Path(name).is_dir() else {}
    stored = stored_quantization(config)
    how = f"({recipe.model.bnb_4bit_quant_type})" if stored is None else f"as it was saved ({stored})"
    return f"in 4 bits {how}"
