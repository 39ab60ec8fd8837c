"""Describe in words how far a tuned model moved from its base, in units that a person can judge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from folora_q.recipe.objectives import RewardObjective
from folora_q.recipe.size_advice import MIN_TEXTS
from folora_q.runs.results import Evaluation, KeptResult, TextKind, TextResult


@dataclass(frozen=True)
class RewardWords:
    """What the numbers of an objective on implicit rewards are called.

    Attributes:
        loss: the loss.
        unit: its unit.
        rows: what is counted.
        accuracy: the share of `PreferenceResult.accuracy`.
        learned: the answers whose loss is measured.
        margin: the mean difference, as a clause that "by X on average" follows.
    """

    loss: str
    unit: str
    rows: str
    accuracy: str
    learned: str
    margin: str


REWARD_WORDS: dict[RewardObjective, RewardWords] = {
    "dpo": RewardWords(
        loss="DPO loss",
        unit="nats per pair",
        rows="pairs",
        accuracy="chosen rewarded more",
        learned="chosen answers",
        margin="the chosen answer's implicit reward exceeds the rejected one's",
    ),
    "kto": RewardWords(
        loss="KTO loss",
        unit="mean of rows",
        rows="labelled answers",
        accuracy="reward fits the label",
        learned="desirable answers",
        margin="the implicit reward of desirable answers exceeds that of undesirable ones",
    ),
}
if REWARD_WORDS.keys() != set(get_args(RewardObjective)):
    raise TypeError(f"RewardObjective has {get_args(RewardObjective)}, REWARD_WORDS has {tuple(REWARD_WORDS)}")


def summary(found: Evaluation) -> list[str]:
    """Return a sentence each on model-generated text, on real text and on what is kept, as far as it was measured."""
    sentences = [_on_generated(text) for text in found.of_kind(TextKind.GENERATED)[:1]]
    real = found.of_kind(TextKind.GENERAL)
    sentences += [_on_real(real)] if real else []
    scored = [kept for kept in found.kept if kept.score is not None]
    return [*sentences, _on_kept(scored)] if scored else sentences


def _on_generated(text: TextResult) -> str:
    changed = 1 - text.top1_agreement.value
    if not math.isfinite(changed):
        return "On text that the base generated, the predictions of the tuned model are not finite."
    if changed <= 0:
        return "On text that the base generated, the most likely token is the same everywhere."
    return (
        f"On text that the base generated, another token is now the most likely at {changed:.1%} of the positions "
        f"(1 in {1 / changed:,.0f})."
    )


def _on_real(texts: list[TextResult]) -> str:
    shifts = ", ".join(f"{text.name} {_perplexity(text.loss.change.value)}" for text in texts)
    bounds = {text.name: text.loss.change.bounds for text in texts}
    worse = [name for name, ends in bounds.items() if ends is not None and ends[0] > 0]
    if None in bounds.values():
        judged = f"fewer than {MIN_TEXTS} texts, so no judgement"
    elif worse:
        judged = f"{' and '.join(worse)} got worse by more than chance explains"
    else:
        judged = "none got worse by more than chance explains"
    return f"Change of perplexity on real text: {shifts} ({judged})."


def _on_kept(scored: list[KeptResult]) -> str:
    """Name the capabilities that fell by more than the choice of prompts explains."""
    bounds = {kept.name: kept.score.change.bounds for kept in scored if kept.score is not None}
    fell = [name for name, ends in bounds.items() if ends is not None and ends[1] < 0]
    if fell:
        return f"Of what should be kept, {' and '.join(fell)} fell by more than chance explains."
    return f"Of what should be kept, nothing fell by more than chance explains ({', '.join(bounds)})."


def _perplexity(change: float) -> str:
    """Return a change of the loss, in nats per token, as a change of perplexity in per cent."""
    if not math.isfinite(change):
        return "not finite"
    share = math.expm1(min(change, 700.0))  # exp overflows at 710
    return f"{share:+.1%}" if abs(share) < 10 else f"x{share + 1:,.0f}"
