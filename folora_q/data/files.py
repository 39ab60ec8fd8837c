"""A local data file, perhaps compressed, and the name that messages use for it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from folora_q.errors import UserError, first_line
from folora_q.recipe.paths import COMPRESSED_ENDINGS

# Text compresses by a factor of 5 to 20. A file that exceeds both limits was made to fill the memory.
MAX_UNPACKED_RATIO, MAX_UNPACKED_BYTES = 100, 256 * 2**20
DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class DataFile:
    """One file of rows.

    Attributes:
        path: where its bytes are.
        name: what messages call it: the path itself, or the address that it was fetched from.
    """

    path: Path
    name: str

    @property
    def ending(self) -> str:
        """The file type, e.g. ".jsonl", also of a compressed file."""
        return ending_of(self.path.name)[0]

    def open(self) -> BinaryIO:
        """Open the file for reading, decompressed.

        Raises:
            OSError: it cannot be opened.
        """
        compression = ending_of(self.path.name)[1]
        file = self.path.open("rb")
        if compression is None:
            return file
        guarded = _Unpacked(UNPACKERS[compression](file), file, self.path.stat().st_size, self.name)
        return cast(BinaryIO, io.BufferedReader(guarded, 2**16))


def ending_of(name: str) -> tuple[str, str | None]:
    """Return the endings of the file type and of the compression around it, if any, in lower case."""
    path = Path(name.lower())
    if path.suffix in COMPRESSED_ENDINGS:
        return Path(path.stem).suffix, path.suffix
    return path.suffix, None


class _Unpacked(io.RawIOBase):
    """Reads from a decompressor, within limits.

    Raises, in reading:
        UserError: the file is damaged, or decompresses to far more than text does.
    """

    def __init__(self, unpacker: IO[bytes], file: BinaryIO, packed: int, name: str) -> None:
        self.unpacker, self.file, self.name = unpacker, file, name
        self.most = max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * packed)
        self.taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            content = self.unpacker.read(len(buffer))
        except DAMAGED as error:
            raise UserError(
                f"{self.name} is damaged or cut short: it cannot be unpacked beyond byte {self.taken:,} of its "
                f"content ({first_line(error)})",
                "create it again, or unpack as much of it as possible",
            ) from None
        self.taken += len(content)
        if self.taken > self.most:
            raise UserError(
                f"{self.name} unpacks to over {self.most / 2**20:,.0f} MiB, {MAX_UNPACKED_RATIO} times its own size",
                "text does not compress that well; if the file is right, unpack it yourself",
            )
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self.unpacker.close()
            self.file.close()
        super().close()


def _zstd(file: BinaryIO) -> IO[bytes]:
    import pyarrow

    return cast(IO[bytes], pyarrow.CompressedInputStream(file, "zstd"))


UNPACKERS: dict[str, Callable[[BinaryIO], IO[bytes]]] = {
    ".gz": lambda file: cast(IO[bytes], gzip.GzipFile(fileobj=file, mode="rb")),
    ".zst": _zstd,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
