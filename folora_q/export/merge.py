"""Merge adapters into their base, shard by shard: W + Σ wᵢ sᵢ Bᵢ Aᵢ, summed in float32 and rounded once.

Only one shard that is read and one that is written are in memory, never the complete model. No GPU is needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from folora_q.errors import UserError
from folora_q.models.adapter_file import AdapterFile, Delta
from folora_q.models.layout import Layout, quantized_parameters, read_layout
from folora_q.models.quantization import Quantization
from folora_q.models.trust import NOTHING, Trust
from folora_q.models.weight_files import INDEX, SINGLE, Checkpoint
from folora_q.runs.folder import MERGE_REPORT as REPORT
from folora_q.storage.files import commit_directory, free_bytes

BaseWeights = Literal["original", "dequantized"]
# Files that accompany a model's weights: the adapter's own if it has them, else the base's.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
# Disk space for configuration, tokenizer and file system.
SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Merge:
    """The base, adapters and settings of a merge.

    Attributes:
        adapters: with their weights w; base and adapters are the result of `fitted`.
        weights: the base's weights as stored, or as they were in 4 bits in training.
        dtype: of the merged model.
        quantization: how the base was quantized in training, for `dequantized`.
        trust: what building the base may do.
        trained_on: the 4-bit checkpoint that the adapter was trained on, if it is not the base; the merged model is
            compared with it.
    """

    base: Checkpoint
    adapters: Sequence[tuple[AdapterFile, float]]
    weights: BaseWeights
    dtype: torch.dtype
    quantization: Quantization
    trust: Trust = NOTHING
    trained_on: Path | None = None

    def __post_init__(self) -> None:
        """Check that everything can be merged, before anything is written.

        Raises:
            UserError: a weight of an adapter is not in the base, has another shape, or is tied to another one; or the
                base does not have the requested weights.
        """
        if self.base.prequantized and self.weights == "original":
            raise UserError(
                f"{self.base.folder} was saved in 4 bits: there are no original weights to merge into",
                "leave out --base original, or name its original model with --base-model",
            )
        for adapter, _ in self.adapters:
            for name, shape in _shapes(adapter):
                stored = self._place(adapter, name)
                transposed = name in adapter.deltas and self.layout.parameter_of[stored] in self.layout.transposed
                shape = shape[::-1] if transposed else shape
                if self._shape(stored) != shape:
                    raise UserError(
                        f"{adapter.folder} changes {name} of shape {shape}, but in the base {self.base.folder} it is "
                        f"{self._shape(stored)}",
                        "the adapter belongs to another base, or was trained with new tokens, which is not supported",
                    )
            if adapter.replaced and len(self.adapters) > 1:
                raise UserError(
                    f"{adapter.folder} replaces {next(iter(adapter.replaced))} in full, so it can only be merged alone"
                )

    def _place(self, adapter: AdapterFile, name: str) -> str:
        """Return the name on disk of a weight that an adapter changes.

        Raises:
            UserError: there is none, or it cannot be changed separately.
        """
        found = self.layout.stored_as(name)
        base = f"{adapter.folder} changes {name}, but of the base {self.base.folder}"
        if len(found) > 1 or any(one in self.layout.converted for one in found):
            raise UserError(
                f"{base} it is stored as {', '.join(found[:2])}{', …' * (len(found) > 2)}, which transformers changes "
                "when it loads them",
                "merge it with PEFT itself",
            )
        if not found:
            tied = self.layout.tied.get(name)
            raise UserError(f"{base} it is tied to {tied}" if tied else f"{base} it has no such weight")
        return found[0]

    @cached_property
    def layout(self) -> Layout:
        """How the base's class uses the weights on disk."""
        names = [name for adapter, _ in self.adapters for name, _ in _shapes(adapter)]
        return read_layout(self.base.folder, self.base.tensors, names, self.trust)

    @cached_property
    def _changes(self) -> dict[str, list[tuple[float, Delta]]]:
        """Changes by the weight's name on disk."""
        found: dict[str, list[tuple[float, Delta]]] = {}
        for adapter, share in self.adapters:
            for name, delta in adapter.deltas.items():
                stored = self._place(adapter, name)
                transposed = self.layout.parameter_of[stored] in self.layout.transposed
                found.setdefault(stored, []).append((share, replace(delta, transposed=transposed)))
        return found

    @cached_property
    def _replacements(self) -> dict[str, Tensor]:
        return {
            self._place(adapter, name): tensor
            for adapter, _ in self.adapters
            for name, tensor in adapter.replaced.items()
        }

    def deltas(self, name: str) -> list[tuple[float, Delta]]:
        """Return the changes of one weight on disk, with the adapters' weights."""
        return self._changes.get(name, [])

    @cached_property
    def quantized(self) -> set[str]:
        """Names on disk of the base's weights that are quantized and dequantized; none if they are stored in 4 bits."""
        if self.weights == "original" or self.base.prequantized:
            return set()
        parameters = quantized_parameters(self.base.folder, self.quantization, self.trust)
        return {stored for stored, parameter in self.layout.parameter_of.items() if parameter in parameters}

    def base_weight(self, name: str) -> Tensor:
        """Return a weight to which changes are added: the base's as stored or as in 4 bits, or the adapter's own."""
        if name in self._replacements:
            return self._replacements[name]
        weight = self.base.read(name)
        transposed = self.layout.parameter_of.get(name) in self.layout.transposed
        if name in self.quantized:  # quantization needs (out, in)
            return self.quantization.round_trip(weight.T).T if transposed else self.quantization.round_trip(weight)
        return weight.T if transposed and self.base.tensors[name].packed else weight

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of `base_weight`."""
        stored = self.base.tensors[name]
        transposed = self.layout.parameter_of.get(name) in self.layout.transposed
        return stored.shape[::-1] if transposed and stored.packed else stored.shape

    @property
    def changed(self) -> list[str]:
        """Names of the weights that the merge changes, in the base's order."""
        return [name for name in self.base.tensors if name in self._changes or name in self._replacements]

    @property
    def result_bytes(self) -> int:
        """Size of the merged weights."""
        return sum(stored.numel * self.dtype.itemsize for stored in self.base.tensors.values())


def _shapes(adapter: AdapterFile) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, delta in adapter.deltas.items():
        yield name, (delta.b.shape[0], delta.a.shape[1])
    for name, tensor in adapter.replaced.items():
        yield name, tuple(tensor.shape)


def write_merged(
    merge: Merge,
    target: Path,
    finish: Callable[[Path], dict] = lambda folder: {},
    on_progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write the merged model to a temporary folder, and rename it when it is complete.

    Args:
        target: a folder that does not exist, or one to replace.
        finish: called with the temporary folder once all weights are in it; adds the card, and may raise to abort the
            merge. Its result is written to merge.json.
        on_progress: called with the bytes of each merged weight; they add up to `merge.result_bytes`.

    Raises:
        UserError: there is no room on the disk, or a weight of the base cannot be read.
    """
    needed, free = merge.result_bytes + SPARE_BYTES, free_bytes(target.parent)
    if free < needed:
        raise UserError(
            f"the merged model needs {needed / 1e9:.1f} GB at {target.parent}, where {free / 1e9:.1f} GB are free",
            "name another place with --output, or a smaller --dtype",
        )
    shards = {shard: _shard_name(number, len(merge.base.shards)) for number, shard in enumerate(merge.base.shards, 1)}
    with commit_directory(target) as staging:
        for shard, name in shards.items():
            merged = {}
            for tensor in merge.base.names_in(shard):
                merged[tensor] = _merged(merge, tensor)
                on_progress(merged[tensor].nbytes)
            save_file(merged, staging / name, metadata={"format": "pt"})
            del merged
        if len(shards) > 1:
            places = {tensor: shards[stored.shard] for tensor, stored in merge.base.tensors.items()}
            index = {"metadata": {"total_size": merge.result_bytes}, "weight_map": dict(sorted(places.items()))}
            (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _write_companions(merge, staging)
        report = finish(staging)
        (staging / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _merged(merge: Merge, name: str) -> Tensor:
    weight = merge.base_weight(name)
    if not weight.is_floating_point():
        return weight
    deltas = merge.deltas(name)
    if deltas:
        weight = weight.to(torch.float32, copy=True)
        for share, delta in deltas:
            weight.add_(delta.dense(), alpha=share)
    return weight.to(merge.dtype).contiguous()


def _shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _write_companions(merge: Merge, staging: Path) -> None:
    config = {name: value for name, value in merge.base.config.items() if name != "quantization_config"}
    config.pop("torch_dtype", None)
    config["dtype"] = str(merge.dtype).removeprefix("torch.")
    (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    folders = [adapter.folder for adapter, _ in merge.adapters[:1]] + [merge.base.folder]
    for name in COMPANIONS:
        # All files of a tokenizer have the same origin: one from the base could contradict the adapter's.
        own = (folders[0] / "tokenizer_config.json").exists() and name != "generation_config.json"
        for folder in folders[:1] if own else folders:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staging / name)
                break
    if merge.trust.remote_code:  # the merged model needs this code too
        for file in merge.base.folder.glob("*.py"):
            shutil.copyfile(file, staging / file.name)
