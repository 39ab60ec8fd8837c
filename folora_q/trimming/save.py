"""Save a trimmed adapter: the files of the original, with other factors, and what was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file

from folora_q.models.adapter_file import PREFIX, read_tensors
from folora_q.models.adapters import AdapterPair
from folora_q.models.earlier_adapter import read_earlier, stack
from folora_q.models.trust import ADAPTER_CONFIG, PICKLED_ADAPTER, SAFE_ADAPTER
from folora_q.storage.files import atomic_write, commit_directory

CARD = "README.md"
REPORT = "trim.json"


def save_trimmed(
    adapter: Path, pairs: Sequence[AdapterPair], folder: Path, report: Mapping[str, Any], earlier: str | None = None
) -> None:
    """Write an adapter with the present factors in the original's format and dtype.

    Args:
        adapter: the folder of the original.
        pairs: the adapted layers, as they are now.
        report: what was measured, for trim.json.
        earlier: the folder of an adapter that the base carries; the sum of both is written, for the original base.
    """
    tensors = read_tensors(adapter)
    for pair in pairs:
        for half, factor in (("lora_A", pair.a), ("lora_B", pair.b)):
            name = f"{PREFIX}{pair.name}.{half}.weight"
            tensors[name] = factor.detach().to(tensors[name].dtype).cpu().contiguous()
    with commit_directory(folder) as staging:
        for file in adapter.iterdir():
            if file.is_file() and file.name not in (CARD, SAFE_ADAPTER, PICKLED_ADAPTER):
                shutil.copyfile(file, staging / file.name)
        if earlier is None:
            save_file(tensors, staging / SAFE_ADAPTER, metadata={"format": "pt"})
        else:
            with TemporaryDirectory(prefix="folora-q-") as added:
                shutil.copyfile(staging / ADAPTER_CONFIG, Path(added, ADAPTER_CONFIG))
                save_file(tensors, Path(added, SAFE_ADAPTER), metadata={"format": "pt"})
                stack(read_earlier(earlier), Path(added), staging, next(iter(tensors.values())).dtype)
        atomic_write(staging / REPORT, json.dumps(report, indent=2) + "\n")
        atomic_write(staging / CARD, _card(report))


def _card(report: Mapping[str, Any]) -> str:
    chosen = report["chosen"]
    loss = "" if chosen["loss"] is None else f" Held-out task loss: {chosen['loss']:.4f} nats per token."
    return f"""# A trimmed adapter

`folora-q trim` shrank the update of the adapter {report["adapter"]}, most where it helps the task least for what is
forgotten, to {chosen["share"]:.1%} of its forgetting penalty.

KL from the base on held-out model-generated text: {chosen["kl"]["value"]:.4f} nats per token.{loss} All points that
were measured are in {REPORT}.
"""
