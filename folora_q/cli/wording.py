"""Numbers in words: counts with their plural, times, sizes, and learning rates."""

from __future__ import annotations

from folora_q.progress import Memory, Unit

# Names for powers of a thousand, the largest first.
THOUSANDS = ((1e9, "billion"), (1e6, "million"))


def counted(number: float, noun: str) -> str:
    """Return a number with its noun in the singular or plural: 1 epoch, 1.5 epochs, 1,100 rows."""
    shown = f"{number:,}" if isinstance(number, int) else f"{round(number, 2):,g}"
    return f"{shown} {noun}" if shown == "1" else f"{shown} {noun}s"


def clock(seconds: float) -> str:
    """Format a time as on a clock: 0:34, 3:05, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """Format a wall time: 12s, 3:05, 1:02:03."""
    return f"{seconds:.0f}s" if round(seconds) < 60 else clock(seconds)


def gigabytes(memory: Memory) -> str:
    """Format memory in use, of what there is: 8.1/12.6 GB."""
    return f"{memory.used / 1e9:.1f}/{memory.total / 1e9:.1f} GB"


def progress_of(done: int, total: int, unit: Unit) -> str:
    """Format how much of a stage is done: 32/288 texts, 1.2/13.5 GB."""
    if unit == "bytes":
        return f"{done / _scale(total):.1f}/{amount(total, unit)}"
    return f"{done:,}/{total:,}" if unit == "units" else f"{done:,}/{total:,} {unit}"


def amount(total: int, unit: Unit) -> str:
    """Format the size of a stage: 288 texts, 13.5 GB."""
    if unit == "bytes":
        return f"{total / _scale(total):.1f} {'GB' if _scale(total) == 1e9 else 'MB'}"
    return f"{total:,}" if unit == "units" else counted(total, unit.removesuffix("s"))


def _scale(size: int) -> float:
    return 1e9 if size >= 1e9 else 1e6


def learning_rate(rate: float) -> str:
    """Format a learning rate with two digits: 1.9e-3."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits}e{int(exponent)}" if rate else "0"


def parameters(trained: int, total: int) -> str:
    """Describe how many parameters are trained: 2.5 of 135 million, 40 million of 7.24 billion."""
    whole, unit = _scaled(total)
    part, unit_of_part = _scaled(trained)
    if unit == "million" and 1_000 <= trained < 1_000_000:
        part, unit_of_part = f"{trained / 1e6:.2g}", unit
    name = f" {unit_of_part}" if unit_of_part and unit_of_part != unit else ""
    return f"{part}{name} of {whole}{f' {unit}' if unit else ''} parameters trained"


def _scaled(number: int) -> tuple[str, str]:
    for factor, name in THOUSANDS:
        if number >= factor:
            scaled = number / factor
            return (f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.3g}"), name
    return f"{number:,}", ""
