"""Results of a run or an evaluation: evaluation.json, gates.json and answers.jsonl.

Written where it is measured, read by reports; plain numbers, no torch. Losses and divergences are in nats per token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import FailFast, TypeAdapter, ValidationError

from folora_q.errors import UserError, first_line
from folora_q.storage.untrusted import MIB, parse_json, read_lines, read_text

# Of evaluation.json and gates.json. A hundred layers with hundreds of directions each take one.
MAX_RESULTS_BYTES = 16 * MIB
AGAIN = "run it again, or `folora-q eval`"
Item = TypeVar("Item")
# A list whose first wrong item ends its reading: a file of nothing else has millions, each with an error of its own.
Checked = Annotated[list[Item], FailFast()]
TextKind = Literal["task", "own", "general"]


@dataclass(frozen=True)
class Interval:
    """A number measured on some texts, with the 95 % bootstrap interval that comes of their being so few."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedChange:
    """The same of the base, of the tuned model, and tuned - base, whose interval pairs them text by text."""

    base: Interval
    tuned: Interval
    change: Interval


@dataclass(frozen=True)
class TextResult:
    """Base and tuned model on one kind of held-out text.

    Attributes:
        name: for people: "task", "own text", "own text, cut", or a file's name.
        kind: task, own (sampled from the base itself) or general.
        texts, tokens: how many texts, and how many predictions in them were compared.
        loss: cross-entropy; of general text the change is called forgetting.
        kl: KL(base ‖ tuned) over the whole vocabulary.
        top1_agreement: how often both find the same token most likely, between 0 and 1.
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
    """The task's own metric on greedy answers: the mean score, between 0 and 1."""

    metric: str
    answers: int
    score: PairedChange


@dataclass(frozen=True)
class HarnessResult:
    """One metric of one lm-eval task, with standard errors; that of the change is of paired differences where known."""

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
    """One adapted layer.

    Attributes:
        drift: E‖ΔW x‖² / E‖W x‖², measured on held-out text, by kind of text (own, task).
        predicted: the same by the gate's statistics of their text (`predicted_drift`).
        energy_kept: ‖gated step‖² / ‖step‖², summed over training, of "a" and "b"; empty where nothing was gated.
        update_norm: ‖ΔW‖ (Frobenius), None where the change is no low-rank product.
    """

    name: str
    drift: dict[str, float]
    predicted: dict[str, float] = field(default_factory=dict)
    energy_kept: dict[str, float] = field(default_factory=dict)
    update_norm: float | None = None


@dataclass(frozen=True)
class GateResult:
    """One gate.

    Attributes:
        modules: the adapted layers that share it.
        dim: width of their input; len(quotients) of its directions are resolved, the rest is the complement.
        quotients: γ, descending. values: the gate's s(γ).
        penalty: of the rows that A starts in, tr(A Σp Aᵀ), on the text that the gate was made of.
        heldout_penalty: the same on text that no gate has seen; if it is many times `penalty`, more text is needed.
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
        kind: task (held-out) or general (prompts that have nothing to do with it).
        prompt: all that the model was given: messages as chat templates take them, or plain text.
        reference, base, tuned: the right answer and theirs, without thoughts.
        base_score, tuned_score: by the task's metric, where there is one.
        reference_thought, base_thought, tuned_thought: what was thought before, where the chat template has a place for
            it and it is not empty.
    """

    kind: Literal["task", "general"]
    prompt: list[dict[str, Any]] | str
    reference: str | None
    base: str
    tuned: str
    base_score: float | None = None
    tuned_score: float | None = None
    reference_thought: str | None = None
    base_thought: str | None = None
    tuned_thought: str | None = None

    @property
    def asked(self) -> str:
        """The last thing that was said to the model."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content") or "")


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured of a tuned model against its base.

    Attributes:
        tuned, base: what was compared, by name.
        held: how the weights were held, for people, e.g. "4 bits (nf4)".
    """

    tuned: str
    base: str
    held: str
    texts: Checked[TextResult]
    score: ScoreResult | None = None
    layers: Checked[LayerResult] = field(default_factory=list)
    harness: Checked[HarnessResult] = field(default_factory=list)

    def text(self, name: str) -> TextResult | None:
        """The result on one kind of text, if there was any of it."""
        return next((text for text in self.texts if text.name == name), None)

    def of_kind(self, kind: TextKind) -> list[TextResult]:
        return [text for text in self.texts if text.kind == kind]


def to_json(value: Evaluation | list[GateResult]) -> str:
    """As evaluation.json and gates.json have it."""
    content = [asdict(item) for item in value] if isinstance(value, list) else asdict(value)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_evaluation(path: Path) -> Evaluation | None:
    """evaluation.json, or None where there is none.

    Raises:
        UserError: it is damaged.
    """
    return _read(path, Evaluation)


def read_gate_results(path: Path) -> list[GateResult]:
    """gates.json; empty where there is none.

    Raises:
        UserError: it is damaged.
    """
    return _read(path, GateResult, several=True) or []


def read_answers(path: Path) -> list[AnswerResult]:
    """answers.jsonl; empty where there is none.

    Raises:
        UserError: a line is damaged.
    """
    return [_parsed(path, AnswerResult, line) for line in _lines(path)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, line by line, until one that a crash cut off.

    Raises:
        UserError: it is no text.
    """
    found: list[dict[str, Any]] = []
    for line in _lines(path):
        try:
            value = parse_json(line)
        except ValueError:
            break
        if isinstance(value, dict):
            found.append(value)
    return found


def answer_lines(answers: Iterable[AnswerResult]) -> Iterator[dict[str, Any]]:
    """As answers.jsonl has them."""
    return (asdict(answer) for answer in answers)


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from read_lines(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}", AGAIN) from None


def _read(path: Path, kind: Any, several: bool = False) -> Any:
    try:
        text = read_text(path, MAX_RESULTS_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}", AGAIN) from None
    return _parsed(path, kind, text, several)


def _parsed(path: Path, kind: Any, text: str, several: bool = False) -> Any:
    try:
        return _adapter(kind, several).validate_json(_whole(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its beginning"
        raise UserError(f"{path} is damaged: {where}: {first['msg']}", AGAIN) from None


@cache
def _adapter(kind: Any, several: bool) -> TypeAdapter[Any]:
    return TypeAdapter(Checked[kind] if several else kind)  # pyright: ignore[reportInvalidTypeForm]  (made at runtime)


def _whole(text: str) -> str:
    """JSON without halves of surrogate pairs, which data may hold as escapes but no text can: question marks."""
    if "\\ud" not in text.lower():
        return text
    try:
        return json.dumps(parse_json(text), ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")
    except ValueError:
        return text
