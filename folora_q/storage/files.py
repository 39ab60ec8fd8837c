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
    """The user has no home folder, as in a container without an entry for that user."""


def cache_folder() -> Path:
    """Return the cache of converted models and sampled text: $FOLORA_Q_CACHE, else folora-q in the user's cache.

    Raises:
        NoCacheError: there is no home folder.
    """
    if named := os.environ.get("FOLORA_Q_CACHE"):
        return Path(named).expanduser()
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "folora-q"
    try:
        return Path.home() / ".cache" / "folora-q"
    except RuntimeError:  # no HOME, and no entry for the user
        raise NoCacheError(errno.ENOENT, "no home folder is known for the cache") from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """Return the free space of the disk where a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file so that readers, even after a power cut, see the old content or the new, never a part."""
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
    """Yield an empty file next to `target`, which is renamed to `target` if the block succeeds.

    It replaces an existing file, and may itself be replaced in the block.
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
def commit_directory(target: Path, keeps_existing: bool = False) -> Iterator[Path]:
    """Yield a staging folder next to `target`, which replaces `target` if the block succeeds.

    Args:
        keeps_existing: if another process has created `target` meanwhile, its content stays, as in a cache. Otherwise
            the newer content wins.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield staging
        os.chmod(staging, 0o755)
        for path in staging.rglob("*"):
            if path.is_file():  # before the rename, so that a power cut leaves no partial files
                os.chmod(path, 0o644)  # safetensors makes files readable for their owner only
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        _sync_folder(staging)
        replaced: list[Path] = []
        try:
            while not _renamed(staging, target):  # it exists, even if it did not a moment ago
                if keeps_existing:
                    shutil.rmtree(staging)
                    return
                replaced.append(_set_aside(target))
        except BaseException:
            if replaced:
                os.replace(replaced[0], target)
            raise
        _sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    for path in replaced:
        _delete(path)


def _renamed(staging: Path, target: Path) -> bool:
    """Rename a folder; False if the target is a folder with files."""
    try:
        os.replace(staging, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def remove_directory(path: Path) -> None:
    """Remove a folder if it exists. Under its name it is complete or gone, even if the process is killed.

    Raises:
        OSError: it cannot be renamed, so it still exists.
    """
    if path.is_dir():
        _delete(_set_aside(path))


def _set_aside(path: Path) -> Path:
    """Rename a folder to a hidden name next to it, which needs no space even on a full disk."""
    aside = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    os.replace(path, aside)
    return aside


def _delete(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
        return
    with suppress(OSError):
        for path in folder.glob(
            "*.json"
        ):  # first: with a config.json and part of the weights it would look like a model
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, if the file system supports it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
