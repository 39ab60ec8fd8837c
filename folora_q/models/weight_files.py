"""Read a model's safetensors shards tensor by tensor.

If allowed, also pickled shards, which torch maps into memory and reads only tensors from. Weights that bitsandbytes
saved in 4 bits are decoded when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from folora_q.errors import UserError, first_line
from folora_q.models.stored_quantization import stored_quantization
from folora_q.models.tokenizer import local_or_hub
from folora_q.models.trust import NOTHING, PICKLE_ENDING, PICKLES, SAFE, SAFE_INDEX, Trust, check_weights, shards_of
from folora_q.storage.untrusted import read_object

INDEX, SINGLE = SAFE_INDEX, SAFE
PICKLE, PICKLE_INDEX = PICKLES
# Names of dtypes in safetensors.
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
# What torch raises for a pickle that is damaged or contains more than tensors.
PICKLE_ERRORS = (UnpicklingError, RuntimeError, EOFError, OSError, AttributeError)
# Endings that a 4-bit weight's name has for its constants.
CONSTANTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
# Bytes per number of the dtypes into which 4-bit weights are packed.
STORAGE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}
# What bitsandbytes raises for invalid constants.
UNDECODABLE = (ValueError, KeyError, TypeError, RuntimeError, AssertionError, AttributeError)
# Files of a hub repository that a merge needs.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class StoredTensor:
    """Location and shape of a tensor.

    Attributes:
        shape, dtype: as it is read; for a 4-bit weight, after decoding.
        packed: it is stored in 4 bits.
        copy_of: the name under which it is stored, if it is a copy of another one.
    """

    shard: str
    shape: tuple[int, ...]
    dtype: str
    packed: bool = False
    copy_of: str | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors shards.

    Attributes:
        shards: file names, in order.
        tensors: by name, in the order of the shards, without the constants of 4-bit weights.
        config: config.json.
        constants: for each 4-bit weight, its constants.
    """

    folder: Path
    shards: list[str]
    tensors: dict[str, StoredTensor]
    config: dict
    constants: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)

    @property
    def prequantized(self) -> bool:
        """Whether it has weights in 4 bits."""
        return bool(self.constants)

    def names_in(self, shard: str) -> list[str]:
        """Return the names of the tensors in a shard, in order."""
        return [name for name, stored in self.tensors.items() if stored.shard == shard]

    def read(self, name: str) -> Tensor:
        """Read one tensor, decoded if it is stored in 4 bits.

        Raises:
            UserError: it cannot be read; the message names shard and tensor.
        """
        stored = self.tensors[name]
        place = stored.copy_of or name
        tensor = self._read(place, stored)
        return dequantize_4bit(tensor, self._state(place)) if stored.packed else tensor

    def with_copy(self, name: str, of: str) -> Checkpoint:
        """Return the checkpoint with one more tensor, a copy of another."""
        return replace(self, tensors=self.tensors | {name: replace(self.tensors[of], copy_of=of)})

    def _state(self, name: str) -> QuantState:
        found = {other.removeprefix(f"{name}."): self._read(other, at) for other, at in self.constants[name].items()}
        try:
            return QuantState.from_dict(found, torch.device("cpu"))
        except UNDECODABLE as error:
            raise UserError(f"{self.folder}: the constants of {name} cannot be decoded: {first_line(error)}") from None

    def _decoded(self) -> Iterator[tuple[str, StoredTensor]]:
        """Yield each 4-bit weight with its shape and dtype after decoding."""
        for name in self.constants:
            state = self._state(name)
            dtype = None if state.dtype is None else DTYPES.get(state.dtype)
            held = self.tensors[name].numel * STORAGE.get(self.tensors[name].dtype, 0) * 2  # numbers of 4 bits
            if state.shape is None or dtype is None or not prod(state.shape) <= held <= prod(state.shape) + 1:
                raise UserError(f"{self.folder}: the constants of {name} are those of another weight")
            yield name, replace(self.tensors[name], shape=tuple(state.shape), dtype=dtype, packed=True)

    def _read(self, name: str, stored: StoredTensor) -> Tensor:
        if stored.shard.endswith(PICKLE_ENDING):
            return unpickled(self.folder / stored.shard)[name].clone()  # several names may refer to one tensor
        try:
            with safe_open(self.folder / stored.shard, "pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {name} in {self.folder / stored.shard}: {first_line(error)}") from None


def model_folder(name: str, revision: str | None, trust: Trust = NOTHING) -> Path:
    """Return the folder of a model: a local one, a converted GGUF file or demo model, or a downloaded hub model.

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
            "name its folder with --base-model",
        ) from error


def open_checkpoint(folder: Path, trust: Trust = NOTHING) -> Checkpoint:
    """Read the header of every shard.

    Raises:
        UserError: there are no weights that `trust` allows, a shard is missing, damaged or outside of the folder, or a
            tensor of the index is in no shard.
    """
    try:
        config = read_object(folder / "config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a model folder: config.json cannot be read ({first_line(error)})") from None
    check_weights(folder, trust)
    index, expected = _expected_shards(folder)
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
                for name in file.keys():  # noqa: SIM118  (it is not a dict)
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
    return _with_packed(Checkpoint(folder, shards, tensors, config))


def _expected_shards(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the name of the index, and the shard of every tensor; of a single file, that file by an empty name."""
    if (folder / INDEX).exists():
        return INDEX, shards_of(folder / INDEX)
    if (folder / SINGLE).exists():
        return INDEX, {"": SINGLE}
    if (folder / PICKLE_INDEX).exists():
        return PICKLE_INDEX, shards_of(folder / PICKLE_INDEX, PICKLE_ENDING)
    if (folder / PICKLE).exists():
        return INDEX, {"": PICKLE}
    raise UserError(f"{folder} holds no weights: there is no {SINGLE}, and no {INDEX}")


def _with_packed(found: Checkpoint) -> Checkpoint:
    """Separate the constants of 4-bit weights from the tensors."""
    if stored_quantization(found.config) is None:
        return found
    names = [name.removesuffix(ending) for name in found.tensors for ending in STATES if name.endswith(ending)]
    constants = {
        name: {
            f"{name}{end}": found.tensors[f"{name}{end}"]
            for end in (*CONSTANTS, *STATES)
            if f"{name}{end}" in found.tensors
        }
        for name in names
        if name in found.tensors
    }
    apart = {name for of_one in constants.values() for name in of_one}
    tensors = {name: stored for name, stored in found.tensors.items() if name not in apart}
    packed = replace(found, tensors=tensors, constants=constants)
    packed.tensors.update(packed._decoded())
    return packed


def unpickled(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a pickled shard, memory-mapped if possible; torch creates no other objects from it.

    Raises:
        UserError: it cannot be read, or contains something else.
    """
    if not path.is_file():
        raise UserError(f"the shard {path} is missing")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except PICKLE_ERRORS as error:
        raise UserError(
            f"{path} does not contain only tensors, or is damaged; it was not loaded: {first_line(error)}"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path} does not hold tensors by name")
    return found
