"""Check memory and disk."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from folora_q.doctor.findings import Finding, State
from folora_q.storage.files import cache_folder, free_bytes

# The demo's training takes 2.5 GB, its last measurements up to 4.
ENOUGH_MEMORY = 4e9
# A 7B model is a download of 15 GB; with less than 1 GB not even the demo finishes.
ROOMY, MIN_FREE_BYTES = 20e9, 1e9
# Where Linux states a container's memory limit: cgroup v2, and v1.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check_memory() -> list[Finding]:
    """Check the memory of the host, or the limit of the container."""
    import psutil

    memory = psutil.virtual_memory()
    fact = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    limit = _container_limit() or memory.total
    if limit < memory.total:
        fact += f", of which this container may use {limit / 1e9:.1f}"
    if min(memory.available, limit) < ENOUGH_MEMORY:
        fix = "end other programs, or give the container more: the demo needs up to 4 GB on a CPU"
        return [Finding("memory", State.WARNING, fact, fix)]
    return [Finding("memory", State.GOOD, fact)]


def check_disk() -> list[Finding]:
    """Check free space and write access where models, cached text and runs are stored, once for each disk."""
    findings, disks = [], {}
    for name, folder, cure, needed in _folders():
        place = _existing(folder)
        if (reason := _unwritable(place)) is not None:
            state = State.FAILURE if needed else State.WARNING
            findings.append(Finding("disk", state, f"cannot write to {name}: {reason}", cure))
        disks.setdefault(place.stat().st_dev, []).append((name, place, cure))
    for places in disks.values():
        _, place, cure = places[0]
        free = free_bytes(place)
        fact = f"{free / 1e9:.1f} GB free for {', '.join(name for name, _, _ in places)}"
        state = State.FAILURE if free < MIN_FREE_BYTES else State.WARNING if free < ROOMY else State.GOOD
        fix = None if state is State.GOOD else f"free some space (a 7B model is a download of 15 GB), or {cure}"
        findings.append(Finding("disk", state, fact, fix))
    return findings


def _container_limit() -> int | None:
    for path in LIMITS:
        with suppress(OSError, ValueError):  # "max" if there is no limit
            return int(path.read_text())
    return None


def _folders() -> list[tuple[str, Path, str, bool]]:
    """Return each folder with its name, how to move it, and whether a run must write there."""
    own = cache_folder()
    folders = [(f"folora-q's cache ({own})", own, "export FOLORA_Q_CACHE=FOLDER, on another disk", True)]
    with suppress(ImportError):
        from huggingface_hub.constants import HF_HUB_CACHE

        hub = Path(HF_HUB_CACHE)
        folders.append((f"the hub's cache ({hub})", hub, "export HF_HOME=FOLDER, on another disk", False))
    folders.append(("this folder", Path.cwd(), "name another folder as training.output_dir", False))
    return folders


def _existing(folder: Path) -> Path:
    """Return the folder, or the parent in which it would be created."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _unwritable(folder: Path) -> str | None:
    """Return why the folder is not writable, by writing a file: permissions do not show quotas or read-only mounts."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or type(error).__name__
    return None
