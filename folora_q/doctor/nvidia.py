"""Read GPUs and driver from nvidia-smi, and which build of PyTorch suits them."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from folora_q.doctor.pip import pip_install

SECONDS = 15
WHEELS = "https://download.pytorch.org/whl"
# The builds of torch 2.11 and newer: CUDA 13 needs this driver and GPUs from Turing on; CUDA 12.6, to be had up to
# torch 2.14, takes older ones, and none newer than Hopper. https://github.com/pytorch/pytorch/issues/190355
CUDA_13, CUDA_13_DRIVER, CUDA_13_FIRST = "cu130", 580, 7.5
CUDA_12, CUDA_12_DRIVER, CUDA_12_LAST = "cu126", 525, 9.0


@dataclass(frozen=True)
class Card:
    """A GPU, as the driver sees it.

    Attributes:
        driver: its version, e.g. "580.65.06".
        capability: its compute capability, e.g. 8.9; None where an old driver does not tell.
    """

    name: str
    driver: str
    capability: float | None


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi answered: the cards, or why there are none."""

    cards: tuple[Card, ...] = ()
    trouble: str | None = None


def ask_driver() -> Driver | None:
    """The GPUs that nvidia-smi lists; None if there is no nvidia-smi, and so most likely no NVIDIA GPU."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    trouble = "it says nothing"
    for fields in ("name,driver_version,compute_cap", "name,driver_version"):  # old drivers do not know the third
        command = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return Driver(trouble=f"it does not answer within {SECONDS} s")
        except OSError as error:
            return Driver(trouble=error.strerror or type(error).__name__)
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        if not done.returncode and lines and all("," in line for line in lines):
            return Driver(tuple(map(_card, lines)))
        trouble = (lines or [*done.stderr.strip().splitlines(), f"exit code {done.returncode}"])[0]
    return Driver(trouble=trouble)


def torch_install(driver: Driver | None, wanted: str) -> str:
    """What to type for a torch that can use this machine's GPU, or its CPU if there is none.

    Args:
        wanted: torch and the range of versions, e.g. "torch>=2.11".
    """
    # Without --force-reinstall pip finds the torch that is there good enough, whatever it was built for.
    words = ["--force-reinstall", wanted, "--index-url"]
    if driver is None or not driver.cards:
        return pip_install(*words, f"{WHEELS}/cpu")
    card = driver.cards[0]
    major = int(re.split(r"\D", card.driver, maxsplit=1)[0] or 0)
    modern = card.capability is None or card.capability >= CUDA_13_FIRST
    if modern and major >= CUDA_13_DRIVER:
        return pip_install(*words, f"{WHEELS}/{CUDA_13}")
    if major >= CUDA_12_DRIVER and (card.capability or 0) <= CUDA_12_LAST:
        return pip_install(*words, f"{WHEELS}/{CUDA_12}")
    build, needed = (CUDA_13, CUDA_13_DRIVER) if modern else (CUDA_12, CUDA_12_DRIVER)
    return f"update the NVIDIA driver to {needed} or newer, then {pip_install(*words, f'{WHEELS}/{build}')}"


def _card(line: str) -> Card:
    name, driver, capability, *_ = *(part.strip() for part in line.split(",")), ""
    try:
        return Card(name, driver, float(capability))
    except ValueError:
        return Card(name, driver, None)
