"""Gates as one safetensors file (in its metadata, which layers each serves), and their numbers for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from folora_q.core import SpectralGate
from folora_q.files import atomic_write
from folora_q.runs.results import GateResult


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
    """The gates of a file by layer, on a device, sharing objects as they were saved."""
    gates: dict[str, SpectralGate] = {}
    with safe_open(path, framework="pt") as file:
        for number, entry in enumerate(json.loads(file.metadata()["gates"])):
            prefix = f"{number}."
            tensors = {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
            gates |= dict.fromkeys(
                entry["modules"], SpectralGate.from_state_dict(tensors | entry["settings"]).to(device)
            )
    return gates


def gate_results(gates: Mapping[str, SpectralGate]) -> list[GateResult]:
    """Quotients and values of every distinct gate."""
    return [
        GateResult(
            modules=modules,
            dim=gate.basis.shape[0],
            gate_lambda=gate.gate_lambda,
            quotients=gate.quotients.tolist(),
            values=gate.values.tolist(),
            complement_quotient=gate.complement_quotient,
            complement_value=gate.complement_value,
        )
        for gate, modules in _distinct(gates)
    ]


def _distinct(gates: Mapping[str, SpectralGate]) -> list[tuple[SpectralGate, list[str]]]:
    """Every gate once, with the layers that share it."""
    distinct = {id(gate): gate for gate in gates.values()}
    return [(gate, [name for name, other in gates.items() if other is gate]) for gate in distinct.values()]
