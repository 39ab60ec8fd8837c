"""Whatever stands in a run's files, as a name, an answer, a key or a comment, is text on its page, in figures too."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from folora_q.report.page import comparison_page, report_page
from folora_q.report.run_record import load_run
from tests.report.page_parts import parts_of
from tests.report.run_folder import Shape, write_run

PAYLOADS = [
    "<script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</style><svg onload=alert(1)>",
    "\" onmouseover=alert(1) x=\"' onfocus=alert(1) autofocus x='",
    "javascript:alert(1)",
    "</text></svg><foreignObject><iframe src=//evil></iframe>",
    "]]><script>alert(1)</script><![CDATA[",
    "--><img src=x onerror=alert(1)><!--",
    "{{ 7 * 7 }}{% for x in ().__class__.__base__.__subclasses__() %}",
    "&lt;script&gt;&#60;img src=x&#62;&amp;",
    "x;background:url(//evil)}*{color:red",
    "[a](javascript:alert(1))![b](//evil/c.png)",
    "$\\mathbf{<script>}$",
]
ALL = " ".join(PAYLOADS)
# What says which numbers these are, by the names of the files' own keys.
MEANT = {"kind", "stage", "role", "drift", "predicted", "energy_kept"}
ALLOWED = set(
    "html head meta title style body header nav section footer div span p h1 h2 h3 h4 small strong a article details "
    "summary pre dl dt dd table thead tbody tr th td data figure figcaption svg g path defs use text line rect circle "
    "clippath clipPath image marker tspan metadata br".split()
)


def replaced(value: Any, by: str, key: str = "") -> Any:
    """Every text in it, and with it every name that is no key of ours, gets the payload."""
    if isinstance(value, dict):
        return {name: replaced(inner, by, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [replaced(inner, by, key) for inner in value]
    return by + value if isinstance(value, str) and key not in MEANT else value


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    lines = path.read_text("utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
    path.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in lines), encoding="utf-8")


def test_it_is_text(tmp_path: Path) -> None:
    other = write_run(tmp_path / "plain", Shape(layers=1, every=100))
    folder = write_run(tmp_path / PAYLOADS[1].replace("/", "∕"), Shape(layers=1, every=100))
    for path in (folder.evaluation, folder.gate_results, folder.answers):
        rewrite(path, lambda value: replaced(value, ALL))
    # Of these the page shows the keys too.
    named = {section: {ALL: ALL} for section in ("versions", "seeds", "model", "data_sha256")}
    rewrite(folder.manifest, lambda value: {**replaced(value, ALL), **named})
    folder.recipe.write_text(f"# {ALL}\nlogging: {{run_name: {json.dumps(ALL)}}}\n", encoding="utf-8")
    runs = [load_run(folder.path), load_run(other.path)]
    for page in (report_page(*runs), comparison_page(runs, [ALL])):
        parts = parts_of(page.html)
        assert set(parts.tags) <= ALLOWED, set(parts.tags) - ALLOWED
        assert parts.tags.count("title") == 1 and parts.tags.count("style") == 1 + parts.tags.count("svg")
        assert not [key for key, _ in parts.attributes if key.startswith("on")]
        addresses = [value for key, value in parts.attributes if key in ("href", "src", "xlink:href", "action")]
        assert all(value.startswith("#") for value in addresses), addresses
        assert not [value for key, value in parts.attributes if key == "style" and "//evil" in value]
        assert "default-src 'none'" in page.html
        assert [payload for payload in PAYLOADS if payload not in parts.text] == []
        assert "script" in _titles(page.html)[0] and len(_titles(page.html)) == 1


def _titles(html: str) -> list[str]:
    """What a browser would show as the title."""
    found: list[str] = []

    class Titles(HTMLParser):
        inside = False

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.inside = tag == "title"
            found.extend([""] * self.inside)

        def handle_endtag(self, tag: str) -> None:
            self.inside = self.inside and tag != "title"

        def handle_data(self, data: str) -> None:
            if self.inside:
                found[-1] += data

    Titles().feed(html)
    return found
