"""Write the HTML report of a run, and of a comparison: one self-contained file each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from folora_q.report import comparison, text
from folora_q.report.comparison import at_ends, at_equal_loss, factor, in_words, names_of
from folora_q.report.figure_set import (
    budget_pictures,
    cost_pictures,
    course_pictures,
    drift_pictures,
    gate_pictures,
    layer_pictures,
    trade_off_pictures,
)
from folora_q.report.render import Picture, svg
from folora_q.report.run_record import Run
from folora_q.report.style import css_variables
from folora_q.runs.in_words import REWARD_WORDS, summary
from folora_q.runs.results import AnswerResult, Interval
from folora_q.storage.redaction import conceal

# Number of answers on a page: right, wrong and unscored ones, answers to general prompts, and lost capabilities.
RIGHT, WRONG, UNSCORED, GENERAL, LOST = 3, 3, 4, 6, 6
# Limits of a page; the files have everything.
MAX_TABLE_ROWS = 2000
MAX_ANSWER_LENGTH = 8000
FIRST_GLANCE = 320


@dataclass(frozen=True)
class Page:
    """An HTML page and its figures."""

    html: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Sample:
    """A prompt with both answers, as shown on a page."""

    answer: AnswerResult
    heading: str
    asked: str
    before: str


def report_page(run: Run, baseline: Run | None = None) -> Page:
    """Return the report of a run, finished or not, compared with a baseline if given."""
    runs = [run] if baseline is None else [run, baseline]
    names = names_of(runs)
    equal = at_equal_loss(runs) if baseline else None
    if equal and not equal.learned:
        equal = None
    sections = {
        "course": course_pictures(run)
        + budget_pictures(run)
        + trade_off_pictures(runs, names, equal.loss if equal else None),
        "layers": layer_pictures(run),
        "gates": gate_pictures(run),
        "costs": cost_pictures(run),
    }
    html = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            run=run,
            baseline=baseline,
            names=names,
            ends=at_ends(runs) if baseline else [],
            equal=equal,
            started=_date(run.fact("started")),
            seconds=comparison.total_seconds(run),
            peak=comparison.peak_stage(run),
            figures=_figures(sections),
            samples=samples(run.answers),
            longest_table=MAX_TABLE_ROWS,
        )
    )
    return Page(html, [picture for pictures in sections.values() for picture in pictures])


def comparison_page(runs: Sequence[Run], notes: Sequence[str] = ()) -> Page:
    """Return the comparison of several runs of one base model.

    Args:
        notes: limits of the comparison that a reader must know.
    """
    names = names_of(runs)
    equal = at_equal_loss(runs)
    sections = {
        "trade_off": trade_off_pictures(runs, names, equal.loss if equal and equal.learned else None),
        "layers": drift_pictures(runs, names),
    }
    html = (
        _environment()
        .get_template("compare.html.jinja")
        .render(
            runs=runs,
            names=names,
            ends=at_ends(runs),
            equal=equal,
            words=in_words(runs, equal),
            notes=notes,
            figures=_figures(sections),
        )
    )
    return Page(html, [picture for pictures in sections.values() for picture in pictures])


def samples(answers: Sequence[AnswerResult]) -> list[Sample]:
    """Select answers to held-out prompts, right and wrong, to general prompts, and those of `keep` that got worse."""
    task = [answer for answer in answers if answer.kind == "task"]
    scored = [(answer, answer.tuned_score) for answer in task if answer.tuned_score is not None]
    groups = [
        ("right", [answer for answer, score in scored if score >= 1][:RIGHT]),
        ("not right", [answer for answer, score in scored if score < 1][:WRONG]),
        ("held out", [answer for answer in task if answer.tuned_score is None][:UNSCORED]),
        ("general", [answer for answer in answers if answer.kind == "general"][:GENERAL]),
    ]
    found = [_sample(answer, heading) for heading, group in groups for answer in group]
    lost = [answer for answer in answers if answer.kind == "keep" and _got_worse(answer)][:LOST]
    return found + [_sample(answer, f"to be kept ({answer.capability}), got worse") for answer in lost]


def _got_worse(answer: AnswerResult) -> bool:
    base, tuned = answer.base_score, answer.tuned_score
    return base is not None and tuned is not None and tuned < base


def _sample(answer: AnswerResult, heading: str) -> Sample:
    if isinstance(answer.prompt, str):
        return Sample(answer, heading, answer.prompt, "")
    turns = [(str(turn.get("role", "")), str(turn.get("content", ""))) for turn in answer.prompt] or [("", "")]
    before = "\n\n".join(f"{role}: {content}" for role, content in turns[:-1])
    return Sample(answer, heading, turns[-1][1], before)


def _figures(sections: dict[str, list[Picture]]) -> dict[str, list[tuple[Picture, Markup]]]:
    return {name: [(picture, Markup(svg(picture))) for picture in pictures] for name, pictures in sections.items()}


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("folora_q.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: type(value)(conceal(text.readable(value))) if isinstance(value, str) else value,
    )
    environment.filters |= {
        "number": text.number,
        "short": text.short,
        "interval": text.interval,
        "wall_time": text.wall_time,
        "memory": text.memory,
        "metric": comparison.metric_name,
        "estimate": comparison.written,
        "where": comparison.where,
        "summary": summary,
        "beginning": lambda said: _clipped(said, FIRST_GLANCE),
        "clipped": lambda said: _clipped(said, MAX_ANSWER_LENGTH),
    }
    environment.globals |= {
        "light": Markup(css_variables(False)),
        "dark": Markup(css_variables(True)),
        "hint_no_trajectory": comparison.NO_TRAJECTORY,
        "direction": direction,
        "factor": factor,
        "too_few": text.TOO_FEW,
        "reward_words": REWARD_WORDS,
    }
    return environment


def direction(change: Interval) -> str:
    """Describe the direction of a change, if its interval excludes zero."""
    if not all(map(math.isfinite, (change.value, *(change.bounds or ())))):
        return "could not be measured"
    if change.bounds is None:
        return "changed (too few texts to judge)"
    if change.bounds[0] <= 0 <= change.bounds[1]:
        return "did not change by more than chance can explain"
    return "fell" if change.value < 0 else "rose"


def _clipped(said: str, longest: int) -> str:
    """Shorten text between words if it is much too long."""
    if len(said) <= longest * 1.25:
        return said
    start = said[:longest]
    return (start.rsplit(None, 1)[0] if len(start.split()) > 1 else start) + " …"


def _date(started: str | None) -> str | None:
    try:
        when = datetime.fromisoformat(started or "")
    except ValueError:
        return started
    zone = " UTC" if when.utcoffset() == timedelta(0) else ""
    return f"{when.day} {when:%B %Y}, {when:%H:%M}{zone}"
