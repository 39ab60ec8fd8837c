"""Read GPUs and driver from nvidia-smi, and choose the build of PyTorch that suits them."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from folora_q.doctor.pip import pip_install

SECONDS = 15
WHEELS = "https://download.pytorch.org/whl"
# Builds of torch 2.11 and newer: CUDA 13 requires this driver and Turing or newer GPUs; CUDA 12.6, available up to
# torch 2.14, supports older ones, up to Hopper. https://github.com/pytorch/pytorch/issues/190355
CUDA_13, CUDA_13_DRIVER, CUDA_13_FIRST = "cu130", 580, 7.5
CUDA_12, CUDA_12_DRIVER, CUDA_12_LAST = "cu126", 525, 9.0


@dataclass(frozen=True)
class Card:
    """A GPU, as the driver sees it.

    Attributes:
        driver: its version, e.g. "580.65.06".
        capability: its compute capability, e.g. 8.9; None if an old driver does not report it.
    """

    name: str
    driver: str
    capability: float | None


@dataclass(frozen=True)
class Driver:
    """The answer of nvidia-smi: the cards, or why there are none."""

    cards: tuple[Card, ...] = ()
    trouble: str | None = None


def ask_driver() -> Driver | None:
    """Return the GPUs that nvidia-smi lists; None if there is no nvidia-smi, so probably no NVIDIA GPU."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    trouble = "it prints nothing"
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
    """Return the command that installs a torch for this machine's GPU, or for its CPU if there is none.

    Args:
        wanted: torch with its range of versions, e.g. "torch>=2.11".
    """
    # Without --force-reinstall pip keeps an installed torch of this version, whatever it was built for.
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
