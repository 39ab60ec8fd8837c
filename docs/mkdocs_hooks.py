"""A hook of mkdocs: links to files of the repository outside docs/ become the file's path, since the site lacks them.

On GitHub the links work as they are. A link to a file that does not exist is left to mkdocs, which then fails.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

REPOSITORY = Path(__file__).parent.parent
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")


def outside(page: str, link: str) -> str | None:
    """Return the path from the repository's root that a page's link means, if it exists and is not in docs/."""
    target = (REPOSITORY / "docs" / PurePosixPath(page).parent / link).resolve()
    if not target.exists() or not target.is_relative_to(REPOSITORY) or target.is_relative_to(REPOSITORY / "docs"):
        return None
    return target.relative_to(REPOSITORY).as_posix()


def as_text(markdown: str, page: str) -> str:
    """Return the page with each link out of docs/ as code text, behind the link's text where that differs."""

    def replaced(match: re.Match[str]) -> str:
        text, path = match[1], outside(page, match[2])
        if path is None:
            return match[0]
        return f"`{path}`" if text.strip("`") in (path, PurePosixPath(path).name) else f"{text} (`{path}`)"

    return LINK.sub(replaced, markdown)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return as_text(markdown, page.file.src_uri)
