"""Propose changes to a recipe that does not fit a GPU, the least harmful first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from folora_q.memory.estimate import GIB, MemoryEstimate, estimate
from folora_q.memory.micro_batches import plan_step
from folora_q.memory.shapes import ModelShape
from folora_q.recipe import Recipe

# A change that saves less than this share of the card is not proposed.
MIN_SAVING = 0.005
# Kinds of changes, least harm first.
HARM = (
    "attention", "proxy", "gate", "evaluation", "checkpointing", "rows", "rounds", "optimizer", "constants", "dtype",
    "bases", "rule", "rank of the gates", "rank of the adapter", "length",
)  # fmt: skip
PASSES = "training.gradient_accumulation_steps"
Overrides = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """Settings that are changed together.

    Attributes:
        cost: the disadvantage, in words.
        saves: bytes by which the peak decreases.
    """

    overrides: Overrides
    cost: str
    saves: int


@dataclass(frozen=True)
class Advice:
    """Changes that make a recipe fit.

    Attributes:
        changes: the least harmful first.
        after: the estimate with all changes.
        fits: whether they suffice.
    """

    changes: tuple[Change, ...]
    after: MemoryEstimate
    fits: bool

    @property
    def overrides(self) -> Overrides:
        """All settings, as overrides of the recipe."""
        return {key: value for change in self.changes for key, value in change.overrides.items()}

    def of_all(self, processes: int) -> Advice:
        """Return the advice for one of several processes with the forward passes of all."""

        def of_all(change: Change) -> Change:
            passes = {key: value * processes for key, value in change.overrides.items() if key == PASSES}
            return replace(change, overrides=change.overrides | passes)

        return replace(self, changes=tuple(map(of_all, self.changes)))


def advise(recipe: Recipe, shape: ModelShape, card: float) -> Advice:
    """Propose changes until the run fits: each time the first of the ladder that lowers the peak.

    They are changes to the run as it would be on this card, with the smallest forward passes that the recipe allows.
    """
    changes: dict[str, Change] = {}
    plan = plan_step(recipe, shape, card)
    smaller, found = plan.recipe, plan.memory
    while not found.fits(card):
        step = _first_that_helps(smaller, shape, found, card)
        if step is None:
            return Advice(_in_order(changes), found, False)
        name, change, smaller, after = step
        before = changes.get(name)
        saved = found.peak - after.peak + (before.saves if before else 0)
        changes[name] = replace(change, overrides=(before.overrides if before else {}) | change.overrides, saves=saved)
        found = after
    made = _in_order(changes)
    overrides = {key: value for change in made for key, value in change.overrides.items()}
    return Advice(made, plan_step(_with(recipe, overrides), shape, card).memory, True)


def _in_order(changes: Mapping[str, Change]) -> tuple[Change, ...]:
    return tuple(changes[kind] for kind in HARM if kind in changes)


def _first_that_helps(
    recipe: Recipe, shape: ModelShape, found: MemoryEstimate, card: float
) -> tuple[str, Change, Recipe, MemoryEstimate] | None:
    """Return the name of a change, the change, and the recipe and the estimate with it."""
    for name, overrides, cost in _ladder(recipe):
        changed = _with(recipe, overrides)
        after = estimate(changed, shape)
        saves = found.peak - after.peak
        if saves > MIN_SAVING * card * GIB or (saves > 0 and after.largest.name != found.largest.name):
            return name, Change(overrides, cost, saves), changed, after
    return None


def _ladder(recipe: Recipe) -> Iterator[tuple[str, Overrides, str]]:
    """Yield possible changes, in the order of HARM: the kind, settings, and the cost."""
    training, gate = recipe.training, recipe.gate
    same = "the same results, slower"
    if recipe.model.attn_implementation == "eager":
        yield "attention", {"model.attn_implementation": "sdpa"}, "none"
    sizes = {
        "proxy": (recipe.proxy.batch_size, "other sampled text, slower"),
        "gate": (recipe.statistics_batch_size(training.max_length), same),
        "evaluation": (recipe.evaluation.batch_size, same),
    }
    for section, (size, cost) in sizes.items():
        if size > 1:
            yield section, {f"{section}.batch_size": size // 2}, cost
    if training.activation_checkpointing is False:
        yield "checkpointing", {"training.activation_checkpointing": True}, "a third slower"
    if (size := training.per_device_train_batch_size) > 1:
        parts = 2 if size % 2 == 0 else size
        halved = {
            "training.per_device_train_batch_size": size // parts,
            PASSES: training.gradient_accumulation_steps * parts,
        }
        yield "rows", halved, "the same steps, slower"
    limit = recipe.proxy.statistics_memory
    lower = 0.5 if limit is None else limit / 2
    if gate.enabled and lower >= 1 / 16:
        yield "rounds", {"proxy.statistics_memory": lower}, "the text is read again for every round"
    if training.optim not in ("auto", "paged_adamw_8bit") and gate.facts.optimizer != "own":
        yield "optimizer", {"training.optim": "paged_adamw_8bit"}, "moments in 8 bits"
    yield from _less_precise(recipe)
    yield from _harmful(recipe)


def _less_precise(recipe: Recipe) -> Iterator[tuple[str, Overrides, str]]:
    if not recipe.model.bnb_4bit_use_double_quant:
        yield "constants", {"model.bnb_4bit_use_double_quant": True}, "slightly coarser weights"
    if recipe.model.dtype == "float32":
        yield "dtype", {"model.dtype": "bfloat16"}, "computes in 16 bits"
    if recipe.gate.enabled and recipe.gate.basis_dtype == "float32":
        yield "bases", {"gate.basis_dtype": "bfloat16"}, "gates have three digits"


def _harmful(recipe: Recipe) -> Iterator[tuple[str, Overrides, str]]:
    training, gate = recipe.training, recipe.gate
    if gate.enabled and (cheaper := gate.facts.cheaper) is not None and "a_start" in gate.places:
        unused = {f"gate.{name}": default for name, default in gate.reshaped.items()}
        yield (
            "rule",
            {"gate.rule": cheaper, "gate.places": ["a_start"]} | unused,
            "A is not trained; slightly slower learning at first",
        )
    if gate.enabled and gate.rank > 16:
        yield "rank of the gates", {"gate.rank": gate.rank // 2}, "coarser gates"
    if recipe.adapter.r > 8:
        yield "rank of the adapter", {"adapter.r": recipe.adapter.r // 2}, "the adapter has less capacity"
    if training.max_length > 256:
        cost = "longer rows are left out or cut (data.overlong)"
        yield "length", {"training.max_length": training.max_length // 2}, cost


def _with(recipe: Recipe, overrides: Overrides) -> Recipe:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return recipe.changed(sections)
