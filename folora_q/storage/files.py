"""Atomic writes of files and folders, and the cache folder. Standard library only."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class NoCacheError(OSError):
    """This user has no folder of their own, as in a container that knows no such user."""


def cache_folder() -> Path:
    """Where converted models and sampled text are kept: $FOLORA_Q_CACHE, else folora-q in the user's cache folder.

    Raises:
        NoCacheError: there is no such place.
    """
    if named := os.environ.get("FOLORA_Q_CACHE"):
        return Path(named).expanduser()
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "folora-q"
    try:
        return Path.home() / ".cache" / "folora-q"
    except RuntimeError:  # no HOME, and a number that is in no list of users
        raise NoCacheError(errno.ENOENT, "no home folder is known, so there is nowhere to put the cache") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """Free space where a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader, or a power cut, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def commit_file(target: Path) -> Iterator[Path]:
    """An empty file beside `target`, to be filled, that takes its name if the block ends well.

    It replaces a file that was there, and may itself be replaced in the block.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    staging = Path(name)
    try:
        yield staging
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(staging, 0o644)
        os.replace(staging, target)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


@contextmanager
def commit_directory(target: Path) -> Iterator[Path]:
    """A staging folder beside `target` that takes its name, replacing what was there, if the block ends well.

    Should another process have made `target` meanwhile, the newer content wins.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield staging
        os.chmod(staging, 0o755)
        for path in staging.rglob("*"):
            if path.is_file():  # what the rename shows must be on the disk, also after a power cut
                os.chmod(path, 0o644)  # safetensors writes for its user alone
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        _sync_folder(staging)
        replaced = _set_aside(target) if target.is_dir() else None
        try:
            os.replace(staging, target)
        except BaseException:
            if replaced is not None:
                os.replace(replaced, target)
            raise
        _sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if replaced is not None:
        _delete(replaced)


def remove_directory(path: Path) -> None:
    """Remove a folder that may be there: under its own name it is whole, and then gone, also if we are killed.

    Raises:
        OSError: it cannot be renamed, so it is still there.
    """
    if path.is_dir():
        _delete(_set_aside(path))


def _set_aside(path: Path) -> Path:
    """A folder under a hidden name beside it; renaming takes no room, on a full disk neither."""
    aside = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    os.replace(path, aside)
    return aside


def _delete(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
        return
    with suppress(OSError):
        for path in folder.glob("*.json"):  # first: with its config.json and half of the weights it would look like one
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """The names in a folder, on the disk; where a file system has no such thing, nothing."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
