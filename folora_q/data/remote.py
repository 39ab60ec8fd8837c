"""Remote data: downloaded through fsspec once per process, then read like any file."""

from __future__ import annotations

import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from folora_q.errors import UserError, first_line
from folora_q.recipe.paths import WEB
from folora_q.storage.files import commit_file, free_bytes
from folora_q.storage.redaction import conceal

BLOCK = 2**22
# Bytes that a source which never ends must leave free on the disk.
KEPT_FREE = 2**30
# Seconds without an answer or a byte from a web server before giving up.
PATIENCE = 60
NOT_FOUND = 404


class Remote:
    """A file, folder or pattern at an address that fsspec supports.

    Args:
        address: with its protocol, e.g. s3://bucket/rows.jsonl.

    Raises:
        UserError: the filesystem's package is missing.
    """

    def __init__(self, address: str) -> None:
        import fsspec

        self.address = address
        self.protocol = address.partition("://")[0].lower()
        try:
            filesystem, path = fsspec.url_to_fs(address, **_options(self.protocol))
        except Exception as error:
            raise self._unreachable(error) from error
        self.filesystem: Any = filesystem
        self.path = path.rstrip("/")
        # A web server has no folders, and there ? begins a query.
        self.is_pattern = self.protocol not in WEB and any(mark in self.path for mark in "*?[")

    def names(self) -> dict[str, str]:
        """List the files: paths in the filesystem by name relative to the folder; "" is a single file.

        Raises:
            UserError: nothing is there, or it cannot be reached.
        """
        if self.protocol in WEB:
            return {"": self.address}
        try:
            if self.is_pattern:
                found = sorted(str(each) for each in self.filesystem.glob(self.path))
                files = {each.lstrip("/"): each for each in found if self.filesystem.isfile(each)}
            elif self.filesystem.isfile(self.path):
                return {"": self.path}
            else:
                found = sorted(str(each) for each in self.filesystem.find(self.path))
                files = {each.removeprefix(self.path).lstrip("/"): each for each in found}
        except Exception as error:
            raise self._unreachable(error) from error
        if not files:
            raise UserError(
                f"there is nothing at {self.address}", "check the address, and what your account may read there"
            )
        return files

    def fetch(self, where: str, name: str) -> Path:
        """Download a file, and return the copy, which lasts as long as this process.

        Args:
            where: a path from `names`.
            name: the copy's name, in a folder for this address.

        Raises:
            UserError: it cannot be fetched, or the disk has no room.
        """
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            raise UserError(f"{self.address} has a file whose name cannot be used here: {name[:100]!r}")
        target = _folder_of(self.address) / name
        if target.is_file():
            return target
        try:
            with self.filesystem.open(where, "rb") as there, commit_file(target) as part, part.open("wb") as here:
                while block := there.read(BLOCK):
                    if free_bytes(target.parent) < KEPT_FREE:
                        raise UserError(
                            f"the disk has no room for {self.address} in {target.parent}",
                            "set TMPDIR to a folder on another disk",
                        )
                    here.write(block)
        except UserError:
            raise
        except Exception as error:  # every filesystem raises its own
            raise self._unreachable(error) from error
        return target

    def _unreachable(self, error: BaseException) -> UserError:
        while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
            error = error.__cause__  # fsspec raises this for any web server that does not return the file
        if isinstance(error, FileNotFoundError) or getattr(error, "status", None) == NOT_FOUND:
            return UserError(f"there is nothing at {self.address}", "check the address")
        package = isinstance(error, ImportError)
        return UserError(
            f"cannot read {self.address}: {conceal(first_line(error))}",
            None
            if package
            else "check the address, the network and your credentials, or download it and name the file",
        )


def file_name(address: str) -> str:
    """Return the name of the file at the end of an address."""
    path = urlsplit(address).path if address.partition("://")[0].lower() in WEB else address
    return unquote(PurePosixPath(path).name) or "data"


@cache
def _copies() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="folora-q-")


def _folder_of(address: str) -> Path:
    return Path(_copies().name) / sha256(address.encode()).hexdigest()[:16]


def _options(protocol: str) -> dict[str, Any]:
    """Return options for web servers: a limit on silence but not on the total time, and the proxy that is set."""
    if protocol not in WEB:
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
    return {"client_kwargs": {"timeout": cast(Any, timeout), "trust_env": True}}
