"""Check a real 4-bit layer, forward and backward, against the same product with dequantized weights."""

from __future__ import annotations

import math
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, cast

from folora_q.doctor.findings import Finding, State
from folora_q.doctor.pip import pip_install
from folora_q.doctor.requirements import requirement
from folora_q.errors import first_line

if TYPE_CHECKING:
    import torch

    from folora_q.models.hardware import Hardware

NAME = "4-bit layers"
ROWS, INPUTS, OUTPUTS = 8, 128, 256  # two blocks of quantization constants, as double quantization needs
WEIGHTS = "weights"
# Relative to the norm. Half precision rounds to 2^-8; NF4 represents Gaussian weights to within 0.1.
CLOSE_IN_16_BITS, CLOSE_IN_32_BITS, CLOSE_TO_WEIGHTS = 2e-2, 1e-3, 0.15


def check_four_bit() -> list[Finding]:
    """Run a base layer as training does, on the same device: forward, backward, evaluation, backward again."""
    import torch
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    from folora_q.models.hardware import choose_hardware

    hardware = choose_hardware()
    held = f"bitsandbytes {version('bitsandbytes')} on {hardware.device.type}, nf4, double quantization"
    try:
        errors = _errors(hardware)
    except torch.OutOfMemoryError:
        fix = "end the programs that hold the GPU's memory: nvidia-smi lists them"
        return [Finding(NAME, State.FAILURE, f"{held}: no memory for one small layer", fix)]
    except ImportError:  # of another package, which has its own check
        raise
    except Exception as error:
        return [Finding(NAME, State.FAILURE, f"{held}: {first_line(error)}", _reinstall())]
    close = CLOSE_IN_32_BITS if hardware.dtype == torch.float32 else CLOSE_IN_16_BITS
    wrong = [
        _told(name, error)
        for name, error in errors.items()
        if not error <= (CLOSE_TO_WEIGHTS if name == WEIGHTS else close)  # NaN is not
    ]
    if wrong:
        fact = f"{held}: differs from the dense product: {', '.join(wrong)}"
        return [Finding(NAME, State.FAILURE, fact, _reinstall())]
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        fact = f"{held}: correct, but slow, as its native library does not load"
        return [Finding(NAME, State.WARNING, fact, _reinstall())]
    largest = max(error for name, error in errors.items() if name != WEIGHTS)
    fact = f"{held}: outputs and gradients correct to {largest:.1g}, also after an evaluation"
    return [Finding(NAME, State.GOOD, fact)]


def _errors(hardware: Hardware) -> dict[str, float]:
    """Return the relative error of a 4-bit layer against the dense product, at each step of a run."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    from folora_q.models.load import guard_cpu_kernels

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    x = torch.randn(ROWS, INPUTS, generator=generator).to(hardware.device, hardware.dtype)
    pull = torch.randn(ROWS, OUTPUTS, generator=generator).to(hardware.device, hardware.dtype)
    layer = Linear4bit(INPUTS, OUTPUTS, bias=False, compute_dtype=hardware.dtype, quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    layer = layer.to(hardware.device).requires_grad_(False)  # the move quantizes
    guard_cpu_kernels(layer)

    dense = dequantize_4bit(layer.weight.data, cast(Params4bit, layer.weight).quant_state).float()
    right_output, right_gradient = x.float() @ dense.T, pull.float() @ dense
    output, gradient = _train_step(layer, x, pull)
    layer.eval()
    with torch.no_grad():
        evaluated, token = layer(x), layer(x[:1])  # one row, as in generation, has its own kernel
    # If evaluation repacks the weights, the gradient is missing only now (folora_q.models.load).
    output_after, gradient_after = _train_step(layer, x, pull)
    return {
        WEIGHTS: _distance(dense, weight),
        "output in training": _distance(output, right_output),
        "gradient": _distance(gradient, right_gradient),
        "output in evaluation": _distance(evaluated, right_output),
        "output for one token": _distance(token, right_output[:1]),
        "output after an evaluation": _distance(output_after, right_output),
        "gradient after an evaluation": _distance(gradient_after, right_gradient),
    }


def _train_step(
    layer: torch.nn.Module, x: torch.Tensor, pull: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the output and the gradient of the input, which adapters of earlier layers would get; None if missing."""
    import torch

    layer.train()
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        output = layer(x)
        if output.requires_grad:
            output.backward(pull)
    return output.detach(), x.grad


def _distance(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    """Return the relative distance; infinite if the value is missing, NaN if it is not finite."""
    if found is None:
        return math.inf
    error = float((found.float().cpu() - expected.cpu()).norm() / expected.cpu().norm())
    return error if math.isfinite(error) else math.nan


def _told(name: str, error: float) -> str:
    if math.isnan(error):
        return f"{name} not finite"
    return f"no {name}" if math.isinf(error) else f"{name} off by {error:.0%}"


def _reinstall() -> str:
    command = pip_install("--force-reinstall", "--no-deps", requirement("bitsandbytes"))
    # It selects the build of the library, and may be left over from another CUDA version.
    if "BNB_CUDA_VERSION" in os.environ:
        command = f"unset BNB_CUDA_VERSION; then {command}"
    return f"{command}; if that does not help, python -m bitsandbytes says more"
