"""Store gates in one safetensors file, and summarize them for gates.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from folora_q.core import SpectralGate
from folora_q.errors import UserError, first_line
from folora_q.runs.results import GateResult
from folora_q.storage.files import atomic_write
from folora_q.storage.untrusted import finite, parse_json

# The keys of `SpectralGate.state_dict`.
TENSORS = {"basis", "penalty_gram", "utility_gram"}
SETTINGS = {"penalty_tail", "utility_tail", "ridge", "utility_ridge", "gate_lambda", "floor", "sharpness", "unit"}
# Settings that files of earlier versions do not have.
LATER = {"unit": 1.0}


def save_gates(path: Path, gates: Mapping[str, SpectralGate]) -> None:
    """Write every distinct gate once, with the names of the layers that share it."""
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, object]] = []
    for number, (gate, modules) in enumerate(_distinct(gates)):
        state = gate.state_dict()
        tensors |= {f"{number}.{k}": v.contiguous().cpu() for k, v in state.items() if isinstance(v, Tensor)}
        entries.append(
            {
                "modules": modules,
                "settings": {k: v for k, v in state.items() if not isinstance(v, Tensor)},
            }
        )
    atomic_write(path, save(tensors, metadata={"gates": json.dumps(entries)}))


def load_gates(path: Path, device: torch.device | str = "cpu") -> dict[str, SpectralGate]:
    """Load gates by layer onto a device; layers that shared a gate share it again.

    Raises:
        UserError: the file cannot be read, or does not contain valid gates.
    """
    gates: dict[str, SpectralGate] = {}
    try:
        with safe_open(path, framework="pt") as file:
            entries = parse_json((file.metadata() or {}).get("gates", "null"))
            if not isinstance(entries, list):
                raise ValueError("its header lists no gates")
            names = list(file.keys())
            for number, entry in enumerate(entries):
                prefix = f"{number}."
                tensors = {k.removeprefix(prefix): file.get_tensor(k) for k in names if k.startswith(prefix)}
                modules, gate = _gate(number, entry, tensors)
                gates |= dict.fromkeys(modules, gate.to(device))
    except (OSError, ValueError, SafetensorError, torch.linalg.LinAlgError) as error:
        raise UserError(
            f"cannot read the gates in {path}: {first_line(error)}",
            "train again, or remove the file to continue without gates",
        ) from None
    return gates


def _gate(number: int, entry: Any, tensors: dict[str, Tensor]) -> tuple[list[str], SpectralGate]:
    """Return the layers of one gate, and the gate.

    Raises:
        ValueError: the entry is not one that `save_gates` writes.
    """
    modules, settings = (entry.get(key) for key in ("modules", "settings")) if isinstance(entry, dict) else (None, None)
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise ValueError(f"gate {number} names no layers")
    settings = LATER | settings if isinstance(settings, dict) else {}
    if settings.keys() != SETTINGS or None in map(finite, settings.values()):
        raise ValueError(f"gate {number} needs the numbers {', '.join(sorted(SETTINGS))}")
    if tensors.keys() != TENSORS:
        raise ValueError(f"gate {number} needs the tensors {', '.join(sorted(TENSORS))}")
    width, rank = tensors["basis"].shape if tensors["basis"].ndim == 2 else (0, 0)
    if not 0 < rank <= width or any(tensors[name].shape != (rank, rank) for name in TENSORS - {"basis"}):
        raise ValueError(f"the tensors of gate {number} do not fit each other")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(f"{name} of gate {number} holds numbers that are not finite")
    if settings["penalty_tail"] < 0 or settings["utility_tail"] < 0:
        raise ValueError(f"gate {number} has a negative variance")
    return modules, SpectralGate.from_state_dict(tensors | settings)


def gate_results(
    gates: Mapping[str, SpectralGate], penalties: Mapping[str, tuple[float, float]] | None = None
) -> list[GateResult]:
    """Return quotients and values of every distinct gate.

    Args:
        penalties: of A's rows, by layer: on the gates' text, and held out (`row_penalties`).
    """
    penalties = penalties or {}
    return [
        GateResult(
            modules=modules,
            dim=gate.basis.shape[0],
            gate_lambda=gate.gate_lambda,
            quotients=gate.quotients.tolist(),
            values=gate.values.tolist(),
            complement_quotient=gate.complement_quotient,
            complement_value=gate.complement_value,
            penalty=penalties[modules[0]][0] if modules[0] in penalties else None,
            heldout_penalty=penalties[modules[0]][1] if modules[0] in penalties else None,
        )
        for gate, modules in _distinct(gates)
    ]


def _distinct(gates: Mapping[str, SpectralGate]) -> list[tuple[SpectralGate, list[str]]]:
    """Return every gate once, with the layers that share it."""
    distinct = {id(gate): gate for gate in gates.values()}
    return [(gate, [name for name, other in gates.items() if other is gate]) for gate in distinct.values()]
