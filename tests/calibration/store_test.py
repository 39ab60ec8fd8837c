"""Gates on the disk: the same ones again, or a sentence on what is wrong with the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from folora_q.calibration.gate_store import load_gates, save_gates
from folora_q.errors import UserError
from tests.conftest import random_gate

Change = Callable[[dict[str, Tensor], list[dict[str, Any]]], object]


def changed(path: Path, change: Change) -> Path:
    """A file of one gate with something changed in it."""
    save_gates(path, {"layers.0.q_proj": random_gate(16)})
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        entries = json.loads(file.metadata()["gates"])
    change(tensors, entries)
    save_file(tensors, path, metadata={"gates": json.dumps(entries)})
    return path


def cut(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].contiguous()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors, entries: tensors.pop("0.basis"), "gate 0 needs the tensors basis, penalty_gram, utility_gram"),
        (lambda tensors, entries: cut(tensors, "0.basis"), "not fit each other"),
        (lambda tensors, entries: cut(tensors, "0.utility_gram"), "the tensors of gate 0 do not fit each other"),
        (
            lambda tensors, entries: tensors["0.basis"].fill_(torch.nan),
            "basis of gate 0 holds numbers that are not finite",
        ),
        (lambda tensors, entries: tensors["0.penalty_gram"].neg_(), "the penalty covariance is not positive definite"),
        (lambda tensors, entries: entries[0]["settings"].pop("floor"), "gate 0 needs the numbers floor, gate_lambda"),
        (lambda tensors, entries: entries[0]["settings"].update(ridge="1"), "gate 0 needs the numbers"),
        (lambda tensors, entries: entries[0]["settings"].update(ridge=-1), "need ridge > 0"),
        (lambda tensors, entries: entries[0]["settings"].update(utility_tail=-1), "gate 0 has a negative variance"),
        (lambda tensors, entries: entries[0].update(modules=[1]), "gate 0 names no layers"),
        (lambda tensors, entries: entries.insert(0, None), "gate 0 names no layers"),
    ],
)
def test_gates_that_no_run_has_written(change: Change, reason: str, tmp_path: Path) -> None:
    path = changed(tmp_path / "gates.safetensors", change)
    with pytest.raises(UserError) as caught:
        load_gates(path)
    assert caught.value.message.startswith(f"cannot read the gates in {path}: ") and reason in caught.value.message


@pytest.mark.parametrize("content", [b"", b"{}", b"\x02" + bytes(7) + b"{}", b"\xff" * 100])
def test_a_file_that_holds_no_gates(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "gates.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="cannot read the gates in "):
        load_gates(tmp_path / "gates.safetensors")


def test_nothing_changed_is_nothing_wrong(tmp_path: Path) -> None:
    assert list(load_gates(changed(tmp_path / "gates.safetensors", lambda *_: None))) == ["layers.0.q_proj"]
