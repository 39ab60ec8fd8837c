"""Check that reading a file gives a value, or an error of ours that says what is wrong and where.

Everything else is a finding: another exception, a crash of the process, more than 2 s of processor time, more than 200
MB of memory, a file written outside the folder, a started process, a connection, a lookup of a pickle's global.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from folora_q.cli.console import print_error
from folora_q.errors import FoloraError

# Limits in processor time, since other programs may run on the machine.
MOST_SECONDS = 2.0
STOPPED_AFTER = 10.0
MOST_BYTES = 200_000_000
LONGEST_MESSAGE = 20_000
# Limits for files that are meant to be large, per byte, and the size of such a file.
SECONDS_A_BYTE, BYTES_A_BYTE, LARGE = 1e-6, 30, 10**7
# From this rate on, only the first of a target's valid files is read at the start.
SLOW_RATE = 20
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Python's audit events that change files, with the number of their arguments that are paths.
CHANGING = {
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.truncate": 1,
    "os.chmod": 1,
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
}
# Audit events that no file may cause.
FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
)


@dataclass(frozen=True)
class Target:
    """A reader of files, to be fuzzed.

    Attributes:
        build: writes a valid folder.
        files: the files to change, by path in the folder, with their kind, which determines the changes.
        read: reads the folder, in which one file was changed, as a command does. It must accept the valid folder.
        rate: the cost of an input; a campaign divides its number of examples by it.
        large: whether files may be large, so that time and memory may grow with them.
        writes: whether reading changes the folder, so that each input needs a new copy.
    """

    name: str
    build: Callable[[Path], None]
    files: Mapping[str, str]
    read: Callable[[Path, str], object]
    rate: int = 1
    large: bool = False
    writes: bool = False


@dataclass(frozen=True)
class Verdict:
    """The outcome of an input.

    Attributes:
        told: the error's message, or what is wrong.
        alike: the kind of a finding; findings with the same cause have the same one.
        seconds: processor time.
        grown: the bytes by which the process grew at its peak.
    """

    kind: Literal["accepted", "refused", "finding"]
    told: str = ""
    alike: str = ""
    seconds: float = 0.0
    grown: int = 0


class Bench:
    """A target with its folder, which is restored before each input.

    Args:
        place: an empty folder; nothing may be written outside it.
    """

    def __init__(self, target: Target, place: Path) -> None:
        self.target, self.place = target, place.resolve()
        self.folder, self.valid = self.place / "input", self.place / "valid"
        self.valid.mkdir()
        target.build(self.valid)
        shutil.copytree(self.valid, self.folder)
        self.usual = float("inf")
        self.seeds = {name: (self.valid / name).read_bytes() for name in target.files}
        usual = 0.0
        for number, name in enumerate(target.files):
            if number and target.rate >= SLOW_RATE:
                break
            for _ in range(2):  # the first time imports libraries and writes caches
                verdict = self.judge(name, self.seeds[name])
            usual = max(usual, verdict.seconds)
            if verdict.kind != "accepted":
                raise AssertionError(f"{target.name} does not accept its valid {name}: {verdict}")
        self.usual = usual

    def judge(self, file: str, content: bytes) -> Verdict:
        """Read the folder with this content in one of its files."""
        if self.target.writes:
            shutil.rmtree(self.folder)
            shutil.copytree(self.valid, self.folder)
        path = self.folder / file
        path.write_bytes(content)
        try:
            return self._judge(file)
        finally:
            if not self.target.writes:
                path.write_bytes(self.seeds[file])

    def _judge(self, file: str) -> Verdict:
        before = _reset_peak()
        began = time.process_time()
        kind, told, alike = "accepted", "", ""
        with _watched(self.place) as events:
            try:
                with _stopped_after(STOPPED_AFTER), _silent():
                    self.target.read(self.folder, file)
            except FoloraError as error:
                kind, told = "refused", error.message
                alike = self._unclear(error, file)
            except (Exception, SystemExit, _Stopped) as error:
                kind, told = "finding", f"{type(error).__name__}: {error}"[:500]
                alike = f"{type(error).__name__} in {_place_of(error)}"
        seconds = time.process_time() - began
        grown = max(_peak() - before, 0) if before < sys.maxsize else 0
        size = (self.folder / file).stat().st_size if self.target.large else 0
        if events:
            alike = alike or events[0].split(":")[0]
            kind, told = "finding", events[0]
        elif kind == "refused" and alike:
            kind, told = "finding", f"{alike}: {told[:300]}"
        elif seconds > MOST_SECONDS + self.usual + size * SECONDS_A_BYTE and "_Stopped" not in alike:
            kind, told, alike = "finding", f"{seconds:.1f} s; {told[:200]}", f"too slow in {file}"
        elif grown > MOST_BYTES + size * BYTES_A_BYTE:
            kind, told, alike = "finding", f"{grown / 1e6:,.0f} MB; {told[:200]}", f"too much memory in {file}"
        return Verdict(kind, told, alike, seconds, grown)

    def _unclear(self, error: FoloraError, file: str) -> str:
        """Return why a refusal is unclear; empty if it is clear."""
        message = error.message
        if not message.strip() or len(message) > LONGEST_MESSAGE or "Traceback (most" in message:
            return "its message is empty, endless or a traceback"
        if not any(name in message for name in (Path(file).name, str(self.folder))):
            return "its message does not say where"
        try:
            with _silent():
                print_error(message, error.hint)
        except (UnicodeError, ValueError) as failure:
            return f"its message cannot be shown ({type(failure).__name__})"
        return ""


class _Stopped(BaseException):
    """Raised after the time limit. No `except Exception` catches it."""


@contextlib.contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Raise after this much processor time; pytest's own timeout uses another clock and signal."""

    def stop(*_: object) -> None:
        raise _Stopped(f"stopped after {seconds:.0f} s of computing")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discard printed text, which must be encodable as UTF-8."""
    with (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8") as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        yield


def _place_of(error: BaseException) -> str:
    """Return the innermost line of folora_q in the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}folora_q{os.sep}" in frame.filename] or frames[-1:]
    return f"{ours[-1].filename.rpartition(f'{os.sep}folora_q{os.sep}')[2]}, {ours[-1].name}, line {ours[-1].lineno}"


# An audit hook stays until the process ends, so there is one, which is active only inside `_watched`.
_events: list[str] | None = None
_allowed = ""


@cache
def _begin_to_audit() -> None:
    sys.addaudithook(_audit)


def _audit(event: str, arguments: Sequence[Any]) -> None:
    if _events is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITING:
            _note("writes", path)
    elif event in CHANGING:
        paths, folders = arguments[: CHANGING[event]], arguments[CHANGING[event] :]
        folder = next((number for number in folders[-1:] if isinstance(number, int) and number >= 0), None)
        for path in paths:
            _note(f"{event} of", path, folder)
    elif event in FORBIDDEN:
        _events.append(f"{event}: {arguments}"[:300])


def _note(what: str, path: object, folder: int | None = None) -> None:
    """Record an operation outside the folder; a path may be relative to an open folder, given by its descriptor."""
    if not isinstance(path, str | bytes | os.PathLike):
        return  # a file descriptor
    around = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
    name = os.path.abspath(os.path.join(around, os.fsdecode(path)))
    if not name.startswith(_allowed) and name != os.devnull:
        _events.append(f"{what} a file outside the folder: {name}")


@contextlib.contextmanager
def _watched(place: Path) -> Iterator[list[str]]:
    global _events, _allowed
    _begin_to_audit()
    _events, _allowed = [], str(place) + os.sep
    kept, tempfile.tempdir = tempfile.tempdir, str(place)  # libraries may write temporary files there
    try:
        yield _events
    finally:
        _events, tempfile.tempdir = None, kept


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _reset_peak() -> int:
    """Reset the peak of memory, if the system can, and return the memory in use."""
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        # What earlier code freed is still resident; an input that takes it again would not grow the process.
        _libc().malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return sys.maxsize
    return _peak()


def _peak() -> int:
    """Return the peak of memory in bytes since the last reset."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
