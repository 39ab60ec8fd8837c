"""A model's weights as they lie on the disk: safetensors shards, read tensor by tensor, never as a whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from folora_q.errors import UserError, first_line
from folora_q.models.tokenizer import local_or_hub

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What a merge needs of a hub repository.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and how large."""

    shard: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors shards.

    Attributes:
        shards: file names, in order.
        tensors: by name, in the order of the shards.
        config: config.json.
    """

    folder: Path
    shards: list[str]
    tensors: dict[str, StoredTensor]
    config: dict

    def names_in(self, shard: str) -> list[str]:
        """The tensors of one shard, in its own order."""
        return [name for name, stored in self.tensors.items() if stored.shard == shard]

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            UserError: its bytes cannot be read; shard and tensor are named.
        """
        stored = self.tensors[name]
        try:
            with safe_open(self.folder / stored.shard, "pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {name} in {self.folder / stored.shard}: {error}") from None


def model_folder(name: str, revision: str | None) -> Path:
    """The folder of a model: a local one as it is, a GGUF file or the demo's model converted, a hub id downloaded.

    Raises:
        UserError: there is no such model.
    """
    source = local_or_hub(name)
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=PATTERNS))
    except Exception as error:  # the hub client raises whatever its transport does
        reason = first_line(error)
        raise UserError(
            f"cannot find the base model {name}: {reason}",
            "name the folder that it is in with --base-model",
        ) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Look at every shard's header.

    Raises:
        UserError: there are no safetensors, a shard is missing or damaged, or a tensor of the index is in none.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no model's folder: config.json cannot be read ({error})") from None
    expected: dict[str, str] | None = None
    if (folder / INDEX).exists():
        try:
            expected = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            shards = list(dict.fromkeys(expected.values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{folder / INDEX} cannot be read: {error}") from None
    elif (folder / SINGLE).exists():
        shards = [SINGLE]
    else:
        others = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only {others[0]}, a pickle, which could run code" if others else "none"
        raise UserError(f"{folder} holds no safetensors weights ({found})", "convert them to safetensors first")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        try:
            with safe_open(folder / shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no dict)
                    piece = file.get_slice(name)
                    tensors[name] = StoredTensor(shard, tuple(piece.get_shape()), piece.get_dtype())
        except FileNotFoundError:
            raise UserError(f"the shard {folder / shard} is missing") from None
        except (SafetensorError, OSError) as error:
            wanted = next((name for name, place in (expected or {}).items() if place == shard), "its first tensor")
            raise UserError(f"the shard {folder / shard} is damaged, from {wanted} on: {error}") from None
    missing = [name for name in expected or {} if name not in tensors]
    if missing:
        raise UserError(f"{folder / INDEX} places {missing[0]} in {expected[missing[0]]}, which does not hold it")
    return Checkpoint(folder, shards, tensors, config)
