"""Gates as one safetensors file: tensors by number, and in its metadata which layers each gate serves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from folora_q.core import SpectralGate
from folora_q.files import atomic_write


def save_gates(path: Path, gates: Mapping[str, SpectralGate]) -> None:
    """Write every distinct gate once, with the names of the layers that share it."""
    distinct = {id(gate): gate for gate in gates.values()}
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, object]] = []
    for number, (identity, gate) in enumerate(distinct.items()):
        state = gate.state_dict()
        tensors |= {f"{number}.{k}": v.contiguous().cpu() for k, v in state.items() if isinstance(v, Tensor)}
        entries.append(
            {
                "modules": [name for name, other in gates.items() if id(other) == identity],
                "settings": {k: v for k, v in state.items() if not isinstance(v, Tensor)},
            }
        )
    atomic_write(path, save(tensors, metadata={"gates": json.dumps(entries)}))


def load_gates(path: Path) -> dict[str, SpectralGate]:
    """The gates of a file by layer, sharing objects as they were saved."""
    gates: dict[str, SpectralGate] = {}
    with safe_open(path, framework="pt") as file:
        for number, entry in enumerate(json.loads(file.metadata()["gates"])):
            prefix = f"{number}."
            tensors = {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
            gates |= dict.fromkeys(entry["modules"], SpectralGate.from_state_dict(tensors | entry["settings"]))
    return gates
