"""The pages in a real browser, from the disk: nothing is fetched, nothing overflows, nothing is cut or overlaps."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from folora_q.report.page import comparison_page, report_page
from folora_q.report.run_record import load_run
from tests.report.run_folder import Shape, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
playwright = pytest.importorskip("playwright.sync_api")

WIDTHS = (1280, 375)
LONG = "a-run-with-a-name-" + "as-long-as-people-make-them-" * 4
# Elements of the headline whose text must not run out of its box, and pairs of boxes that lie over each other.
CUT = """() => [...document.querySelectorAll('h1, h2, .kind, .facts, .tile, .tile *, .tally p, nav a, .lead')]
  .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline'
    || e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
    || e.getBoundingClientRect().left < -1)
  .map(e => e.className + ': ' + e.textContent.slice(0, 60))"""
OVERLAPS = """() => {
  const boxes = [...document.querySelectorAll('h1, .facts, .tile, .tally > h2, .tally > p, .lead, nav a')]
    .map(e => [e, e.getBoundingClientRect()]);
  const found = [];
  for (const [i, [a, p]] of boxes.entries()) for (const [b, q] of boxes.slice(i + 1))
    if (!a.contains(b) && p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)
      found.push(a.textContent.slice(0, 40) + ' | ' + b.textContent.slice(0, 40));
  return found; }"""
TEXT_OVER_TEXT = """() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(e => [e, e.getBoundingClientRect()]);
  const found = [];
  for (const [i, [a, p]] of boxes.entries()) for (const [b, q] of boxes.slice(i + 1))
    if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3)
      found.push(svg.closest('figure').id + ': ' + a.textContent + ' | ' + b.textContent);
  return found; })"""

# Of the page's ground and text, and of all that is written in its figures.
COLOURS = """() => {
  const of = getComputedStyle(document.body);
  const drawn = [...document.querySelectorAll('figure text')].map(e => getComputedStyle(e).fill);
  return [of.backgroundColor, of.color, ...drawn]; }"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    write_run(root / "demo", Shape(layers=30, harness=True))
    write_run(root / LONG, Shape(layers=4, gated=False, final_loss=0.11, kl_scale=0.7, seed=1))
    unfinished = write_run(root / "unfinished", Shape(layers=1), status="failed", error="out of memory " * 30)
    for file in (unfinished.evaluation, unfinished.gate_results, unfinished.answers):
        file.unlink()
    demo, plain, broken = (load_run(root / name) for name in ("demo", LONG, "unfinished"))
    made = {
        "report": report_page(demo, plain).html,
        "unfinished": report_page(broken).html,
        "comparison": comparison_page([demo, plain], ["their data differ"]).html,
    }
    for name, html in made.items():
        (root / f"{name}.html").write_text(html, encoding="utf-8")
    return {name: root / f"{name}.html" for name in made}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("name", ["report", "unfinished", "comparison"])
def test_a_page_opens_from_the_disk(name: str, pages: dict[str, Path], browser: Any) -> None:
    page = browser.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for look in (CUT, OVERLAPS, TEXT_OVER_TEXT):
            assert page.evaluate(look) == [], width
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        ground, ink, *drawn = page.evaluate(COLOURS)
        assert (brightness(ground) > brightness(ink)) == (scheme == "light")
        for colour in set(drawn):
            assert abs(brightness(colour) - brightness(ground)) > 60, f"{colour} on {ground} in {scheme}"
    assert said == []
    assert asked == [pages[name].as_uri()]
    page.close()


def brightness(colour: str) -> float:
    """Of a CSS colour, from 0 to 255."""
    red, green, blue = (float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
