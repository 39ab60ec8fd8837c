"""Cache of the penalty's covariances: a second task on the same base starts with its own text.

They depend on the base model, the text whose penalty it is, and few settings. Each file has the layers that are read
together, in safetensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from folora_q.core import LowRankCovariance
from folora_q.progress import StageTimer
from folora_q.recipe.gate import GateSection
from folora_q.storage.files import atomic_write, cache_folder

# Increased when the same settings give other covariances.
FORMAT = 3
PARTS = ("basis", "eigenvalues", "numbers")  # numbers: tail, trace, count


class CachedPenalty:
    """The file with Σp of some layers, which exists if they were read before with the same text.

    Args:
        key: identifies the base model, how it computes, and the text; None: there is no file.
        widths: of the layers' inputs.
    """

    def __init__(self, key: str | None, section: GateSection, widths: Mapping[str, int], clock: StageTimer) -> None:
        self.widths, self.clock = widths, clock
        self.path: Path | None = None
        if key is not None:
            settings = [FORMAT, key, section.covariance, section.rank, section.oversampling, widths]
            digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
            self.path = cache_folder() / "penalty" / f"{digest}.safetensors"

    @property
    def exists(self) -> bool:
        return self.path is not None and self.path.exists()

    def load(self) -> dict[str, LowRankCovariance] | None:
        """Return the covariances; None if they must be collected."""
        found = None if self.path is None else read_covariances(self.path, self.widths)
        if found is not None:
            self.clock.note(f"covariances of the text to preserve read from {self.path}")
        return found

    def save(self, covariances: Mapping[str, LowRankCovariance]) -> None:
        """Write the covariances; if the disk is full, the run continues without the file."""
        if self.path is None:
            return
        try:
            write_covariances(self.path, covariances)
        except OSError as error:
            self.clock.note(f"covariances could not be saved in {self.path}: {error.strerror}")


def rounded(covariance: LowRankCovariance) -> LowRankCovariance:
    """Return the covariance as it is stored, with its directions in float32, so that reading it changes no bit."""
    return replace(covariance, basis=covariance.basis.float().double())


def write_covariances(path: Path, covariances: Mapping[str, LowRankCovariance]) -> None:
    """Write the covariances of some layers.

    Raises:
        OSError: the file cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, each in covariances.items():
        numbers = torch.tensor([each.tail, each.trace, each.count], dtype=torch.float64)
        parts = (each.basis.float().contiguous(), each.eigenvalues.contiguous(), numbers)
        tensors |= {f"{name}/{part}": tensor for part, tensor in zip(PARTS, parts, strict=True)}
    atomic_write(path, save(tensors))


def read_covariances(path: Path, widths: Mapping[str, int]) -> dict[str, LowRankCovariance] | None:
    """Read the covariances of some layers; None if there is no such file, or it holds anything else.

    Args:
        widths: of the layers' inputs. One that no token reached has no covariance.
    """
    try:
        tensors = load_file(path)
        found = {}
        for name in widths:
            if any(f"{name}/{part}" in tensors for part in PARTS):
                basis, eigenvalues, numbers = (tensors.pop(f"{name}/{part}") for part in PARTS)
                tail, trace, count = numbers.tolist()
                found[name] = LowRankCovariance(basis.double(), eigenvalues.double(), tail, trace, int(count))
                whole = torch.cat([basis.double().flatten(), eigenvalues.double(), numbers.double()])
                if basis.shape != (widths[name], len(eigenvalues)) or not bool(whole.isfinite().all()):
                    return None
        return None if tensors else found
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
        return None
