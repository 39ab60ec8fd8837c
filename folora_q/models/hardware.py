"""Choose device and dtype. Every choice comes with its reason, which the run prints."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from folora_q.progress import Memory

# Linux's status of this process, and how to reset its memory peak (proc(5)).
STATUS, CLEAR_REFS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs"), "5"


@dataclass(frozen=True)
class Hardware:
    """Where the model runs and in which precision it computes.

    Attributes:
        others: which of several GPUs this is, and how to choose another; None if there is only one.
    """

    device: torch.device
    dtype: torch.dtype
    reason: str
    others: str | None = None

    def __str__(self) -> str:
        """Describe the choice, e.g. "bfloat16 on CPU, which has bfloat16 instructions"."""
        return f"{self._dtype_name} on {self.reason}"

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def facts(self) -> dict[str, str | int]:
        """Return what a run's numbers depend on besides the recipe, for run.json."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        facts = {"device": self.device.type, "dtype": self._dtype_name, "name": name}
        return {**facts, "threads": torch.get_num_threads()}


def choose_hardware(dtype: str = "auto") -> Hardware:
    """Choose the first visible GPU if there is one, and the fastest compute dtype that is safe there.

    Args:
        dtype: "auto", or the name of the dtype to use.
    """
    others = None
    if torch.cuda.is_available():
        device, name = torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
        automatic = (
            (torch.bfloat16, "which has bfloat16")
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else (torch.float16, "which has no bfloat16")
        )
        if (count := torch.cuda.device_count()) > 1:
            others = (
                f"{count} GPUs are visible, and only {device}, {name}, is used; CUDA_VISIBLE_DEVICES selects another"
            )
    else:
        device, name = torch.device("cpu"), "CPU"
        automatic = (
            (torch.bfloat16, "which has bfloat16 instructions")
            if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            else (torch.float32, "which has no bfloat16 instructions")
        )
    if dtype != "auto":
        return Hardware(device, getattr(torch, dtype), f"{name}, {dtype} as the recipe says", others)
    return Hardware(device, automatic[0], f"{name}, {automatic[1]}", others)


def used_memory(device: torch.device) -> Memory:
    """Return the memory in use: on a GPU the most allocated in this stage, on a CPU what this process has resident."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return Memory(torch.cuda.max_memory_allocated(device), total)
    return Memory(psutil.Process().memory_info().rss, psutil.virtual_memory().total)


def available_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU that this process's tensors use or can use; None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


class PeakMemory:
    """The peak memory of the device, or on a CPU of the process, since the last reset (`folora_q.progress.Meter`).

    On a CPU it is the kernel's high-water mark, which a process can reset on Linux; elsewhere nothing is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = "host" if device.type == "cpu" else "device"

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif CLEAR_REFS.exists():
            with suppress(OSError):
                CLEAR_REFS.write_text(RESET_PEAK)

    def peak(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            lines = STATUS.read_text().splitlines()
        except OSError:
            return None
        peaks = [line for line in lines if line.startswith("VmHWM:")]
        return int(peaks[0].split()[1]) * 1024 if peaks else None
