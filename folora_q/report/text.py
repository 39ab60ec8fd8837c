"""Format numbers and untrusted text for display."""

from __future__ import annotations

import math
import re

from folora_q.recipe.size_advice import MIN_TEXTS
from folora_q.runs.results import Interval

NONE = "–"
MINUS = "−"
# In place of an interval.
TOO_FEW = f"no interval: fewer than {MIN_TEXTS} texts"
# Control characters, and lone surrogates, which UTF-8 cannot represent.
UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """Escape unprintable characters for one line of a figure or a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def readable(text: str) -> str:
    """Escape control characters for a page, except line breaks, tabs and joiners."""
    return UNREADABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def number(value: float | None, form: str = ".4f", signed: bool = False) -> str:
    """Format a number with a true minus; a dash if it is missing or not finite.

    Args:
        form: a Python format, or "points": percent without the sign.
    """
    if value is None or not math.isfinite(value):
        return NONE
    sign = "+" if signed else ""
    text = f"{100 * value:{sign}.1f}" if form == "points" else format(value, sign + form)
    if not any(digit in "123456789" for digit in text):
        text = text.lstrip("+-")  # no sign on a zero
    return text.replace("-", MINUS)


def short(value: float | None) -> str:
    """Format a number with three significant digits: 12,300, 3.14, 0.00217, 2.2e−06."""
    if value is None or not math.isfinite(value):
        return NONE
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("-", MINUS)
    digits = 3 if value == 0 else max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{digits if value else 0}f}".replace("-", MINUS)


def tick(value: float, _: object = None) -> str:
    """Format a number on an axis: 0.05, 1000, 1e−6."""
    text = f"{value:.0e}" if value and not 1e-4 < abs(value) < 1e5 else f"{value:g}"
    return text.replace("e-0", "e-").replace("e+0", "e").replace("-", MINUS)


def interval(estimate: Interval, form: str = ".4f", signed: bool = False) -> str:
    """Format a 95 % interval: 0.11 to 0.14."""
    if estimate.bounds is None:
        return TOO_FEW
    return f"{number(estimate.low, form, signed)} to {number(estimate.high, form, signed)}"


def wall_time(seconds: float) -> str:
    """Format a duration: 1.2 s, 12 s, 3 min 05 s, 1 h 02 min."""
    whole = round(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"


def memory(size: int | None) -> str:
    """Format a size: 1.91 GiB."""
    return NONE if size is None else f"{size / (1 << 30):.2f} GiB"
