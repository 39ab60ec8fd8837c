"""Detect files that are not what their names say, by their first bytes: Git LFS pointers, web pages, archives."""

from __future__ import annotations

from pathlib import Path

from folora_q.data.files import DataFile
from folora_q.errors import UserError

HEAD = 512
LFS = b"version https://git-lfs.github.com/spec/"
PAGES = (b"<!doctype html", b"<html")
PROSE = (".txt", ".md")
# The first bytes of compressed files, and their endings.
COMPRESSED = {
    b"\x1f\x8b\x08": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\xfd7zXZ\x00": ".xz",
    b"BZh91AY&SY": ".bz2",
}
BINARY = {
    b"PK\x03\x04": ("a zip archive or an Excel file", "unpack it, or save it as CSV in UTF-8"),
    b"PAR1": ("a parquet file", "rename it to .parquet"),
    b"ARROW1": ("an arrow file", "write it with `to_parquet` or `to_json`"),
}


def refuse_mistaken(file: DataFile) -> None:
    """Check that a file is what its name says, by its first bytes.

    Raises:
        OSError: it cannot be opened.
        UserError: it is something else.
    """
    with file.path.open("rb") as opened:
        head = opened.read(HEAD)
    if head.startswith(LFS):
        raise UserError(
            f"{file.name} is a Git LFS pointer, not the data itself",
            "run `git lfs pull` where it was cloned, or download the file",
        )
    if file.ending not in PROSE and head.lstrip().lower().startswith(PAGES):
        raise UserError(
            f"{file.name} is a web page, not a {file.ending} file",
            "download the file itself: on GitHub and Hugging Face its address has raw or resolve instead of blob",
        )
    if file.path.suffix.lower() != file.ending:  # the name says that it is compressed: unpacking will tell
        return
    for start, ending in COMPRESSED.items():
        if head.startswith(start):
            raise UserError(
                f"{file.name} is compressed, but its name does not say so",
                f"rename it to {Path(file.name).name}{ending}",
            )
    for start, (what, hint) in BINARY.items():
        if head.startswith(start) and not (start == b"PAR1" and file.ending == ".parquet"):
            raise UserError(f"{file.name} is {what}, not a {file.ending} file", hint)
