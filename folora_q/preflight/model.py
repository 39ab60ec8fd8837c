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
from folora_q.models.prequantized import foreign_quantization, quantized_already
from folora_q.models.unsupported import refuse_unsupported
from folora_q.preflight.tokens import needed_tokens, tokens_beyond, tokens_in
from folora_q.recipe import Recipe
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.paths import is_hub_dataset, listed, short
from folora_q.recipe.target_modules import Modules, adapter_findings

Config = Mapping[str, Any]
KeyPath = Callable[[tuple[str | int, ...]], str]
MODEL, LENGTH = ("model", "model_name_or_path"), ("training", "max_length")
# A message names no more tokens.
MAX_NAMED_TOKENS = 4
DEFAULT_NAMES = AdapterSection()


@dataclass(frozen=True)
class Examined:
    """What was found of a base model that can be used.

    Attributes:
        notes: sentences, for somebody who may want to change the recipe.
        rows: of its embedding; 0 where that is not known.
        beyond: tokens that no row of it is for, by their number.
    """

    notes: list[str] = field(default_factory=list)
    rows: int = 0
    beyond: dict[int, str] = field(default_factory=dict)


def examine_model(recipe: Recipe, place: KeyPath, build: Callable[[Config], Modules], ask_the_hub: bool) -> Examined:
    """Look through the recipe and the files of the model that are no weights.

    Args:
        place: where a key stands.
        build: gives the modules of a model that is not in our table, from its config.json.
        ask_the_hub: fetch config.json where it is neither here nor in the cache.

    Raises:
        UserError: the model is of a kind that cannot be fine-tuned or put into 4 bits, is shorter than the recipe's
            texts, lacks a layer that the recipe names or a row for a token that every text has; the message lists
            every finding.
    """
    name, revision = recipe.model.model_name_or_path, recipe.model.revision
    config = config_here(name, revision)
    if config is None:
        if not ask_the_hub:
            return Examined([f"the files of {name} are not in the hub's cache, so the model was not looked at"])
        try:
            config = read_config(name, revision)
        except UserError:  # whoever loads it says what is wrong
            return Examined()
    refuse_unsupported(name, config)
    folder, notes = files_here(name, revision), []
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
            f"{_named(beyond)} {'has' if len(beyond) == 1 else 'have'} no row in the model's embedding, so no text can "
            "be trained on that holds one"
        )
    return Examined(notes, rows, beyond)


def _lengths(recipe: Recipe, config: Config, place: KeyPath, notes: list[str]) -> list[str]:
    """Texts that are longer than the model's positions."""
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
                f"{setting} is {length:,}, and the model was made for {most}{reason}: beyond them it was not trained, "
                f"and its predictions get worse ({place(key)})"
            )
    return findings


def _tokens(recipe: Recipe, folder: Path | None, rows: int, beyond: dict[int, str], place: KeyPath) -> list[str]:
    """Tokens that every text has and the model no row for."""
    template = None if recipe.data.chat_template is None else read_template(recipe.data.chat_template)
    needed = {} if folder is None or not beyond else needed_tokens(folder, beyond, template)
    if not needed:
        return []
    return [f"`model.model_name_or_path`: {no_row(needed, rows)} ({place(MODEL)})"]


def examine_rows(recipe: Recipe, model: Examined, rows: int | None) -> None:
    """Look for tokens that the model cannot read in the beginning of the recipe's data.

    Args:
        rows: so many of each source; None looks at all.

    Raises:
        UserError: a row holds one, or cannot be used.
    """
    if not model.beyond:
        return
    for source in [*recipe.data.train_dataset, *(recipe.data.eval_dataset or [])]:
        for example in () if is_hub_dataset(source) else first_examples(source, rows, recipe.data.on_error):
            if held := tokens_in(example, model.beyond):
                raise UserError(f"{example.where}: {no_row(held, model.rows)}")


def no_row(tokens: Mapping[int, str], rows: int) -> str:
    """What is wrong with tokens that text holds and the embedding has no row for."""
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
    """Names in the section `adapter` that no layer of the model has."""
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
