"""Find the likely reason why a recipe is not valid YAML, and the line on which it is, which may be an earlier one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

# Characters that cannot begin a value outside of quotes.
RESERVED = re.compile(r"found character '([@`%|>])' that cannot start any token")
MAX_SOURCE_LENGTH = 160
_WITHOUT_SPACE = re.compile(r"\s*[\w.-]+:[^\s/]")
FLOW_ENDS = {"sequence": ("[", "]"), "mapping": ("{", "}")}


class YamlError(ValueError):
    """An error in YAML: one sentence with its place, the line itself, and how to correct it.

    Attributes:
        line: its number, counted from 1; None if it is unknown.
        source: the text of the line.
    """

    def __init__(self, sentence: str, line: int | None = None, source: str = "", hint: str | None = None) -> None:
        super().__init__(sentence)
        self.line, self.source, self.hint = line, source, hint

    @property
    def quoted(self) -> str:
        """The sentence and, below it, the line itself."""
        if self.line is None or not self.source.strip():
            return str(self)
        return f"{self}\n       {self.line} | {self.source.expandtabs(4)[:MAX_SOURCE_LENGTH]}"


@dataclass(frozen=True)
class _Cause:
    """A reason, on a line and in a column that are counted from 0, and how to correct it."""

    reason: str
    line: int
    column: int
    hint: str | None = None


def with_cause(text: str, error: yaml.YAMLError) -> YamlError:
    """Return a parser's error with its likely cause in the text."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    if mark is None:
        return YamlError(problem)
    lines = text.splitlines() or [""]
    cause = next(_causes(lines, error, problem), _Cause(problem, mark.line, mark.column))
    source = lines[cause.line] if cause.line < len(lines) else ""
    sentence = f"{cause.reason} (line {cause.line + 1}, column {cause.column + 1})"
    return YamlError(sentence, cause.line + 1, source, cause.hint)


def _causes(lines: list[str], error: yaml.YAMLError, problem: str) -> Iterator[_Cause]:
    """Yield likely causes, the likeliest first."""
    context, context_mark = getattr(error, "context", None) or "", getattr(error, "context_mark", None)
    mark = error.problem_mark  # type: ignore[attr-defined]
    yield from _tab(lines, mark.line)
    if context == "while scanning an alias":
        yield _Cause("a value that begins with * must be in quotes", mark.line, mark.column)
    if found := RESERVED.match(problem):
        yield _Cause(f"a value that begins with {found[1]} must be in quotes", mark.line, mark.column)
    if "expected <block end>" in problem and context_mark is not None:
        yield from _uneven(lines, mark.line)
    if problem.startswith("mapping values are not allowed"):
        yield from _second_colon(lines, mark.line, mark.column)
    if "could not find expected ':'" in problem and context_mark is not None:
        yield _no_colon(lines, context_mark.line, context_mark.column)
    if "quoted scalar" in context and context_mark is not None:
        yield from _quote(problem, context_mark, mark)
    for kind, (opening, closing) in FLOW_ENDS.items():
        if context == f"while parsing a flow {kind}" and context_mark is not None:
            reason = f"a {opening} is not closed, or a comma is missing after it"
            yield _Cause(reason, context_mark.line, context_mark.column, f"close it with {closing}")


def _tab(lines: list[str], last: int) -> Iterator[_Cause]:
    for number in (last, *range(last)):
        indentation = lines[number][: len(lines[number]) - len(lines[number].lstrip())] if number < len(lines) else ""
        if "\t" in indentation:
            hint = "indent with spaces: two for each level"
            yield _Cause("the line is indented with a tab", number, indentation.index("\t"), hint)


def _uneven(lines: list[str], number: int) -> Iterator[_Cause]:
    """Yield the first of the lines of a section whose indentation is unlike that of the other sections."""
    inner = _indentation(lines[number])
    above: list[int] = []
    for earlier in reversed(range(number)):
        if _content(lines[earlier]):
            if _indentation(lines[earlier]) < inner:
                break
            above.append(earlier)
    other = min((_indentation(lines[earlier]) for earlier in above), default=inner)
    if other == inner:
        return
    siblings = {earlier for earlier in above if _indentation(lines[earlier]) == other}
    elsewhere = [_indentation(line) for n, line in enumerate(lines) if n not in {*siblings, number} and _content(line)]
    if elsewhere.count(inner) > elsewhere.count(other):
        yield _indented(lines, min(siblings), inner)
    else:
        yield _indented(lines, number, other)


def _indented(lines: list[str], number: int, right: int) -> _Cause:
    """Return the cause for a line that should be indented as others of its section are."""
    found = _indentation(lines[number])
    reason = f"the line is {_spaces(found)}, but the other keys of its section are {_spaces(right)}"
    return _Cause(reason, number, found, "the keys of a section have one indentation, usually two spaces")


def _second_colon(lines: list[str], number: int, column: int) -> Iterator[_Cause]:
    """Yield causes of a second colon: a value that is continued on this line, or that contains one."""
    before = [earlier for earlier in reversed(range(number)) if _content(lines[earlier])][:2]
    inner = _indentation(lines[number])
    if before and _WITHOUT_SPACE.match(lines[before[0]]) and _indentation(lines[before[0]]) == inner:
        yield _without_space(lines, before[0])
    if before and not lines[number][:column].count(": ") and re.match(r"\s*[\w.-]+:\s+\S", lines[before[0]]):
        outer = _indentation(lines[before[0]])
        if len(before) > 1 and _indentation(lines[before[1]]) == inner > outer:
            yield _indented(lines, before[0], inner)
        if inner > outer:
            yield _indented(lines, number, outer)
    yield _Cause("a value contains a colon", number, column, "put the value into quotes")


def _no_colon(lines: list[str], number: int, column: int) -> _Cause:
    if _WITHOUT_SPACE.match(lines[number]):
        return _without_space(lines, number)
    return _Cause("the line has no colon after its key", number, column, "write key: value")


def _without_space(lines: list[str], number: int) -> _Cause:
    return _Cause("a space is missing after the colon", number, lines[number].index(":"), "write key: value")


def _quote(problem: str, start: yaml.Mark, end: yaml.Mark) -> Iterator[_Cause]:
    if "escape" in problem:
        yield _Cause(
            "in double quotes a backslash has a meaning of its own",
            end.line,
            end.column,
            "use single quotes: 'C:\\data'",
        )
    else:
        yield _Cause("a quote is opened here and not closed", start.line, start.column)


def _content(line: str) -> str:
    """Return a line without comment and surrounding space."""
    return line.partition(" #")[0].strip() if not line.lstrip().startswith("#") else ""


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _spaces(count: int) -> str:
    return f"indented by {count} space{'s' * (count > 1)}" if count else "not indented"
