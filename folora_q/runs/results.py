"""Results of a run or an evaluation, as `folora_q.runs.result_files` stores them.

Plain numbers without PyTorch. Losses and divergences are in nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import FailFast

from folora_q.recipe.objectives import RewardObjective

Item = TypeVar("Item")
# A list that fails at its first invalid item, since a malicious file may have millions, each with its own error.
Checked = Annotated[list[Item], FailFast()]


class TextKind(StrEnum):
    """Kinds of held-out text; the values are those in evaluation.json."""

    TASK = "task"
    GENERATED = "own"  # by the base model
    GENERAL = "general"
    KEPT = "keep"  # answers of the base that the recipe keeps; in evaluation.json under `kept`
    EARLIER = "earlier"  # held-out rows of a task that was learned before


# Names of the model-generated texts: complete, and without their beginning.
GENERATED_TEXT, GENERATED_TEXT_CUT = "generated text", "generated text, cut"


@dataclass(frozen=True)
class Interval:
    """A number measured on a sample of texts, with its 95 % confidence interval; None if there are too few texts."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both ends of the interval; None if there is none."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class PairedChange:
    """A number of the base and of the tuned model, and tuned - base with an interval from paired texts."""

    base: Interval
    tuned: Interval
    change: Interval


@dataclass(frozen=True)
class TextResult:
    """Base and tuned model on one kind of held-out text.

    Attributes:
        name: for display: "task", GENERATED_TEXT, GENERATED_TEXT_CUT, or a file's name.
        kind: what the text is.
        texts, tokens: number of texts, and of predictions compared in them.
        loss: cross-entropy; its change on general text is called forgetting.
        kl: KL(base ‖ tuned) over the complete vocabulary.
        top1_agreement: share of positions where both have the same most likely token.
    """

    name: str
    kind: TextKind
    texts: int
    tokens: int
    loss: PairedChange
    kl: Interval
    top1_agreement: Interval


@dataclass(frozen=True)
class ScoreResult:
    """The task's own metric on greedy answers: the mean score, between 0 and 1.

    Attributes:
        task: name of the earlier task that it is of; None: the run's own.
    """

    metric: str
    answers: int
    score: PairedChange
    task: str | None = None


@dataclass(frozen=True)
class KeptResult:
    """One capability, or one file of `keep`, on its held-out prompts or texts.

    Attributes:
        metric: what the score counts; None for a file.
        texts: number of prompts with an answer of the base's, or of texts.
        score: share of answers that satisfy the metric; None for a file.
        kl: KL(base ‖ tuned) on the base's own answers, or on the texts.
        top1_agreement: share of positions there where both have the same most likely token.
    """

    name: str
    metric: str | None
    texts: int
    score: PairedChange | None
    kl: Interval
    top1_agreement: Interval


@dataclass(frozen=True)
class PreferenceResult:
    """Base and tuned model on held-out pairs of answers (objective dpo), or on answers with a label (kto).

    The implicit reward of an answer is β log π(answer) / π_base(answer), so the base's rewards are 0.

    Attributes:
        pairs: the number of pairs, or of answers with a label.
        beta: β.
        loss: the objective's; the base's is ln 2 for dpo, and half the mean weight for kto.
        accuracy: share of pairs in which the chosen answer has the larger reward; of answers with a label, share in
            which the reward of a desirable one exceeds `reference`, or that of an undesirable one is below it.
        margin: mean reward of the chosen or desirable answers, less that of the rejected or undesirable ones; None if
            all answers have the same label.
        reference: of kto, the reward with which rewards are compared: z, the mean of mismatched answers, or 0 if that
            is negative.
    """

    pairs: int
    beta: float
    loss: PairedChange
    accuracy: Interval
    margin: Interval | None
    objective: RewardObjective = "dpo"
    reference: float | None = None


@dataclass(frozen=True)
class HarnessResult:
    """One metric of one lm-eval task, with standard errors; that of the change uses paired differences if known."""

    task: str
    metric: str
    samples: int
    base: float
    base_stderr: float | None
    tuned: float
    tuned_stderr: float | None
    change_stderr: float | None
    higher_is_better: bool = True


@dataclass(frozen=True)
class LayerResult:
    """Results of one adapted layer.

    Attributes:
        drift: E‖ΔW x‖² / E‖W x‖², measured on held-out text, by kind of text (own, task).
        predicted: the drift by the gate's statistics of each text (`predicted_drift`).
        energy_kept: ‖gated step‖² / ‖step‖², summed over training, for "a" and "b"; empty if nothing was gated.
        update_norm: ‖ΔW‖ (Frobenius); None if the change is not a low-rank product.
    """

    name: str
    drift: dict[str, float]
    predicted: dict[str, float] = field(default_factory=dict)
    energy_kept: dict[str, float] = field(default_factory=dict)
    update_norm: float | None = None


@dataclass(frozen=True)
class GateResult:
    """Results of one gate.

    Attributes:
        modules: the adapted layers that share it.
        dim: width of their input; len(quotients) of its directions are resolved, the rest is the complement.
        quotients: utility-penalty quotients γ, descending. values: the gate's s(γ).
        penalty: tr(A Σp Aᵀ) of the initial rows of A, on the text that the gate was computed from.
        heldout_penalty: the penalty on held-out text; if it is many times `penalty`, more text is needed.
    """

    modules: Checked[str]
    dim: int
    gate_lambda: float
    quotients: Checked[float]
    values: Checked[float]
    complement_quotient: float
    complement_value: float
    penalty: float | None = None
    heldout_penalty: float | None = None

    @property
    def mean_value(self) -> float:
        """The mean of the gate over all directions of the input."""
        outside = self.dim - len(self.values)
        return (sum(self.values) + outside * self.complement_value) / self.dim


@dataclass(frozen=True)
class AnswerResult:
    """One prompt, answered by base and tuned model.

    Attributes:
        kind: task (held-out), general (prompts unrelated to the task) or keep (prompts of a capability).
        prompt: the complete input: messages for a chat template, or plain text.
        reference, base, tuned: the correct answer and the models' answers, without thoughts.
        base_score, tuned_score: by the task's metric, if there is one.
        reference_thought, base_thought, tuned_thought: the thought before each answer, if the chat template has a place
            for it and it is not empty.
        capability: the capability or file whose prompt it is.
    """

    kind: Literal["task", "general", "keep"]
    prompt: list[dict[str, Any]] | str
    reference: str | None
    base: str
    tuned: str
    base_score: float | None = None
    tuned_score: float | None = None
    reference_thought: str | None = None
    base_thought: str | None = None
    tuned_thought: str | None = None
    capability: str | None = None

    @property
    def asked(self) -> str:
        """The last message to the model."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content") or "")


@dataclass(frozen=True)
class Evaluation:
    """All measurements of a tuned model against its base.

    Attributes:
        tuned, base: names of the compared models.
        held: precision of the weights, for display, e.g. "4 bits (nf4)".
        kept: the capabilities and files that the recipe keeps.
        earlier: scores of the tasks that were learned before.
    """

    tuned: str
    base: str
    held: str
    texts: Checked[TextResult]
    score: ScoreResult | None = None
    layers: Checked[LayerResult] = field(default_factory=list)
    harness: Checked[HarnessResult] = field(default_factory=list)
    kept: Checked[KeptResult] = field(default_factory=list)
    earlier: Checked[ScoreResult] = field(default_factory=list)
    preference: PreferenceResult | None = None

    def text(self, name: str) -> TextResult | None:
        """Return the result on a text by its name, if there is one."""
        return next((text for text in self.texts if text.name == name), None)

    def of_kind(self, kind: TextKind) -> list[TextResult]:
        return [text for text in self.texts if text.kind == kind]
