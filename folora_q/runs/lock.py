"""A lock on the run folder that names its process; it is released when that process is gone."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from folora_q.errors import UserError
from folora_q.storage.files import free_bytes
from folora_q.storage.untrusted import parse_json

try:
    import fcntl
except ImportError:  # not on Windows; there, two runs that start in the same instant are not told apart
    fcntl = None

NAME = ".lock"
# With less than this, not even the first files of a run can be written.
MIN_FREE_BYTES = 1_000_000
# The system tells the start of a process in ticks since its boot, and when it booted to about a second.
SAME_START_SECONDS = 2.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        started: when the process was started, in seconds of the epoch: a later process with its number has another.
        boot: names the boot of the machine, where the system tells it.
    """

    pid: int
    host: str
    started: float
    boot: str | None

    def gone(self) -> str | None:
        """Why this process cannot be running any more; None if it may be."""
        here = _myself()
        if self.host != here.host:
            return None  # from here, a process of another machine cannot be seen
        if self.boot != here.boot:
            return "the machine was started anew since"
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return "it is gone"
            began = process.create_time()
        except psutil.NoSuchProcess:
            return "it is gone"
        except psutil.AccessDenied:
            return None
        return "its number is another process's now" if abs(began - self.started) > SAME_START_SECONDS else None


@contextmanager
def locked(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold a run folder for this process; it is made if need be, and removed again if it is empty at the end.

    Args:
        tell: takes a line where a lock was left by a process that is gone.

    Raises:
        UserError: another process writes there, or this one cannot: no permission, no space, no folder.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        _require_space(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(folder / NAME, tell)
    except OSError as error:
        _remove_empty(made)
        raise UserError(
            f"cannot use {folder} as the run folder: {error.strerror}", "see training.output_dir"
        ) from error
    except UserError:
        _remove_empty(made)
        raise
    try:
        yield
    finally:
        with suppress(OSError):  # what a full or vanished disk does here is no news
            (folder / NAME).unlink()
        _remove_empty(made)


def _require_space(folder: Path) -> None:
    if (free := free_bytes(folder)) < MIN_FREE_BYTES:
        raise UserError(
            f"no space is left for the run folder {folder}: {free / 1e6:.1f} MB",
            "free some, or name another training.output_dir",
        )


def _acquire(path: Path, tell: Callable[[str], None]) -> None:
    """Write ourselves into the lock file, under the system's own lock on it, so that of two that try one succeeds."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                if os.stat(path).st_ino != os.fstat(handle).st_ino:
                    continue  # its holder removed it while we waited
            except FileNotFoundError:
                continue
            content = os.read(handle, 4096)
            if content:
                _see_through(path, content, tell)
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(asdict(_myself())).encode(), 0)
            os.fsync(handle)
            return
        finally:
            os.close(handle)


def _see_through(path: Path, content: bytes, tell: Callable[[str], None]) -> None:
    """Return if the lock's holder is gone.

    Raises:
        UserError: it is not, as far as can be seen from here.
    """
    try:
        holder = Holder(**parse_json(content.decode("utf-8")))
        reason = holder.gone()
    except (ValueError, TypeError):
        tell(f"the lock {path} is damaged; it was taken over")
        return
    if reason is None:
        where = "" if holder.host == socket.gethostname() else f" on {holder.host}"
        raise UserError(
            f"process {holder.pid}{where} is writing in {path.parent}",
            f"wait for it, or name another training.output_dir; if it is gone, remove {path}",
        )
    tell(f"took {path.parent} over from process {holder.pid}: {reason}")


def _myself() -> Holder:
    process = psutil.Process()
    try:
        boot = BOOT_ID.read_text().strip()
    except OSError:
        boot = None
    return Holder(process.pid, socket.gethostname(), process.create_time(), boot)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, that hold nothing."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
