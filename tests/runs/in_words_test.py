"""What is said about how far a model moved."""

from __future__ import annotations

import math
from dataclasses import replace

from folora_q.runs.in_words import summary
from folora_q.runs.results import Evaluation, Interval, KeptResult, PairedChange, TextKind, TextResult


def text(kind: TextKind, name: str = "prose", change: Interval | None = None, agreement: float = 1.0) -> TextResult:
    change = change or Interval(0.0)
    loss = PairedChange(Interval(3.0), Interval(3.0 + change.value), change)
    return TextResult(name, kind, 16, 400, loss, Interval(0.1), Interval(agreement))


def said(*texts: TextResult) -> list[str]:
    return summary(Evaluation("tuned", "base", "4 bits", list(texts)))


def test_the_share_of_other_tokens_is_counted() -> None:
    assert said(text(TextKind.GENERATED, agreement=0.951)) == [
        "On text that the base generated, another token is now the most likely at 4.9% of the positions (1 in 20)."
    ]
    assert "is the same everywhere" in said(text(TextKind.GENERATED))[0]
    assert "not finite" in said(text(TextKind.GENERATED, agreement=math.nan))[0]
    assert said() == []


def test_losses_are_told_as_perplexities() -> None:
    better = text(TextKind.GENERAL, "prose", Interval(-0.01, -0.02, 0.001))
    worse = text(TextKind.GENERAL, "code", Interval(math.log(1.5), 0.2, 0.6))
    assert said(better) == [
        "Change of perplexity on real text: prose -1.0% (none got worse by more than chance explains)."
    ]
    assert said(better, worse) == [
        "Change of perplexity on real text: prose -1.0%, code +50.0% (code got worse by more than chance explains)."
    ]
    few = replace(worse, loss=replace(worse.loss, change=Interval(0.1)))
    assert "(fewer than 12 texts, so no judgement)" in said(few)[0]
    assert "code x1,097 (" in said(replace(worse, loss=replace(worse.loss, change=Interval(7.0, 6.0, 8.0))))[0]


def test_capabilities_that_fell_are_named() -> None:
    def kept(name: str, change: Interval) -> KeptResult:
        score = PairedChange(Interval(0.9), Interval(0.9 + change.value), change)
        return KeptResult(name, "a metric", 20, score, Interval(0.1), Interval(0.9))

    def said_of(*results: KeptResult) -> list[str]:
        return summary(Evaluation("tuned", "base", "4 bits", [], kept=list(results)))

    fine, lost = kept("code", Interval(-0.05, -0.2, 0.1)), kept("tools", Interval(-0.5, -0.7, -0.3))
    assert said_of(fine) == ["Of what should be kept, nothing fell by more than chance explains (code)."]
    assert said_of(fine, lost) == ["Of what should be kept, tools fell by more than chance explains."]
    assert said_of(replace(fine, score=None)) == []
