"""Choose the batches of sampling, statistics and training by memory, and whether training recomputes activations.

The optimizer step stays as the recipe says: the loss of a step is a mean over its tokens, however it is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from folora_q.block_sizes import STATISTICS_LENGTH, STATISTICS_TOKENS
from folora_q.distributed.launch import TORCHRUN
from folora_q.errors import UserError
from folora_q.memory.estimate import SHARDED, MemoryEstimate, estimate
from folora_q.memory.shapes import ModelShape
from folora_q.recipe import Recipe

# Kernel launches and Python take as long as this many tokens of a forward and backward pass, and recomputation makes a
# pass longer by this factor. Both are assumptions, which only rank the choices: 4,800 tokens on an H100
# (docs/performance.md), fewer on slower cards.
LAUNCH_TOKENS, RECOMPUTATION = 2000, 4 / 3
# Generating a token for this many texts takes little longer than for one: the weights are read for all of them.
MAX_SAMPLING_ROWS = 128


@dataclass(frozen=True)
class StepPlan:
    """A way to compute the recipe's optimizer step.

    Attributes:
        recipe: the recipe with these settings; its effective batch size is the same.
        recompute: whether activations are recomputed in the backward pass.
        memory: the estimate with these settings.
    """

    recipe: Recipe
    recompute: bool
    memory: MemoryEstimate

    @property
    def calibration(self) -> str:
        """How many texts are sampled at a time, and how many tokens the statistics read at a time."""
        proxy, gate = self.recipe.proxy, self.recipe.gate
        reading = f", statistics of {gate.batch_tokens:,} tokens at a time" if gate.batch_tokens else ""
        return f"sampling {proxy.batch_size} texts at a time{reading}"

    @property
    def rows(self) -> int:
        """The number of sequences in one forward pass."""
        return self.recipe.training.per_device_train_batch_size

    @property
    def passes(self) -> int:
        """The number of forward passes in an optimizer step."""
        return self.recipe.training.gradient_accumulation_steps

    @property
    def time(self) -> float:
        """A step's time in units of a token's forward and backward pass, to rank plans by."""
        training = self.recipe.training
        tokens = LAUNCH_TOKENS + self.rows * training.sequences_per_row * training.max_length
        return self.passes * tokens * (RECOMPUTATION if self.recompute else 1)

    def __str__(self) -> str:
        rows, passes = self.rows, self.passes
        what = "sequence" if self.recipe.training.sequences_per_row == 1 else "pair"
        at_once = f"{rows} {what}{'s' * (rows != 1)} at a time" + f", {passes} times per step" * (passes != 1)
        fsdp = self.recipe.model.fsdp
        sharded = f", with model.fsdp: {fsdp}" if fsdp in SHARDED else ""
        return f"{at_once}, {'with' if self.recompute else 'without'} activation checkpointing{sharded}"


def plan_step(recipe: Recipe, shape: ModelShape, gib: float) -> StepPlan:
    """Return the plan that is expected to be the fastest of those that fit; if none fits, the one that needs least.

    Of the places of the base that `model.fsdp: auto` leaves open, the first in which a plan fits is taken, or the last.

    What the recipe fixes stays: with `training.auto_batch_size: false` the batch size, and any
    `training.activation_checkpointing` but auto.

    Args:
        gib: memory of the GPU.
    """
    if recipe.model.fsdp == "auto":
        for place in ("none", *SHARDED) if shape.gpus > 1 else ("none",):
            plan = plan_step(recipe.changed({"model": {"fsdp": place}}), shape, gib)
            if plan.memory.fits(gib):
                break
        return plan
    plans = list(_plans(plan_batches(recipe, shape, gib), shape))
    fitting = [plan for plan in plans if plan.memory.fits(gib)]
    if fitting:
        return min(fitting, key=lambda plan: (plan.time, plan.memory.peak))
    return min(plans, key=lambda plan: (plan.memory.peak, plan.time))


def plan_batches(recipe: Recipe, shape: ModelShape, gib: float) -> Recipe:
    """Return the recipe with the largest batches for sampling, statistics and the evaluation that fit.

    If none does, one text is sampled or evaluated at a time, and statistics read as many tokens as training. Nothing
    changes with `training.auto_batch_size: false`. Of the results only the sampled text depends on its batches, as on a
    seed.
    """
    if not recipe.training.auto_batch_size:
        return recipe
    texts = recipe.proxy.num_samples + recipe.proxy.num_heldout_samples
    batches = [-(-texts // count) for count in range(-(-texts // MAX_SAMPLING_ROWS), texts + 1)]
    sampling = (recipe.changed({"proxy": {"batch_size": rows}}) for rows in dict.fromkeys(batches))
    recipe = _first_that_fits(sampling, shape, gib, "sampling")
    rows = _halves(recipe.evaluation.batch_size, 1)
    evaluating = (recipe.changed({"evaluation": {"batch_size": size}}) for size in rows)
    recipe = _first_that_fits(evaluating, shape, gib, "evaluation")
    if not recipe.gate.enabled:
        return recipe
    longest = min(recipe.training.max_length, STATISTICS_LENGTH)  # a row is never cut for memory
    sizes = _halves(recipe.gate.batch_tokens or STATISTICS_TOKENS, longest)
    reading = [recipe.changed({"gate": {"batch_tokens": size, "batch_size": size}}) for size in sizes]
    return _first_that_fits([*reading, recipe], shape, gib, "statistics")


def _halves(size: int, least: int) -> list[int]:
    """Return a size, half of it, and so on, but nothing below `least` except the size itself."""
    sizes = [size]
    while sizes[-1] >= 2 * least:
        sizes.append(sizes[-1] // 2)
    return sizes


def _first_that_fits(recipes: Iterable[Recipe], shape: ModelShape, gib: float, stage: str) -> Recipe:
    """Return the first recipe with which a stage fits, or the last."""
    for recipe in recipes:
        if estimate(recipe, shape).fits(gib, stage):
            break
    return recipe


def _plans(recipe: Recipe, shape: ModelShape) -> Iterator[StepPlan]:
    training = recipe.training
    sequences = training.per_device_train_batch_size * training.gradient_accumulation_steps
    sizes = [rows for rows in range(1, sequences + 1) if sequences % rows == 0]
    if not training.auto_batch_size:
        sizes = [training.per_device_train_batch_size]
    recomputing = [True] if training.activation_offloading else [False, True]
    if training.activation_checkpointing != "auto":
        recomputing = [training.activation_checkpointing]
    for rows in sizes:
        for recompute in recomputing:
            update: dict[str, Any] = {
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": sequences // rows,
                "activation_checkpointing": recompute,
            }
            changed = recipe.changed({"training": update})
            yield StepPlan(changed, recompute, estimate(changed, shape))


def divided_among(recipe: Recipe, processes: int) -> Recipe:
    """Return the recipe with forward passes that divide among processes, one for each GPU; its steps stay the same.

    Raises:
        UserError: the rows of a step do not, or one process cannot do what the recipe says.
    """
    training, fsdp = recipe.training, recipe.model.fsdp
    if processes == 1 and fsdp in SHARDED:
        line = TORCHRUN.format(2)
        raise UserError(
            f"model.fsdp: {fsdp} shards the base over several processes, and this is one",
            f"start it with `{line}`, or set model.fsdp: auto",
        )
    rows, passes = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if passes % processes == 0:
        return recipe
    if rows * passes % processes:
        fitting = [count for count in range(1, rows * passes + 1) if rows * passes % count == 0]
        raise UserError(
            f"the {rows * passes} rows of a step (training.per_device_train_batch_size x gradient_accumulation_steps) "
            f"do not divide among {processes} processes",
            f"start one of {', '.join(map(str, fitting))} processes, or change either setting",
        )
    each = rows * passes // processes
    size = max(size for size in range(1, rows + 1) if each % size == 0)
    update = {"per_device_train_batch_size": size, "gradient_accumulation_steps": rows * passes // size}
    return recipe.changed({"training": update})


def of_one_process(recipe: Recipe, processes: int) -> Recipe:
    """Return a recipe that divides among processes with the forward passes of one of them."""
    return _with_passes(recipe, recipe.training.gradient_accumulation_steps // processes)


def of_all_processes(recipe: Recipe, processes: int) -> Recipe:
    """Return the recipe of one process with the forward passes of all."""
    return _with_passes(recipe, recipe.training.gradient_accumulation_steps * processes)


def _with_passes(recipe: Recipe, passes: int) -> Recipe:
    return recipe.changed({"training": {"gradient_accumulation_steps": passes}})
