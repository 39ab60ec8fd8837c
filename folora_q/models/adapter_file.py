"""Read a LoRA adapter in PEFT's format, from any trainer, as changes of weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from folora_q.errors import UserError, first_line
from folora_q.models.adapter_config import AdapterConfig, read_adapter_config
from folora_q.models.quantization import Quantization
from folora_q.models.trust import NOTHING, PICKLED_ADAPTER, SAFE_ADAPTER, Trust, check_adapter
from folora_q.models.weight_files import unpickled
from folora_q.recipe.paths import short

PREFIX = "base_model.model."
ORIGINAL = ".original_module."
EMBEDDING_HALVES = (".lora_embedding_A", ".lora_embedding_B")
# Limits for tensors; a merge adds in float32.
MAX_DIMENSIONS = 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Delta:
    """The change of one weight: ΔW = scale B A, or its transpose if the base stores the weight as (in, out).

    Attributes:
        a: (r, in). b: (out, r).
        transposed: whether it is the transpose, which depends on the base's class, not on the adapter.
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ΔW in the shape of the weight, computed in `dtype`."""
        product = (self.b.to(dtype) @ self.a.to(dtype)) * self.scale
        return product.T if self.transposed else product


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder.

    Attributes:
        base, revision: the model that it belongs to.
        deltas: by weight name, such as model.layers.0.self_attn.q_proj.weight.
        replaced: weights that were trained in full (`modules_to_save`), or the base's weights that PEFT saved next to
            their pair (embeddings and head), by name.
        quantization: of the base in training, as folora-q writes it; None for an adapter trained elsewhere.
    """

    folder: Path
    base: str
    revision: str | None
    deltas: dict[str, Delta]
    replaced: dict[str, Tensor]
    quantization: Quantization | None


def read_adapter(folder: Path, trust: Trust = NOTHING) -> AdapterFile:
    """Read an adapter in PEFT's format.

    Raises:
        UserError: it is not a LoRA adapter, uses something that s B A cannot represent, lacks one half of a pair, has
            an invalid rank, number or file, or needs more than `trust` allows; the message names the tensor.
    """
    config = read_adapter_config(folder)
    check_adapter(folder, trust)
    tensors = read_tensors(folder)
    deltas: dict[str, Delta] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ORIGINAL in name:  # the base's weight, which PEFT saves next to the trained one
            continue
        _check_tensor(f"{folder / SAFE_ADAPTER}: {short(name)}", tensor)
        module, kind, _ = name.removeprefix(PREFIX).partition(".lora_")
        if not kind:
            whole = name.removeprefix(PREFIX).replace(".base_layer.", ".")
            replaced[whole.replace(".modules_to_save.", ".")] = tensor
        elif name.endswith(".lora_A.weight"):
            b = tensors.get(name.replace(".lora_A.", ".lora_B."))
            if b is None:
                raise UserError(f"{folder / SAFE_ADAPTER}: {short(name)} has no matching lora_B")
            deltas[f"{module}.weight"] = _delta(config, module, tensor, b)
        elif name.endswith(EMBEDDING_HALVES) and (other := tensors.get(_other_half(name))) is not None:
            if name.endswith("A"):  # an embedding's weight is (tokens, out), the transpose of a linear layer's
                pair = _delta(config, module, other.T, tensor.T)
                deltas[f"{module}.weight"] = replace(pair, transposed=False)
        elif not (name.endswith(".lora_B.weight") and name.replace(".lora_B.", ".lora_A.") in tensors):
            raise UserError(
                f"{folder / SAFE_ADAPTER}: {short(name)} does not belong to a pair of lora_A.weight and lora_B.weight"
            )
    return AdapterFile(
        folder=folder,
        base=config.base,
        revision=config.revision,
        deltas=deltas,
        replaced=replaced,
        quantization=config.quantization,
    )


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Check that a tensor can be a weight.

    Raises:
        UserError: it has another dtype, too many dimensions, no numbers, or numbers that are not finite.
    """
    if tensor.dtype not in DTYPES or tensor.ndim > MAX_DIMENSIONS:
        held = f"{tensor.dtype} in {tensor.ndim} dimensions".removeprefix("torch.")
        raise UserError(f"{name} holds {held}, which is not a weight")
    if tensor.numel() == 0:
        raise UserError(
            f"{name} is empty, as after saving from DeepSpeed's ZeRO-3",
            "save the adapter again with `stage3_gather_16bit_weights_on_model_save`",
        )
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{name} holds numbers that are not finite")


def _other_half(name: str) -> str:
    return name[:-1] + ("B" if name.endswith("A") else "A")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder by name, as PEFT wrote them.

    Raises:
        UserError: there are none, or the file is damaged.
    """
    path = folder / SAFE_ADAPTER
    if not path.exists() and (folder / PICKLED_ADAPTER).exists():  # `check_adapter` has allowed it
        return unpickled(folder / PICKLED_ADAPTER)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is not a dict)
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from None


def _delta(config: AdapterConfig, module: str, a: Tensor, b: Tensor) -> Delta:
    rank = config.rank(module)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise UserError(
            f"{config.path.parent}: A {short(tuple(a.shape))} and B {short(tuple(b.shape))} of {short(module)} "
            f"are not a pair of rank {rank}"
        )
    return Delta(a.float(), b.float(), config.scale(module))
