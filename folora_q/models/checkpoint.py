"""A model's weights as they lie on the disk: safetensors shards, read tensor by tensor, never as a whole.

Where it is allowed, pickled shards too, which torch maps into memory and takes tensors from, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from folora_q.errors import UserError, first_line
from folora_q.models.tokenizer import local_or_hub
from folora_q.models.trust import NOTHING, PICKLE_ENDING, PICKLES, SAFE, SAFE_INDEX, Trust, check_weights, shards_of
from folora_q.reading import read_object

INDEX, SINGLE = SAFE_INDEX, SAFE
PICKLE, PICKLE_INDEX = PICKLES
# Dtypes as safetensors calls them.
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
# What torch raises for a pickle that is damaged, or holds more than tensors.
PICKLE_ERRORS = (UnpicklingError, RuntimeError, EOFError, OSError, AttributeError)
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
        if stored.shard.endswith(PICKLE_ENDING):
            return unpickled(self.folder / stored.shard)[name].clone()  # two of them may be one and the same
        try:
            with safe_open(self.folder / stored.shard, "pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {name} in {self.folder / stored.shard}: {first_line(error)}") from None


def model_folder(name: str, revision: str | None, trust: Trust = NOTHING) -> Path:
    """The folder of a model: a local one as it is, a GGUF file or the demo's model converted, a hub id downloaded.

    Raises:
        UserError: there is no such model.
    """
    patterns = [*PATTERNS, *["*.bin"] * trust.pickle, *["*.py"] * trust.remote_code]
    source = local_or_hub(name)
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises whatever its transport does
        reason = first_line(error)
        raise UserError(
            f"cannot find the base model {name}: {reason}",
            "name the folder that it is in with --base-model",
        ) from error


def open_checkpoint(folder: Path, trust: Trust = NOTHING) -> Checkpoint:
    """Look at every shard's header.

    Raises:
        UserError: there are no weights that `trust` lets us read, a shard is missing, damaged or outside of the folder,
            or a tensor of the index is in none.
    """
    try:
        config = read_object(folder / "config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no model's folder: config.json cannot be read ({first_line(error)})") from None
    check_weights(folder, trust)
    index, expected = INDEX, {}
    if (folder / INDEX).exists():
        expected = shards_of(folder / INDEX)
    elif (folder / SINGLE).exists():
        expected = {"": SINGLE}
    elif (folder / PICKLE_INDEX).exists():
        index, expected = PICKLE_INDEX, shards_of(folder / PICKLE_INDEX, PICKLE_ENDING)
    elif (folder / PICKLE).exists():
        expected = {"": PICKLE}
    else:
        raise UserError(f"{folder} holds no weights: there is no {SINGLE}, and no {INDEX}")
    shards = list(dict.fromkeys(expected.values()))
    expected.pop("", None)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        if shard.endswith(PICKLE_ENDING):
            tensors |= {
                name: StoredTensor(shard, tuple(tensor.shape), DTYPES.get(tensor.dtype, str(tensor.dtype)))
                for name, tensor in unpickled(folder / shard).items()
            }
            continue
        try:
            with safe_open(folder / shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no dict)
                    piece = file.get_slice(name)
                    tensors[name] = StoredTensor(shard, tuple(piece.get_shape()), piece.get_dtype())
        except FileNotFoundError:
            raise UserError(f"the shard {folder / shard} is missing") from None
        except (SafetensorError, OSError) as error:
            wanted = next((name for name, place in expected.items() if place == shard), "its first tensor")
            raise UserError(f"the shard {folder / shard} is damaged, from {wanted} on: {first_line(error)}") from None
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise UserError(f"{folder / index} places {missing[0]} in {expected[missing[0]]}, which does not hold it")
    return Checkpoint(folder, shards, tensors, config)


def unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled shard, mapped where its format allows that; torch builds no other object from it.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"the shard {path} is missing")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except PICKLE_ERRORS as error:
        raise UserError(f"{path} cannot be read as tensors alone, and was not loaded: {first_line(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path} does not hold tensors by name")
    return found
