"""Paths, addresses and hub ids that a user wrote: tell them apart, and find what a misspelt one means."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from folora_q.errors import MAX_QUOTE_LENGTH
from folora_q.recipe.dataset import Source

# Endings of data files that can be read.
DATA_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
# Endings of compressed text, after those.
COMPRESSED_ENDINGS = (".gz", ".zst", ".bz2", ".xz")
# Addresses of data, and fsspec's names of the remote filesystems that can read them.
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
WEB = ("http", "https")
REMOTE = (*WEB, *"s3 s3a gs gcs az abfs abfss adl hf oss oci ftp sftp ssh smb hdfs webhdfs github memory".split())
TEMPLATE_ENDINGS = (".jinja", ".jinja2", ".j2")
MAX_FINDINGS = 30
HUB_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class NotFoundError(LookupError):
    """Something that a recipe names does not exist, or is something else.

    Args:
        reason: what is wrong.
        hint: how to correct it; None is the usual remark about relative paths.
    """

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.hint = reason, hint


def is_remote(path: str) -> bool:
    """Return whether a path is an address, such as s3://bucket/rows.jsonl."""
    return ADDRESS.match(path) is not None


def is_data_name(name: str) -> bool:
    """Return whether a file name ends as those of data files do, perhaps of compressed ones."""
    path = Path(name.lower())
    return path.suffix in (*DATA_ENDINGS, *COMPRESSED_ENDINGS)


def is_hub_dataset(source: Source) -> bool:
    """Return whether a checked source is read from a hub: every local path was made absolute."""
    return not is_remote(source.path) and not Path(source.path).is_absolute()


def matching_files(path: Path) -> list[Path]:
    """Return the files that an absolute pattern matches; ** stands for any number of folders."""
    return [match for match in _matching(path) if match.is_file()]


def matching_folders(path: Path) -> list[Path]:
    """Return the folders that an absolute pattern matches; none for one with **, which searches them."""
    return [] if "**" in path.parts else [match for match in _matching(path) if match.is_dir()]


def _matching(path: Path) -> list[Path]:
    root = Path(path.anchor)
    try:
        return sorted(root.glob(str(path.relative_to(root))))
    except (ValueError, OSError, NotImplementedError):  # not a pattern, or a name that is too long
        return []


def exists(path: Path) -> bool:
    """Return whether a path exists or a pattern matches; False for names that are too long or contain NUL."""
    try:
        return path.exists() or (any(mark in path.name for mark in "*?[") and bool(matching_files(path.resolve())))
    except (OSError, ValueError):
        return False


def absolute(folder: Path, value: str) -> Path:
    """Return the absolute path for a value that may be relative to a folder.

    Raises:
        NotFoundError: it is not a path.
    """
    try:
        return (folder / Path(value).expanduser()).resolve()
    except UnicodeEncodeError as error:
        raise NotFoundError(
            f"{value!r} cannot be named in this locale, whose encoding is {error.encoding}: set LC_ALL=C.UTF-8"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise NotFoundError(f"{value!r} is not a path ({error})") from None


def listed(findings: Iterable[str]) -> str:
    """List findings, one per line, at most MAX_FINDINGS."""
    lines = list(findings)
    more = [f"and {len(lines) - MAX_FINDINGS:,} more"] if len(lines) > MAX_FINDINGS else []
    return "\n       ".join([*lines[:MAX_FINDINGS], *more])


def short(text: object) -> str:
    """Shorten a text for quoting it in a message."""
    quoted = str(text)
    return (
        quoted
        if len(quoted) <= MAX_QUOTE_LENGTH
        else f"{quoted[: MAX_QUOTE_LENGTH // 2]}...{quoted[-MAX_QUOTE_LENGTH // 2 :]}"
    )


def near(path: Path) -> str:
    """Return a question about a misspelt path, to be added to a sentence; empty if nothing is similar."""
    try:
        found = get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    except OSError:
        found = []
    return f"; did you mean {found[0]}?" if found else ""
