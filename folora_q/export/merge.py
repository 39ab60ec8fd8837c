"""Adds an adapter to its base, shard by shard: W + Σ wᵢ sᵢ Bᵢ Aᵢ, summed in float32 and rounded once.

In memory are one shard that is read and one that is written, never the model. Nothing needs a GPU.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from folora_q.errors import UserError
from folora_q.export.adapter import AdapterFile, Delta
from folora_q.files import commit_directory, free_bytes
from folora_q.models.checkpoint import INDEX, SINGLE, Checkpoint
from folora_q.models.quantization import Quantization, quantized_weights
from folora_q.models.trust import NOTHING, Trust

BaseWeights = Literal["original", "dequantized"]
# Written last, with the result of the verification; a merged folder without it was not finished.
REPORT = "merge.json"
# Files that go with a model besides its weights: the adapter's own, where it has one, else the base's.
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
# Room on the disk for configuration, tokenizer and the file system's own.
SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Merge:
    """What is merged into what.

    Attributes:
        adapters: with their weights w.
        weights: the base's weights as they are, or as they were in 4 bits in training.
        dtype: of the merged model.
        quantization: how the base was held in training, for `dequantized`.
        trust: what building the base may do.
    """

    base: Checkpoint
    adapters: Sequence[tuple[AdapterFile, float]]
    weights: BaseWeights
    dtype: torch.dtype
    quantization: Quantization
    trust: Trust = NOTHING

    def __post_init__(self) -> None:
        """Find what cannot be merged before anything is written.

        Raises:
            UserError: a weight of an adapter is not in the base, has another shape, or is shared with another one.
        """
        tied = bool(self.base.config.get("tie_word_embeddings", False))
        for adapter, _ in self.adapters:
            for name, shape in _shapes(adapter):
                stored = self.base.tensors.get(name)
                if stored is None:
                    reason = (
                        "it is tied to the input embeddings" if tied and "lm_head" in name else "it has no such weight"
                    )
                    raise UserError(f"{adapter.folder} changes {name}, but of the base {self.base.folder} {reason}")
                if stored.shape != shape:
                    raise UserError(
                        f"{adapter.folder} changes {name} of shape {shape}, but in the base {self.base.folder} it is "
                        f"{stored.shape}",
                        "the adapter belongs to another base, or was trained with new tokens, which is not supported",
                    )
            if adapter.replaced and len(self.adapters) > 1:
                raise UserError(
                    f"{adapter.folder} replaces {next(iter(adapter.replaced))} as a whole; it merges alone only"
                )

    def deltas(self, name: str) -> list[tuple[float, Delta]]:
        """The changes of one weight, with the adapters' weights."""
        return [(weight, adapter.deltas[name]) for adapter, weight in self.adapters if name in adapter.deltas]

    def replacement(self, name: str) -> Tensor | None:
        """The weight that an adapter was trained with whole, if it was."""
        return next((adapter.replaced[name] for adapter, _ in self.adapters if name in adapter.replaced), None)

    @cached_property
    def quantized(self) -> set[str]:
        """Names of the base's weights that go through 4 bits; none for the original ones."""
        return quantized_weights(str(self.base.folder), self.trust) if self.weights == "dequantized" else set()

    def base_weight(self, name: str) -> Tensor:
        """A weight of the base as the merge takes it: as stored, or after the round trip through 4 bits."""
        weight = self.base.read(name)
        return self.quantization.round_trip(weight) if name in self.quantized else weight

    @property
    def changed(self) -> list[str]:
        """Names of the weights that the merge changes, in the base's order."""
        return [name for name in self.base.tensors if self.deltas(name) or self.replacement(name) is not None]

    @property
    def result_bytes(self) -> int:
        """Size of the merged weights."""
        return sum(stored.numel * self.dtype.itemsize for stored in self.base.tensors.values())


def _shapes(adapter: AdapterFile) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, delta in adapter.deltas.items():
        shape = delta.b.shape[0], delta.a.shape[1]
        yield name, shape[::-1] if delta.transposed else shape
    for name, tensor in adapter.replaced.items():
        yield name, tuple(tensor.shape)


def write_merged(
    merge: Merge,
    target: Path,
    finish: Callable[[Path], dict] = lambda folder: {},
    on_progress: Callable[[int], None] = lambda weights: None,
) -> None:
    """Write the merged model: aside, and renamed when it is whole.

    Args:
        target: a folder that does not exist, or one to replace.
        finish: called with the unfinished folder once all weights are in it; adds the card, and may raise to give the
            merge up. What it returns goes into merge.json.
        on_progress: called with the number of weights written.

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
                on_progress(1)
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
    replacement = merge.replacement(name)
    weight = merge.base_weight(name) if replacement is None else replacement
    if not weight.is_floating_point():
        return weight
    deltas = merge.deltas(name)
    if deltas:
        weight = weight.to(torch.float32, copy=True)
        for share, delta in deltas:
            weight.add_(delta.dense(), alpha=share)
    return weight.to(merge.dtype)


def _shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _write_companions(merge: Merge, staging: Path) -> None:
    config = {name: value for name, value in merge.base.config.items() if name != "quantization_config"}
    config.pop("torch_dtype", None)
    config["dtype"] = str(merge.dtype).removeprefix("torch.")
    (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    folders = [adapter.folder for adapter, _ in merge.adapters[:1]] + [merge.base.folder]
    for name in COMPANIONS:
        # A tokenizer is taken as a whole: a file of the base's beside the adapter's own could contradict it.
        own = (folders[0] / "tokenizer_config.json").exists() and name != "generation_config.json"
        for folder in folders[:1] if own else folders:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staging / name)
                break
    if merge.trust.remote_code:  # without its own code the merged model could not be loaded either
        for file in merge.base.folder.glob("*.py"):
            shutil.copyfile(file, staging / file.name)
