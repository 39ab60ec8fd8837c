"""Check which device computes, and in which precision."""

from __future__ import annotations

import os

from folora_q.doctor.findings import Finding, State


def check_compute() -> list[Finding]:
    """Report what `dtype: auto` chooses on this machine and, on a CPU, whether OMP_NUM_THREADS leaves cores idle."""
    import torch

    from folora_q.models.hardware import choose_hardware

    hardware = choose_hardware()
    findings = [Finding("precision", State.GOOD, str(hardware))]
    if hardware.dtype == torch.float16:
        fix = "nothing for now; if the loss ever becomes NaN, train with model.dtype=float32"
        findings = [Finding("precision", State.WARNING, str(hardware), fix)]
    threads, cores = torch.get_num_threads(), _cores()
    if hardware.device.type == "cpu" and "OMP_NUM_THREADS" in os.environ and 2 * threads <= cores:
        fact = f"OMP_NUM_THREADS leaves torch {threads} of {cores} CPU cores"
        findings.append(Finding("threads", State.WARNING, fact, "unset OMP_NUM_THREADS"))
    return findings


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
