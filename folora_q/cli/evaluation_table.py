"""Print an evaluation as a table: after a run, and for any adapter."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from folora_q.cli.console import out, print_table, visible
from folora_q.recipe.size_advice import MIN_TEXTS
from folora_q.runs.in_words import REWARD_WORDS, summary
from folora_q.runs.results import (
    AnswerResult,
    Evaluation,
    HarnessResult,
    Interval,
    PairedChange,
    PreferenceResult,
    TextKind,
)

ANSWER_LENGTH = 200


def print_evaluation(found: Evaluation, title: str) -> None:
    """Print a table with sections for the task, what is kept, model-generated and general text; with 95 % intervals."""
    table = _ChangeTable(title)
    _add_tasks(table, found)
    for kept in found.kept:
        if kept.score is not None:
            table.add(f"keep, {kept.name}: {kept.metric}", kept.score, ".1%", False)
        table.add_kl(f"keep, {kept.name}: KL" if kept.score is None else "  KL on the base's answers", kept.kl)
    table.rows.add_section()
    for text in found.of_kind(TextKind.GENERATED):
        table.add_kl(f"{text.name}: KL", text.kl)
        table.add_agreement(text.top1_agreement)
        table.add("  loss", text.loss, ".4f", True)
    table.rows.add_section()
    for text in found.of_kind(TextKind.GENERAL):
        table.add(f"{text.name}: loss (forgetting)", text.loss, ".4f", True)
    print_table(table.rows)
    for sentence in summary(found):
        out.print(escape(visible(sentence)), soft_wrap=True)


def _add_tasks(table: _ChangeTable, found: Evaluation) -> None:
    """Add the sections of the task and of earlier ones."""
    for label, loss in _task_losses(found):
        table.add(label, loss, ".4f", True)
    for row in _rewards(found.preference):
        table.rows.add_row(*row)
    if found.score is not None:
        table.add(f"task: {found.score.metric.replace('_', ' ')}", found.score.score, ".1%", False)
    table.rows.add_section()
    for text in found.of_kind(TextKind.EARLIER):
        table.add(f"{text.name}: loss, nats per token", text.loss, ".4f", True)
    for score in found.earlier:
        table.add(f"{score.task}: {score.metric.replace('_', ' ')}", score.score, ".1%", False)
    table.rows.add_section()


class _ChangeTable:
    """A table of numbers of base and tuned model, with their change and its interval."""

    def __init__(self, title: str) -> None:
        self.rows = Table(title=escape(visible(title)), title_justify="left")
        self.rows.add_column("held-out text")
        for heading in ("base", "tuned", "change", "95 % interval"):
            self.rows.add_column(heading, justify="right")

    def add(self, label: str, change: PairedChange, form: str, lower_is_better: bool) -> None:
        good = (change.change.value < 0) == lower_is_better
        colour = "" if change.change.value == 0 else "green" if good else "yellow"
        self.rows.add_row(
            escape(visible(label)),
            format(change.base.value, form),
            format(change.tuned.value, form),
            _coloured(f"{change.change.value:+{form}}", colour),
            _interval(change.change, f"+{form}"),
        )

    def add_kl(self, label: str, kl: Interval) -> None:
        shift = f"[yellow]{kl.value:+.4f}[/]"
        self.rows.add_row(escape(visible(label)), "0", f"{kl.value:.4f}", shift, _interval(kl, "+.4f"))

    def add_agreement(self, agreement: Interval) -> None:
        lost = f"[yellow]{agreement.value - 1:+.1%}[/]"
        self.rows.add_row("  same top token", "100.0%", f"{agreement.value:.1%}", lost, "")


def print_harness(found: list[HarnessResult]) -> None:
    """Print lm-eval results of base and tuned model, with the standard error of their difference if known."""
    table = Table(title="lm-eval-harness", title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    for heading in ("base", "tuned", "change"):
        table.add_column(heading, justify="right")
    for row in found:
        change = row.tuned - row.base
        colour = "" if change == 0 else "green" if (change > 0) == row.higher_is_better else "yellow"
        table.add_row(
            escape(visible(row.task)),
            escape(visible(row.metric)),
            _with_error(row.base, row.base_stderr),
            _with_error(row.tuned, row.tuned_stderr),
            _coloured(_with_error(change, row.change_stderr, "+"), colour),
        )
    print_table(table)


def print_answer(answer: AnswerResult) -> None:
    """Print a prompt and both answers, each on one line."""
    said = (("asked", answer.asked), ("base", answer.base), ("tuned", answer.tuned))
    out.print()
    for name, text in said:
        line = " ".join(text.split())
        line = line if len(line) <= ANSWER_LENGTH else f"{line[:ANSWER_LENGTH]} …"
        out.print(f"[bold]{name:6}[/] {escape(visible(line))}", soft_wrap=True)


def _task_losses(found: Evaluation) -> list[tuple[str, PairedChange]]:
    of_tokens = [text.loss for text in found.of_kind(TextKind.TASK)]
    if found.preference is None:
        return [("task: loss, nats per token", loss) for loss in of_tokens]
    words = REWARD_WORDS[found.preference.objective]
    of_rows = (f"task: {words.loss}, {words.unit}", found.preference.loss)
    return [of_rows, *((f"{words.learned}: loss", loss) for loss in of_tokens)]


def _rewards(found: PreferenceResult | None) -> list[tuple[str, str, str, str, str]]:
    """Return rows on the implicit rewards, which the base does not tell apart."""
    if found is None:
        return []
    accuracy, margin = found.accuracy, found.margin
    words = REWARD_WORDS[found.objective]
    rows = [(f"  {words.accuracy}", "", f"{accuracy.value:.1%}", "", _interval(accuracy, ".1%"))]
    if margin is not None:
        rows.append(("  margin of rewards", "0", f"{margin.value:.3f}", "", _interval(margin, ".3f")))
    return rows


def _interval(estimate: Interval, form: str) -> str:
    if estimate.bounds is None:
        return f"[dim]needs {MIN_TEXTS} texts[/]"
    return f"[dim]{estimate.bounds[0]:{form}} to {estimate.bounds[1]:{form}}[/]"


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _coloured(text: str, colour: str) -> str:
    return f"[{colour}]{text}[/]" if colour else text
