"""The documentation site: each page is in the navigation, and links out of docs/ become text."""

from __future__ import annotations

import re
from pathlib import Path

from docs.mkdocs_hooks import as_text

ROOT = Path(__file__).parents[2]


def test_links_to_files_outside_docs_become_their_paths() -> None:
    page = "[CONTRIBUTING.md](../CONTRIBUTING.md), [code](../folora_q/core), [gone](../gone.md), [data](data.md)"
    assert as_text(page, "a.md") == "`CONTRIBUTING.md`, code (`folora_q/core`), [gone](../gone.md), [data](data.md)"
    assert (
        as_text("[data](../data.md) [it](../../README.md)", "decisions/a.md") == "[data](../data.md) it (`README.md`)"
    )


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert sorted(named) == sorted([*pages, "decisions/README.md"])


def test_the_figure_of_the_method_is_drawn(tmp_path: Path) -> None:
    from docs.make_method_figure import main

    main(tmp_path / "method.png")
    assert (tmp_path / "method.png").read_bytes().startswith(b"\x89PNG")
