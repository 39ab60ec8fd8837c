"""Resize the base's embedding for adapters that were trained on a resized one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from folora_q.errors import UserError
from folora_q.export.ends import require_rows_for_tokens, rows_not_saved
from folora_q.models.adapter_file import PREFIX
from folora_q.models.meta import modules_of
from folora_q.models.parts import embedding_rows
from folora_q.models.trust import SAFE_ADAPTER

# Name parts that PEFT inserts between a module's name and `weight`.
BETWEEN = (".modules_to_save", ".base_layer", "")


@dataclass(frozen=True)
class _Saved:
    """A weight in an adapter's file."""

    path: Path
    name: str
    rows: int

    def read(self) -> Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.name)


def fit_embedding(model: PreTrainedModel, adapter: Path, base: Path | None, compare: bool) -> None:
    """Resize the model's embedding to the size of the one in the adapter.

    Args:
        base: the folder with the base's files, if known.
        compare: whether the model with the adapter off must equal the base.

    Raises:
        UserError: the adapter was trained with rows that it does not contain; or it replaces the embedding, so that
            switching it off does not give the base.
    """
    modules, before = modules_of(model), embedding_rows(model)
    saved = {name: _saved(adapter / SAFE_ADAPTER, name) for name in (modules.embeddings[0], modules.head)}
    found = [one for one in saved.values() if one is not None]
    rows = max((one.rows for one in found), default=before)
    if rows == before:
        require_rows_for_tokens(adapter, base, rows)
        return
    lacking = [name for name, one in saved.items() if one is None or one.rows != rows]
    if lacking and not (modules.tied and len(lacking) < len(saved)):
        raise rows_not_saved(adapter, before, rows, f"{lacking[0]}.weight")
    if compare and (name := _changed(model, found, before)) is not None:
        raise UserError(
            f"the adapter {adapter} replaces {name} of the base, also when it is switched off, so base and tuned model "
            "cannot be compared",
            "chat with it by `folora-q chat` without --base, or merge it with `folora-q merge`",
        )
    model.resize_token_embeddings(rows, mean_resizing=False)


def _saved(path: Path, module: str) -> _Saved | None:
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            for between in BETWEEN:
                if (name := f"{PREFIX}{module}{between}.weight") in names:
                    return _Saved(path, name, file.get_slice(name).get_shape()[0])
    except (SafetensorError, OSError):  # a pickle, or an unreadable file, which PEFT will report
        pass
    return None


def _changed(model: PreTrainedModel, found: list[_Saved], before: int) -> str | None:
    """Return a weight, outside `modules_to_save`, whose rows differ between the adapter and the base."""
    ends = modules_of(model)
    for one in found:
        if ".modules_to_save." in one.name:
            continue
        head = one.name.startswith(f"{PREFIX}{ends.head}.")
        module = model.get_output_embeddings() if head else model.get_input_embeddings()
        own = cast(torch.nn.Embedding | torch.nn.Linear, module).weight
        if not torch.equal(one.read()[:before].to(own.dtype), own.detach().cpu()[: len(one.read())]):
            return one.name.removeprefix(PREFIX)
    return None
