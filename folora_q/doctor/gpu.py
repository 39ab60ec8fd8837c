"""Check the GPU: present, visible to PyTorch, and supported by this build of PyTorch."""

from __future__ import annotations

import os
import re

from folora_q.doctor.findings import Finding, State
from folora_q.doctor.nvidia import Card, Driver, ask_driver, torch_install
from folora_q.doctor.requirements import requirement
from folora_q.errors import first_line

NAME = "gpu"
# With a smaller share free, other programs hold memory that a recipe expects to have.
MOSTLY_FREE = 0.75
ON_THE_CPU = "training runs on the CPU, which is enough for the demo"

IN_A_CONTAINER = "a container needs docker run --gpus all"


def check_gpu() -> list[Finding]:
    """Report the GPU that training would use, or why it uses none."""
    import torch

    driver = ask_driver()
    if torch.cuda.is_available():
        return [_seen(driver)]
    if driver is not None and driver.cards:
        return [_unused(driver)]
    build = f"torch is {_build()}"
    if driver is not None:
        fact = f"none usable: nvidia-smi fails ({driver.trouble}); {build}"
        fix = f"restart the machine (necessary after a driver update), or reinstall the driver; {IN_A_CONTAINER}"
        return [Finding(NAME, State.WARNING, fact, fix)]
    fix = f"nothing: {ON_THE_CPU}; if there is a GPU, install its driver"
    return [Finding(NAME, State.WARNING, f"none found; {build}", fix)]


def _seen(driver: Driver | None) -> Finding:
    import torch

    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if torch.version.hip is None and not _built_for(major, minor):
        # By what torch sees: with several cards it may use another than nvidia-smi lists first.
        card = Card(name, driver.cards[0].driver, float(f"{major}.{minor}")) if driver and driver.cards else None
        fix = _reinstall(Driver((card,))) if card else "install a torch that was built for it: https://pytorch.org"
        fact = f"torch, {_build()}, has no code for {name}, compute capability {major}.{minor}"
        return Finding(NAME, State.FAILURE, fact, fix)
    free, total = torch.cuda.mem_get_info()
    memory = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    fact = f"{name}, compute capability {major}.{minor}, {memory}; torch is {_build()}"
    if driver is not None and driver.cards:
        fact += f"; driver {driver.cards[0].driver}"
    if (count := torch.cuda.device_count()) > 1:
        fact += f"; one of {count} GPUs, and training uses one"
    if free < MOSTLY_FREE * total:
        fix = "end the programs that hold its memory: nvidia-smi lists them"
        return Finding(NAME, State.WARNING, fact, fix)
    return Finding(NAME, State.GOOD, fact)


def _unused(driver: Driver) -> Finding:
    """Report a GPU that the driver lists but torch does not use."""
    import torch

    card = driver.cards[0]
    there = f"{card.name}, driver {card.driver}, is there"
    if torch.version.cuda is None:
        return Finding(NAME, State.FAILURE, f"{there}, but torch is {_build()}", _reinstall(driver))
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None and visible in ("", "-1"):
        fact = f"{there}, hidden by CUDA_VISIBLE_DEVICES; {ON_THE_CPU}"
        return Finding(NAME, State.WARNING, fact, "unset CUDA_VISIBLE_DEVICES")
    reason = "it does not say why"
    try:
        torch.cuda.init()
    except Exception as error:
        reason = first_line(error)
    if "driver" in reason and "too old" in reason:
        fix = _reinstall(driver)
    else:
        fix = f"sudo modprobe nvidia_uvm, or restart the machine; {IN_A_CONTAINER}"
    return Finding(NAME, State.FAILURE, f"{there}, but torch, {_build()}, cannot use it: {reason}", fix)


def _build() -> str:
    import torch

    if torch.version.hip is not None:
        return f"built for ROCm {torch.version.hip}"
    return "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"


def _built_for(major: int, minor: int) -> bool:
    """Whether torch has code for a GPU. Machine code runs on later GPUs of its generation, PTX on all later ones."""
    import torch

    targets = [
        (kind, int(of_major), int(of_minor))
        for kind, of_major, of_minor in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))
    ]
    return not targets or any(
        (kind == "compute" or major == of_major) and (of_major, of_minor) <= (major, minor)
        for kind, of_major, of_minor in targets
    )


def _reinstall(driver: Driver) -> str:
    return torch_install(driver, requirement("torch"))
