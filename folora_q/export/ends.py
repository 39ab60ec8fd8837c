"""Fit a base to an adapter that changes its embedding or output layer: resized, trained in full, or untied.

The result is what PEFT computes with the adapter on its base: a tied weight that both ends still share stays tied; one
that the adapter changes at only one end becomes two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folora_q.errors import UserError
from folora_q.models.adapter_config import read_adapter_config
from folora_q.models.adapter_file import AdapterFile
from folora_q.models.layout import read_layout
from folora_q.models.meta import modules_in
from folora_q.models.trust import NOTHING, Trust
from folora_q.models.weight_files import Checkpoint
from folora_q.preflight.tokens import new_tokens

SAVE_BOTH = "save it again with `save_embedding_layers=True`, which saves both with the adapter"


@dataclass(frozen=True, kw_only=True)
class FittedCheckpoint(Checkpoint):
    """A base whose embedding and output layer have the shapes of an adapter's, with a matching config.json.

    Attributes:
        rows: of embedding and output layer.
        note: what differs from the base, in words.
    """

    rows: int
    note: str


@dataclass(frozen=True)
class _Ends:
    """Embedding and output layer, by their names in the model, which adapters use too.

    Attributes:
        tied: the base's class ties them.
        stored: by those names, the names on disk; a tied output layer may have none.
    """

    embedding: str
    head: str
    tied: bool
    stored: dict[str, str]

    def place(self, name: str) -> str:
        """Return the name on disk, or the name itself for a tensor that is not stored yet."""
        return self.stored.get(name, name)


def fitted(
    base: Checkpoint, adapters: Sequence[AdapterFile], trust: Trust = NOTHING
) -> tuple[Checkpoint, list[AdapterFile]]:
    """Return base and adapters as they can be merged, unchanged if the ends need no change.

    Raises:
        UserError: a weight that the adapter was trained with is neither in it nor in the base.
    """
    ends = _ends(base, trust)
    adapters = [_without_copies(adapter, base, ends) for adapter in adapters]
    changing = [adapter for adapter in adapters if {ends.embedding, ends.head} & {*adapter.deltas, *adapter.replaced}]
    if ends.embedding not in ends.stored:
        return base, list(adapters)
    result, rows = (base, list(adapters)), base.tensors[ends.place(ends.embedding)].shape[0]
    if changing:
        result, rows = _fitted(base, adapters, changing[0], ends, trust)
    for adapter in adapters:
        require_rows_for_tokens(adapter.folder, base.folder, rows)
    return result


def _ends(base: Checkpoint, trust: Trust) -> _Ends:
    modules = modules_in(base.folder, trust)
    embedding, head = f"{modules.embeddings[0]}.weight", f"{modules.head}.weight"
    layout = read_layout(base.folder, base.tensors, (), trust)
    stored = {name: found[0] for name in (embedding, head) if len(found := layout.stored_as(name)) == 1}
    # transformers does not tie two weights that are both on disk and differ.
    parted = len(stored) == 2 and not torch.equal(*map(base.read, stored.values()))
    return _Ends(embedding, head, modules.tied and not parted, stored)


def _without_copies(adapter: AdapterFile, base: Checkpoint, ends: _Ends) -> AdapterFile:
    """Drop what PEFT only copied from the base: the output layer itself, next to its pair."""
    copies = {
        name
        for name in (ends.embedding, ends.head)
        if (tensor := adapter.replaced.get(name)) is not None
        and (stored := ends.stored.get(name, ends.place(ends.embedding) if ends.tied else None)) in base.tensors
        and base.tensors[stored].shape == tensor.shape
        and torch.equal(base.read(stored).float(), tensor.float())
    }
    kept = {name: tensor for name, tensor in adapter.replaced.items() if name not in copies}
    return replace(adapter, replaced=kept) if copies else adapter


def _fitted(
    base: Checkpoint, adapters: Sequence[AdapterFile], adapter: AdapterFile, ends: _Ends, trust: Trust
) -> tuple[tuple[Checkpoint, list[AdapterFile]], int]:
    """Return base and adapters as they can be merged, and the number of rows of the embedding."""
    embedding, head = _own_weights(adapter, ends)
    rows = _rows(base, adapters, adapter, ends, (embedding, head))
    tensors, replaced, config = dict(base.tensors), dict(adapter.replaced), dict(base.config)
    at_embedding, at_head = ends.place(ends.embedding), ends.place(ends.head)
    changes = [f"the embedding has {rows:,} rows"] if rows != base.tensors[at_embedding].shape[0] else []
    named = {name for each in adapters for name in each.deltas}
    parted = ends.tied and (
        not named.isdisjoint({ends.embedding, ends.head}) or not _equal(base, ends, embedding, head)
    )
    if parted:
        if modules_in(base.folder, trust, tie_word_embeddings=False).tied:
            raise UserError(
                f"{adapter.folder} changes one of {ends.embedding} and {ends.head}, which the base's class always ties",
                "merge it with PEFT itself, and make sure that the two stay separate",
            )
        config |= _setting(config, "tie_word_embeddings", False)
        if at_head not in tensors:
            tensors = base.with_copy(at_head, at_embedding).tensors
        changes.append(f"{ends.head} is no longer tied to {ends.embedding}")
    elif ends.tied:
        tensors.pop(at_head, None)  # a copy of the embedding
        replaced.pop(ends.head, None)
        head = None
    for name, tensor in ((ends.embedding, embedding), (ends.head, head)):
        if tensor is not None:
            replaced[name] = tensor
    for name, tensor in replaced.items():  # including a bias of the output layer
        if (at := ends.place(name)) in tensors and name.rpartition(".")[0] in (ends.embedding[:-7], ends.head[:-7]):
            tensors[at] = replace(tensors[at], shape=tuple(tensor.shape))
    every = [replace(each, replaced=replaced) if each is adapter else each for each in adapters]
    if not changes and tensors == base.tensors:
        return (base, every), rows
    config |= _setting(config, "vocab_size", rows)
    values: dict[str, Any] = {field.name: getattr(base, field.name) for field in fields(base)}
    values |= {"tensors": tensors, "config": config}
    note = "; ".join(changes) or f"{ends.head} is stored once, with {ends.embedding}"
    return (FittedCheckpoint(**values, rows=rows, note=note), every), rows


def _own_weights(adapter: AdapterFile, ends: _Ends) -> tuple[Tensor | None, Tensor | None]:
    """Return the adapter's embedding and output layer; None for that of the base.

    In a tied model, a weight that is not a separate copy (`modules_to_save`) belongs to both ends.
    """
    embedding, head = adapter.replaced.get(ends.embedding), adapter.replaced.get(ends.head)
    if not ends.tied:
        return embedding, head
    saved = read_adapter_config(adapter.folder).values.get("modules_to_save") or []
    own = {
        name
        for name in (ends.embedding, ends.head)
        if name in adapter.replaced and any(f".{name[:-7]}".endswith(f".{module}") for module in saved)
    }
    shared = next((adapter.replaced[n] for n in (ends.embedding, ends.head) if n in {*adapter.replaced} - own), None)
    return (embedding if ends.embedding in own else shared, head if ends.head in own else shared)


def _rows(
    base: Checkpoint,
    adapters: Sequence[AdapterFile],
    adapter: AdapterFile,
    ends: _Ends,
    own: tuple[Tensor | None, Tensor | None],
) -> int:
    """Return the number of rows of both ends.

    Raises:
        UserError: they differ, so one of the weights is missing.
    """
    before = base.tensors[ends.place(ends.embedding)].shape[0]
    names = {ends.embedding: own[0], ends.head: own[1]}
    rows = {name: before if tensor is None else tensor.shape[0] for name, tensor in names.items()}
    for each in adapters:
        rows |= {name: len(each.deltas[name].b) for name in names if name in each.deltas and names[name] is None}
        for name in names:
            if name in each.deltas and len(each.deltas[name].b) != rows[name]:
                raise UserError(
                    f"{each.folder}: the change of {name} has {len(each.deltas[name].b):,} rows, the weight itself "
                    f"{rows[name]:,}"
                )
    new = {count for count in rows.values() if count != before}
    if not new:
        return before
    lacking = [name for name in names if names[name] is None or rows[name] == before]
    if lacking or len(new) > 1:
        missing = lacking[0] if lacking else ends.head
        raise rows_not_saved(adapter.folder, before, max(new), missing)
    return new.pop()


def rows_not_saved(adapter: Path, before: int, rows: int, weight: str) -> UserError:
    """Return the error for an adapter of a resized embedding that lacks one of the two resized weights."""
    return UserError(
        f"{adapter} was trained on a model whose embedding had been resized from {before:,} to {rows:,} rows, but has "
        f"no {weight} of that size: its new rows were not saved",
        SAVE_BOTH,
    )


def _equal(base: Checkpoint, ends: _Ends, embedding: Tensor | None, head: Tensor | None) -> bool:
    if embedding is head:
        return True
    values = [base.read(ends.place(ends.embedding)) if tensor is None else tensor for tensor in (embedding, head)]
    return values[0].shape == values[1].shape and torch.equal(*(value.float() for value in values))


def _setting(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a setting of config.json; models of several parts also have it in the language model's section."""
    text = config.get("text_config")
    inner = {"text_config": {**text, key: value}} if isinstance(text, dict) else {}
    return inner if inner and key not in config else {key: value, **inner}


def require_rows_for_tokens(adapter: Path, base: Path | None, rows: int) -> None:
    """Check that the embedding has a row for every token that the adapter's tokenizer adds to the base's.

    Raises:
        UserError: it has none: the model was resized in training, and the new rows were not saved.
    """
    if new := new_tokens(adapter, base, rows):
        number, token = next(iter(new.items()))
        raise UserError(
            f"the tokenizer of {adapter} has the token {token!r} ({number}), but the embeddings of "
            f"{base or 'the base'} and of the adapter have only {rows:,} rows: the model was resized in training, and "
            "its new rows were not saved",
            SAVE_BOTH,
        )
