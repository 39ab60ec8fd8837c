"""What this machine can do. Every answer comes with its reason, which the run prints."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Hardware:
    """Where the model runs and in which precision it computes."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        """For people, e.g. "bfloat16 on CPU, which has bfloat16 instructions"."""
        return f"{str(self.dtype).removeprefix('torch.')} on {self.reason}"


def choose_hardware(dtype: str = "auto") -> Hardware:
    """The first GPU if there is one, and the fastest compute dtype that is safe there.

    Args:
        dtype: "auto", or a dtype's name, which is then taken as it is.
    """
    if torch.cuda.is_available():
        device, name = torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
        automatic = (
            (torch.bfloat16, "which has bfloat16")
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else (torch.float16, "which has no bfloat16")
        )
    else:
        device, name = torch.device("cpu"), "CPU"
        automatic = (
            (torch.bfloat16, "which has bfloat16 instructions")
            if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            else (torch.float32, "which has no bfloat16 instructions")
        )
    if dtype != "auto":
        return Hardware(device, getattr(torch, dtype), f"{name}, {dtype} as the recipe says")
    return Hardware(device, automatic[0], f"{name}, {automatic[1]}")
