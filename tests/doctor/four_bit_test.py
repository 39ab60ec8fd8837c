"""The 4-bit layer is right here, and each way in which it can be wrong is found."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit

from folora_q.doctor import Finding, State, four_bit
from folora_q.doctor.four_bit import check_four_bit
from folora_q.models import load


def check() -> Finding:
    (found,) = check_four_bit()
    return found


@pytest.mark.parametrize("bf16", [True, False])
def test_the_layer_is_right_in_every_precision(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bf16)
    found = check()
    assert found.state is State.GOOD, found
    assert "gradients correct to" in found.fact


def wrap_backward(monkeypatch: pytest.MonkeyPatch, change) -> None:
    backward = bnb.autograd._functions.MatMul4Bit.backward

    def changed(ctx, gradient):
        return tuple(change(g) if isinstance(g, torch.Tensor) else g for g in backward(ctx, gradient))

    monkeypatch.setattr(bnb.autograd._functions.MatMul4Bit, "backward", staticmethod(changed))


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrap_backward(monkeypatch, lambda g: 1.05 * g)
    found = check()
    assert found.state is State.FAILURE
    assert found.fact.endswith(
        "differs from the dense product: gradient off by 5%, gradient after an evaluation off by 5%"
    )
    assert '--no-deps "bitsandbytes>=0.50"; if' in found.fix


def test_a_gradient_that_is_not_finite_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrap_backward(monkeypatch, lambda g: g * float("nan"))
    assert "gradient not finite" in check().fact


def test_a_wrong_output_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: forward(self, x) * (1.0 if len(x) > 1 else 1.1))
    assert check().fact.endswith("differs from the dense product: output for one token off by 10%")


def test_wrong_weights_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    load_weight = Linear4bit.load_state_dict
    monkeypatch.setattr(
        Linear4bit, "load_state_dict", lambda self, state: load_weight(self, {"weight": 1.3 * state["weight"]})
    )
    found = check()
    assert found.state is State.FAILURE
    assert found.fact.endswith("differs from the dense product: weights off by 32%")


def test_an_evaluation_that_costs_the_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the guard of models/load.py; simulated where the CPU has no AVX512-BF16."""
    forward = Linear4bit.forward

    def repacking(self, x):
        if not self.training:
            self.repacked = True
        return forward(self, x).detach() if getattr(self, "repacked", False) else forward(self, x)

    monkeypatch.setattr(Linear4bit, "forward", repacking)
    found = check()
    assert found.state is State.FAILURE
    assert found.fact.endswith("differs from the dense product: no gradient after an evaluation")


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks on AVX512-BF16 only")
def test_the_guard_is_what_keeps_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "guard_cpu_kernels", lambda model: 0)
    assert "no gradient after an evaluation" in check().fact


def test_a_native_library_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(hardware):
        raise RuntimeError("\n🚨 CUDA VERSION MISMATCH 🚨\nRequested CUDA version: 12.4\n")

    monkeypatch.setenv("BNB_CUDA_VERSION", "124")
    monkeypatch.setattr(four_bit, "_errors", broken)
    found = check()
    assert found.state is State.FAILURE and found.fact.endswith(": 🚨 CUDA VERSION MISMATCH 🚨")
    assert found.fix.startswith("unset BNB_CUDA_VERSION; then ")
    monkeypatch.undo()
    monkeypatch.setattr(bnb.cextension, "lib", bnb.cextension.ErrorHandlerMockBNBNativeLibrary("not there"))
    assert check().state is State.WARNING


def test_a_full_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(hardware):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(four_bit, "_errors", full)
    assert "nvidia-smi" in check().fix
