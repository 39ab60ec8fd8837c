"""Read the version ranges that the installed folora-q requires; none if it is not installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet


def ranges(extra: str = "") -> dict[str, SpecifierSet]:
    """Return the packages that folora-q requires, or that an extra adds, with their version ranges."""
    from packaging.requirements import Requirement  # a dependency of our dependencies

    try:
        lines = requires("folora-q") or []
    except PackageNotFoundError:
        return {}
    found = {}
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        in_extra = marker is not None and not always and marker.evaluate({"extra": extra})
        if in_extra if extra else always:
            found[requirement.name] = requirement.specifier
    return found


def requirement(name: str, extra: str = "") -> str:
    """Return a package with its range, for pip, e.g. "trl>=1.16,<2"."""
    specifier = ranges(extra).get(name)
    return name if specifier is None else name + ordered(specifier)


def ordered(specifier: SpecifierSet) -> str:
    """Format a range with its lower bound first, e.g. ">=5.17,<6"."""
    return ",".join(sorted(map(str, specifier), reverse=True))


def within(version: str, specifier: SpecifierSet) -> bool:
    """Whether a version is in a range; prereleases such as nightly builds are allowed."""
    return specifier.contains(version, prereleases=True)
