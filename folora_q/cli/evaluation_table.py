"""Print an evaluation as a table: after a run, and for any adapter."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from folora_q.cli.console import out, print_table, visible
from folora_q.recipe.size_advice import MIN_TEXTS
from folora_q.runs.in_words import summary
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
    """Print a table with sections for the task, model-generated text and general text, with 95 % intervals."""
    table = Table(title=escape(visible(title)), title_justify="left")
    table.add_column("held-out text")
    for heading in ("base", "tuned", "change", "95 % interval"):
        table.add_column(heading, justify="right")

    def add(label: str, change: PairedChange, form: str, lower_is_better: bool) -> None:
        good = (change.change.value < 0) == lower_is_better
        colour = "" if change.change.value == 0 else "green" if good else "yellow"
        table.add_row(
            escape(visible(label)),
            format(change.base.value, form),
            format(change.tuned.value, form),
            _coloured(f"{change.change.value:+{form}}", colour),
            _interval(change.change, f"+{form}"),
        )

    def add_kl(label: str, kl: Interval, agreement: Interval) -> None:
        table.add_row(label, "0", f"{kl.value:.4f}", f"[yellow]{kl.value:+.4f}[/]", _interval(kl, "+.4f"))
        lost = agreement.value - 1
        table.add_row("  same top token", "100.0%", f"{agreement.value:.1%}", f"[yellow]{lost:+.1%}[/]", "")

    for label, loss in _task_losses(found):
        add(label, loss, ".4f", True)
    for row in _rewards(found.preference):
        table.add_row(*row)
    if found.score is not None:
        add(f"task: {found.score.metric.replace('_', ' ')}", found.score.score, ".1%", False)
    table.add_section()
    for text in found.of_kind(TextKind.GENERATED):
        add_kl(f"{text.name}: KL", text.kl, text.top1_agreement)
        add("  loss", text.loss, ".4f", True)
    table.add_section()
    for text in found.of_kind(TextKind.GENERAL):
        add(f"{text.name}: loss (forgetting)", text.loss, ".4f", True)
    print_table(table)
    for sentence in summary(found):
        out.print(escape(visible(sentence)), soft_wrap=True)


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
    of_pairs = ("task: DPO loss, nats per pair", found.preference.loss)
    return [of_pairs, *(("chosen answers: loss", loss) for loss in of_tokens)]


def _rewards(pairs: PreferenceResult | None) -> list[tuple[str, str, str, str, str]]:
    """Return rows on the implicit rewards, which the base does not tell apart."""
    if pairs is None:
        return []
    accuracy, margin = pairs.accuracy, pairs.margin
    return [
        ("  chosen rewarded more", "", f"{accuracy.value:.1%}", "", _interval(accuracy, ".1%")),
        ("  margin of rewards", "0", f"{margin.value:.3f}", "", _interval(margin, ".3f")),
    ]


def _interval(estimate: Interval, form: str) -> str:
    if estimate.bounds is None:
        return f"[dim]needs {MIN_TEXTS} texts[/]"
    return f"[dim]{estimate.bounds[0]:{form}} to {estimate.bounds[1]:{form}}[/]"


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _coloured(text: str, colour: str) -> str:
    return f"[{colour}]{text}[/]" if colour else text
