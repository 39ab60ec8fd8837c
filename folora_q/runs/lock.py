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
except ImportError:  # on Windows, two runs that start at the same instant are not detected
    fcntl = None

NAME = ".lock"
# With less than this, not even the first files of a run can be written.
MIN_FREE_BYTES = 1_000_000
# The start of a process is known in ticks since boot, and the time of boot to about a second.
SAME_START_SECONDS = 2.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        started: start time of the process in seconds since the epoch, which distinguishes reused process ids.
        boot: id of the machine's boot, if available.
    """

    pid: int
    host: str
    started: float
    boot: str | None

    def gone(self) -> str | None:
        """Return why this process cannot be running any more; None if it may be."""
        here = _myself()
        if self.host != here.host:
            return None  # processes of other machines cannot be checked
        if self.boot != here.boot:
            return "the machine has been restarted since"
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return "it is gone"
            began = process.create_time()
        except psutil.NoSuchProcess:
            return "it is gone"
        except psutil.AccessDenied:
            return None
        return (
            "its process id now belongs to another process" if abs(began - self.started) > SAME_START_SECONDS else None
        )


@contextmanager
def locked(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Lock a run folder for this process. It is created if needed, and removed if it is empty at the end.

    Args:
        tell: receives a line if a process that is gone left a lock.

    Raises:
        UserError: another process writes there, or this one cannot: no permission, no space, not a folder.
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
        with suppress(OSError):  # errors of a full or missing disk have already been reported
            (folder / NAME).unlink()
        _remove_empty(made)


def require_unlocked(folder: Path) -> None:
    """Check that no other process writes in a run folder, without locking it.

    Raises:
        UserError: one does.
    """
    with suppress(OSError):  # no lock, or no folder
        if content := (folder / NAME).read_bytes()[:4096]:
            _see_through(folder / NAME, content, lambda _: None)


def _require_space(folder: Path) -> None:
    if (free := free_bytes(folder)) < MIN_FREE_BYTES:
        raise UserError(
            f"not enough disk space for the run folder {folder}: {free / 1e6:.1f} MB",
            "free some space, or name another training.output_dir",
        )


def _acquire(path: Path, tell: Callable[[str], None]) -> None:
    """Record this process in the lock file, under the system's file lock, so that only one of two succeeds."""
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
        UserError: the holder may still be running.
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
    tell(f"took over {path.parent} from process {holder.pid}: {reason}")


def _myself() -> Holder:
    process = psutil.Process()
    try:
        boot = BOOT_ID.read_text().strip()
    except OSError:
        boot = None
    return Holder(process.pid, socket.gethostname(), process.create_time(), boot)


def _remove_empty(folders: list[Path]) -> None:
    """Remove empty folders, innermost first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
