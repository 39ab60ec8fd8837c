"""The gate rules: description, defaults and valid settings of each. No PyTorch; `folora_q.rules` has the code.

To add a rule, add it to `RuleName` and `GATE_RULES`, write `folora_q/rules/<name>.py`, list it in `folora_q.rules`, and
describe it in docs/method.md. A place that was forgotten fails at import or in tests/rules/registry_test.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

RuleName = Literal["frozen", "step", "spectral"]
Place = Literal["a_start", "a_step", "b_step"]
DEFAULT_RULE: RuleName = "frozen"
# Peak learning rate of plain QLoRA, without a gate, unless a recipe sets one.
PLAIN_LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class GateSettings:
    """The settings that a rule checks.

    Attributes:
        places: `gate.places`.
        leading: `gate.start` is `leading`: A starts in the directions of largest γ.
        changed: settings of the gate's curve s(γ) that differ from their defaults.
    """

    places: Sequence[Place]
    leading: bool
    changed: Sequence[str]


@dataclass(frozen=True)
class GateRule:
    """A rule of the gate.

    Attributes:
        summary: one or two sentences for help texts and docs.
        places: where it acts by default: on A's initialization, A's steps, B's steps.
        random_places: the same with `gate.start: random`.
        ridge, utility_ridge: defaults, relative to each covariance's mean variance.
        learning_rate: default peak learning rate (docs/frontier.md).
        trains_a: False: A is frozen after its initialization, and the gates are not needed during training.
        optimizer: "any": the recipe's optimizer, unchanged. "wrapped": each step of the recipe's optimizer passes
            through the gates. "own": an AdamW of its own.
        uses_strength: λ, floor and sharpness shape its gate.
        cheaper: the rule to propose if memory does not suffice.
        objection: returns what is wrong with settings and how to correct it, or None.
    """

    name: RuleName
    summary: str
    places: tuple[Place, ...]
    ridge: float
    utility_ridge: float
    learning_rate: float
    trains_a: bool
    optimizer: Literal["any", "wrapped", "own"]
    uses_strength: bool
    objection: Callable[[GateSettings], str | None]
    random_places: tuple[Place, ...] | None = None
    cheaper: RuleName | None = None

    def default_places(self, random_start: bool) -> list[Place]:
        """Return the default of `gate.places`."""
        return list(self.random_places if random_start and self.random_places is not None else self.places)


def _frozen_objection(settings: GateSettings) -> str | None:
    if settings.leading and settings.changed:
        return f"rule frozen gates by the quotient alone, without gate.{settings.changed[0]}: set gate.rule to step"
    if "a_start" not in settings.places or "a_step" in settings.places:
        return "rule frozen does not train A: set gate.rule to step, or remove gate.places"
    if not settings.leading and "b_step" in settings.places:
        return "with gate.start: random, A's rows have no quotients by which to gate B's steps: remove gate.places"
    return None


def _step_objection(settings: GateSettings) -> str | None:
    if not {"a_step", "b_step"} & set(settings.places):
        return "rule step gates no step with these gate.places: add a_step or b_step, or remove the key"
    return None


def _spectral_objection(settings: GateSettings) -> str | None:
    if "b_step" in settings.places:
        return "rule spectral leaves B to AdamW, as in the paper: set gate.places to [a_start, a_step] or [a_step]"
    if "a_step" not in settings.places:
        return "rule spectral needs a_step in gate.places"
    return None


_RULES = (
    GateRule(
        name="frozen",
        summary="A is fixed to the leading directions and only B is trained; the lengths of A's rows scale each "
        "direction's share of a step. Needs the least memory and time.",
        places=("a_start", "b_step"),
        random_places=("a_start",),  # PEFT's random rows have no quotients
        ridge=0.1,
        utility_ridge=1e-4,
        learning_rate=2e-3,
        trains_a=False,
        optimizer="any",
        uses_strength=False,
        objection=_frozen_objection,
    ),
    GateRule(
        name="step",
        summary="A and B are trained, and every step of the optimizer passes through the gate.",
        places=("a_start", "a_step", "b_step"),
        ridge=0.01,
        utility_ridge=0.01,
        learning_rate=4e-3,
        trains_a=True,
        optimizer="wrapped",
        uses_strength=True,
        objection=_step_objection,
        cheaper="frozen",
    ),
    GateRule(
        name="spectral",
        summary="A is trained by Adam in the gate's coordinates and B by AdamW, as in the FoLoRA paper.",
        places=("a_start", "a_step"),
        ridge=0.01,
        utility_ridge=0.01,
        learning_rate=1e-3,
        trains_a=True,
        optimizer="own",
        uses_strength=True,
        objection=_spectral_objection,
    ),
)
GATE_RULES: dict[str, GateRule] = {rule.name: rule for rule in _RULES}
if tuple(GATE_RULES) != get_args(RuleName):
    raise TypeError(f"RuleName has {get_args(RuleName)}, GATE_RULES has {tuple(GATE_RULES)}")


def default_learning_rate(gate: Mapping[str, Any]) -> float | None:
    """Return the default peak learning rate for a `gate` section as written; None if its rule is unknown."""
    if not gate.get("enabled", True):
        return PLAIN_LEARNING_RATE
    name = gate.get("rule", DEFAULT_RULE)
    return GATE_RULES[name].learning_rate if isinstance(name, str) and name in GATE_RULES else None


def rule_summaries() -> str:
    """Return every rule's summary, for a help text."""
    return " ".join(f"{rule.name}: {rule.summary}" for rule in _RULES)


def defaults_by_rule(value: Callable[[GateRule], object]) -> str:
    """Return a setting's default under each rule, for a help text: "0.1 (frozen), 0.01 (step, spectral)"."""
    names: dict[str, list[str]] = {}
    for rule in _RULES:
        names.setdefault(written(value(rule)), []).append(rule.name)
    return ", ".join(f"{default} ({', '.join(rules)})" for default, rules in names.items())


def written(value: object) -> str:
    """Format a default as in a recipe: 2e-3, 0.1, [a_start, b_step]."""
    if isinstance(value, float):
        return (f"{value:g}" if value >= 0.01 else f"{value:.0e}").replace("e-0", "e-")
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
