"""Render figures as SVG for a page and as PNG. The same figure gives the same bytes."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, cast
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from folora_q.report.style import FIGURE, SURFACE, VARIABLES
from folora_q.report.text import visible

PNG_DPI = 150
P = ParamSpec("P")
# A PNG includes the figure's title; a page has it as text above the figure.
TITLE = "title"
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
LINK = re.compile(r"^#\w+$|(?<=url\()#\w+")
COLOUR = re.compile(r"#[0-9a-f]{6}")


@dataclass(frozen=True)
class Picture:
    """A figure with its texts.

    Attributes:
        name: of its PNG file, and of its anchor on the page.
        caption: what it shows and how to read it.
        alt: alternative text.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure


@contextmanager
def our_style() -> Iterator[None]:
    """Use our style on matplotlib's defaults, independent of the user's matplotlibrc, without warnings."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast(Any, FIGURE))  # its keys are literal types
        yield


def in_our_style(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorate a function that draws a figure to use our style."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with our_style():
            return draw(*args, **kwargs)

    return styled


def titled(figure: Figure, title: str) -> None:
    """Set the figure's title, which its PNG shows."""
    figure.suptitle(title, x=0.012, ha="left", fontsize=9.5, fontweight="bold", gid=TITLE)


def png(figure: Figure) -> bytes:
    """Render the figure as PNG on white, with its title."""
    with our_style(), io.BytesIO() as file:
        _show_title(figure, True)
        figure.savefig(file, format="png", dpi=PNG_DPI, facecolor=SURFACE, metadata={"Software": None})
        return file.getvalue()


def svg(picture: Picture) -> str:
    """Render an <svg> element with the page's colour variables and font."""
    with our_style(), io.StringIO() as file:
        matplotlib.rcParams["svg.hashsalt"] = picture.name
        _show_title(picture.figure, False)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        picture.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        root = ElementTree.fromstring(file.getvalue())
    values = [value for element in root.iter() for value in element.attrib.values()]
    links = {found[0].removeprefix("#") for value in values for found in LINK.finditer(value)}
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.text, element.tail = (element.text or "").strip() or None, None
        attributes = {key.removeprefix(XLINK): value for key, value in element.attrib.items()}
        if attributes.get("id") not in links:
            attributes.pop("id", None)
        element.attrib = {key: _attribute(key, value, picture.name) for key, value in attributes.items()}
        if element.tag == "style":
            element.text = None  # it would apply to the complete page
        if element.attrib.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
    size = root.attrib["viewBox"]
    root.attrib = {"viewBox": size, "role": "img", "aria-label": visible(picture.alt)}
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, prefix: str) -> str:
    if key == "style":
        value = re.sub(r"font-family:[^;]*;?\s*", "", value)
        value = COLOUR.sub(lambda colour: VARIABLES.get(colour[0], colour[0]), value)
    elif key in ("d", "x", "y", "width", "height", "transform"):
        value = re.sub(r"(\d\.\d\d)\d+", r"\1", " ".join(value.split()))  # a hundredth of a point is enough
    elif key == "id":
        value = f"{prefix}-{value}"  # ids must be unique on a page, and two figures may have the same marker or frame
    return LINK.sub(lambda found: found[0].replace("#", f"#{prefix}-"), value)


def _show_title(figure: Figure, shown: bool) -> None:
    for text in figure.texts:
        if text.get_gid() == TITLE:
            text.set_visible(shown)
            text.set_in_layout(shown)
