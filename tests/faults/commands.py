"""Runs through the command line, in this process, with faults put in at a step; and what two runs must share."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from folora_q.cli.app import main
from folora_q.runs.folder import RunFolder

# Written once a run, so two runs cannot share it.
OF_THE_CLOCK = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


def run(*arguments: object) -> int:
    """`folora-q train ...`, and its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(["train", *map(str, arguments)])
    return caught.value.code


def assert_resumed_exactly(arguments: list[object], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run ends, when it is resumed, as one that was not interrupted."""
    straight, stopped = folder / "straight" / "run", folder / "stopped" / "run"
    assert run(*arguments, f"training.output_dir={straight}") == 0
    with monkeypatch.context() as patch:
        at_step(patch, 3, signalled(signal.SIGINT))
        assert run(*arguments, f"training.output_dir={stopped}") == 130
    assert run(*arguments, f"training.output_dir={stopped}", "--resume") == 0
    assert_the_same_run(straight, stopped)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do something once, when the metrics of a step are written."""
    append, done = RunFolder.append_metrics, []

    def watched(self: RunFolder, line: dict[str, Any]) -> None:
        append(self, line)
        if line["step"] >= step and "loss" in line and not done:
            done.append(True)
            act()

    monkeypatch.setattr(RunFolder, "append_metrics", watched)


def signalled(number: signal.Signals) -> Callable[[], None]:
    """Sends a signal to this process."""
    return lambda: os.kill(os.getpid(), number)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text("utf-8"))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock says."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [{key: value for key, value in line.items() if key not in OF_THE_CLOCK} for line in lines]


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def assert_the_same_run(one: Path, other: Path) -> None:
    """Adapter, metrics, evaluation, text and gates are equal, bit for bit."""
    weights, others = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert metrics(one) == metrics(other)
    for name in ("evaluation.json", "answers.jsonl", "proxy.jsonl", "gates.json", "gates.safetensors"):
        if (one / name).exists() or (other / name).exists():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
