"""Limits for what must be kept (`folora-q eval --fail-under keep.yaml`): a test of a tuned model, for CI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from folora_q.errors import UserError
from folora_q.recipe.capabilities import CAPABILITIES, as_capability
from folora_q.recipe.keep import KeepSection
from folora_q.recipe.paths import exists
from folora_q.recipe.section import Fraction, NonNegative, Section
from folora_q.recipe.strict_yaml import parse_yaml
from folora_q.runs.results import KeptResult
from folora_q.storage.untrusted import MIB, read_text

EXAMPLE = "e.g. `tools: 0.8`, or `tools: {fall: 0.05, kl: 0.1}`, one capability or file a line"
CHANCE = "fell by more than chance explains"


class Limit(Section):
    """Limits of one capability or file. Without any, the score may not fall by more than chance explains."""

    score: Fraction | None = None
    """The lowest score of the tuned model."""
    fall: Fraction | None = None
    """The most that the score may be below the base's."""
    kl: NonNegative | None = None
    """The largest KL(base ‖ tuned) in nats per token."""

    @model_validator(mode="before")
    @classmethod
    def _a_number_is_a_score(cls, given: Any) -> Any:
        if given is None:
            return {}
        return {"score": given} if isinstance(given, int | float) and not isinstance(given, bool) else given


@dataclass(frozen=True)
class KeepLimits:
    """Limits by the name of a capability, or of a file.

    Attributes:
        section: what must be measured for them.
    """

    limits: Mapping[str, Limit]
    section: KeepSection

    def failures(self, results: Sequence[KeptResult]) -> list[str]:
        """Return a sentence for each limit that is not held, or was not measured."""
        by_name = {result.name: result for result in results}
        return [
            f"{name} {reason}"
            for name, limit in self.limits.items()
            for reason in _broken(limit, by_name.get(name, by_name.get(Path(name).stem)))
        ]


def _broken(limit: Limit, found: KeptResult | None) -> Iterator[str]:
    if found is None:
        yield "was not measured"
        return
    if limit.kl is not None and not found.kl.value <= limit.kl:
        yield f"has a KL of {found.kl.value:.3g}, above {limit.kl:g}"
    if found.score is None:
        return
    base, tuned, change = found.score.base.value, found.score.tuned.value, found.score.change
    if limit.score is not None and tuned < limit.score:
        yield f"scores {tuned:.1%}, below {limit.score:.1%}"
    if limit.fall is not None and round(base - tuned - limit.fall, 9) > 0:
        yield f"fell from {base:.1%} to {tuned:.1%}, by more than {limit.fall:.1%}"
    if limit == Limit() and change.bounds is not None and change.bounds[1] < 0:
        yield f"{CHANCE}: from {base:.1%} to {tuned:.1%}"


def keep_of(names: Sequence[str], folder: Path, where: str) -> KeepSection:
    """Return a section for names of capabilities and of files.

    Args:
        folder: relative files are in it.
        where: named by errors.

    Raises:
        UserError: a name is neither.
    """
    capabilities, files = [], []
    for name in dict.fromkeys(names):
        if as_capability(name) is not None:
            capabilities.append(name)
        elif exists(folder / name) and (folder / name).is_file():
            files.append(str((folder / name).absolute()))
        else:
            near = get_close_matches(name, CAPABILITIES, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"{where}: {name!r} is neither a capability nor a file{meant}",
                f"capabilities are {', '.join(CAPABILITIES)}; a file is relative to {folder}",
            )
    return KeepSection(capabilities=capabilities, files=files)


def load_limits(path: Path) -> KeepLimits:
    """Read a file of limits: a mapping, or a list of capabilities that may not fall by more than chance explains.

    Raises:
        UserError: it cannot be read, or names what cannot be measured.
    """
    try:
        values = parse_yaml(read_text(path, MIB))[0]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}", EXAMPLE) from None
    if isinstance(values, list) and all(isinstance(name, str) for name in values):
        values = dict.fromkeys(values)
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path} must map capabilities or files to limits", EXAMPLE)
    section = keep_of(list(values), path.absolute().parent, str(path))
    return KeepLimits({name: _limit(path, name, value) for name, value in values.items()}, section)


def _limit(path: Path, name: str, value: Any) -> Limit:
    try:
        limit = Limit.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (name, *first["loc"])))
        raise UserError(f"{path}: {key}: {first['msg'][0].lower()}{first['msg'][1:]}", EXAMPLE) from None
    if as_capability(name) is None and (limit.kl is None or limit.score is not None or limit.fall is not None):
        raise UserError(f"{path}: {name} is a file, whose only limit is `kl`", f"write `{name}: {{kl: 0.05}}`")
    return limit
