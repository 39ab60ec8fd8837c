"""Check a run's base model from its config.json: quantizable, long enough, with the named layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from folora_q.data.loading import first_examples
from folora_q.data.templates import read_template
from folora_q.errors import UserError, first_line
from folora_q.memory.config import config_here, files_here, read_config
from folora_q.memory.names import modules_of_config
from folora_q.memory.positions import positions_of
from folora_q.memory.shapes import text_config
from folora_q.memory.shipped_models import shipped_model
from folora_q.models.prequantized import foreign_quantization, quantized_already
from folora_q.models.unsupported import refuse_unsupported
from folora_q.preflight.tokens import needed_tokens, tokens_beyond, tokens_in
from folora_q.recipe import Recipe
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.hub import did_you_mean
from folora_q.recipe.paths import is_hub_dataset, listed, short
from folora_q.recipe.target_modules import Modules, adapter_findings

Config = Mapping[str, Any]
KeyPath = Callable[[tuple[str | int, ...]], str]
MODEL, LENGTH = ("model", "model_name_or_path"), ("training", "max_length")
# Maximum number of tokens that a message names.
MAX_NAMED_TOKENS = 4
DEFAULT_NAMES = AdapterSection()


@dataclass(frozen=True)
class Examined:
    """Findings on a base model that can be used.

    Attributes:
        notes: sentences for the user, who may want to change the recipe.
        rows: number of rows of its embedding; 0 if unknown.
        beyond: tokens beyond the embedding's rows, by id.
    """

    notes: list[str] = field(default_factory=list)
    rows: int = 0
    beyond: dict[int, str] = field(default_factory=dict)


def examine_model(recipe: Recipe, place: KeyPath, build: Callable[[Config], Modules], ask_the_hub: bool) -> Examined:
    """Check the recipe against the files of the model other than its weights.

    Args:
        place: returns the location of a key in the recipe.
        build: returns the modules of a model that is not in our table, from its config.json.
        ask_the_hub: fetch config.json if it is neither local nor in the cache.

    Raises:
        UserError: the model cannot be fine-tuned or quantized to 4 bits, has fewer positions than the recipe's texts,
            or lacks a layer that the recipe names or a row for a token that every text has. The message lists all
            findings.
    """
    name, revision = recipe.model.model_name_or_path, recipe.model.revision
    config, notes = config_here(name, revision), []
    if config is None and ask_the_hub:
        config = read_config(name, revision, use_shipped=False)  # training needs the hub for the weights too
    elif config is None:
        if (shipped := shipped_model(name)) is None:
            kept = f"the files of {name} are not in the hub's cache, so the model was not checked"
            return Examined([f"{kept}{did_you_mean(name)}"])
        notes.append(f"config.json of {name} is not in the hub's cache: shipped numbers are used ({shipped.date})")
        config = shipped.config
    refuse_unsupported(name, config)
    folder = files_here(name, revision)
    if (method := foreign_quantization(config, folder)) is not None:
        wrong, hint = quantized_already(name, method, config)
        raise UserError(f"`model.model_name_or_path`: {wrong} ({place(MODEL)})", hint)
    findings = [*_lengths(recipe, config, place, notes)]
    rows = text_config(config).get("vocab_size")
    rows = rows if type(rows) is int else 0
    beyond = tokens_beyond(folder, rows) if folder is not None and rows else {}
    findings += _tokens(recipe, folder, rows, beyond, place)
    findings += _layers(recipe, config, place, build, notes)
    if findings:
        raise UserError(listed(findings))
    if beyond:
        notes.append(
            f"{_named(beyond)} {'has' if len(beyond) == 1 else 'have'} no row in the model's embedding, so text that "
            "contains one cannot be trained on"
        )
    return Examined(notes, rows, beyond)


def _lengths(recipe: Recipe, config: Config, place: KeyPath, notes: list[str]) -> list[str]:
    """Return findings on texts that are longer than the model's positions."""
    positions = positions_of(config)
    if positions is None:
        return []
    longest = {
        ("training", "max_length"): recipe.training.max_length,
        ("proxy", "max_new_tokens"): recipe.proxy.max_new_tokens,
    }
    findings = []
    for key, length in longest.items():
        if length <= positions.count:
            continue
        setting, most = ".".join(key), f"{positions.count:,} tokens"
        reason = f" {positions.reason}" if positions.reason else ""
        if positions.table:
            findings.append(
                f"`{setting}` is {length:,}, but the model has a table of positions for {most}, and fails on more: set "
                f"it to {positions.count} or less ({place(key)})"
            )
        else:
            notes.append(
                f"{setting} is {length:,}, but the model was trained for {most}{reason}: beyond that its predictions "
                f"get worse ({place(key)})"
            )
    return findings


def _tokens(recipe: Recipe, folder: Path | None, rows: int, beyond: dict[int, str], place: KeyPath) -> list[str]:
    """Return findings on tokens that every text has and the embedding lacks."""
    template = None if recipe.data.chat_template is None else read_template(recipe.data.chat_template)
    needed = {} if folder is None or not beyond else needed_tokens(folder, beyond, template)
    if not needed:
        return []
    return [f"`model.model_name_or_path`: {no_row(needed, rows)} ({place(MODEL)})"]


def examine_rows(recipe: Recipe, model: Examined, rows: int | None) -> None:
    """Check the first rows of the recipe's data for tokens that the embedding lacks.

    Args:
        rows: number of rows of each source; None checks all.

    Raises:
        UserError: a row contains one, or cannot be used.
    """
    if not model.beyond:
        return
    for source in [*recipe.data.train_dataset, *(recipe.data.eval_dataset or [])]:
        if is_hub_dataset(source):
            continue
        for example in first_examples(source, rows, recipe.data.on_error, recipe.training.objective):
            if held := tokens_in(example, model.beyond):
                raise UserError(f"{example.where}: {no_row(held, model.rows)}")


def no_row(tokens: Mapping[int, str], rows: int) -> str:
    """Describe the problem of tokens that the data contains and the embedding lacks."""
    return (
        f"the model's embedding has {rows:,} rows, none of them for {_named(tokens)}: resize it "
        "(`resize_token_embeddings`) and save the model before it is fine-tuned, or use tokens that it has"
    )


def _named(tokens: Mapping[int, str]) -> str:
    first = [f"{short(token)} ({number})" for number, token in list(tokens.items())[:MAX_NAMED_TOKENS]]
    more = f" and {len(tokens) - MAX_NAMED_TOKENS:,} more" if len(tokens) > MAX_NAMED_TOKENS else ""
    return f"the token{'s' * (len(tokens) > 1)} {', '.join(first)}{more}"


def _layers(
    recipe: Recipe, config: Config, place: KeyPath, build: Callable[[Config], Modules], notes: list[str]
) -> Sequence[str]:
    """Return findings on names in the section `adapter` that match no layer of the model."""
    section = recipe.adapter
    keys = ("target_modules", "exclude_modules", "modules_to_save")
    if all(getattr(section, key) == getattr(DEFAULT_NAMES, key) for key in keys):
        return []
    try:
        modules = modules_of_config(config) or build(config)
    except UserError as error:
        notes.append(f"the names of its layers are not known before it is loaded: {first_line(error.message)}")
        return []
    return [f"{message} ({place(key)})" for key, message in adapter_findings(section, modules)]
