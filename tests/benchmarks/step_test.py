"""The benchmark of a training step computes the same loss in every way."""

from __future__ import annotations

import pytest
import torch

from benchmarks.performance.step import WAYS, _Bench


def test_every_way_computes_the_same_loss_and_takes_a_step() -> None:
    torch.manual_seed(0)
    bench = _Bench("tiny", batch=2, length=12)
    losses = {}
    for name, way in WAYS.items():
        if way.compiled:
            continue  # tests/training/compiled_layers_test.py
        assert bench.step(way) > 0
        with torch.no_grad(), bench._computing(way):
            losses[name] = bench._loss(way).item()
    expected = losses["plain PEFT"]
    assert all(loss == pytest.approx(expected, rel=0.01) for loss in losses.values()), losses
    assert bench.operations(WAYS["the default"]) < bench.operations(WAYS["plain PEFT"])
