"""Choose how a run computes its optimizer steps on the GPU that it has."""

from __future__ import annotations

from folora_q.distributed.processes import ONE, Processes
from folora_q.memory.estimate import CUDA_CONTEXT, GIB
from folora_q.memory.micro_batches import StepPlan, plan_step
from folora_q.memory.shapes_from_meta import find_shape
from folora_q.models.hardware import Hardware, available_memory
from folora_q.models.load import LoadedModel
from folora_q.models.meta import parameter_shapes
from folora_q.recipe.schema import Recipe


def plan_on(hardware: Hardware, recipe: Recipe, base: LoadedModel, processes: Processes = ONE) -> StepPlan | None:
    """Return the plan for the GPU that holds the base model; None on a CPU, where the recipe is followed as it is.

    With several processes it is a plan for the smallest of their GPUs, and the same in all.

    Raises:
        UserError: transformers cannot build this model without weights, as with a model that brings its own code.
    """
    available = available_memory(hardware.device)
    if available is None:
        return None
    config = base.model.config.to_dict()
    config.pop("quantization_config", None)
    skipped = base.quantization.skip_modules or () if base.quantization.prequantized else ()
    shape = find_shape(config, skipped, parameter_shapes)
    available = processes.least(available)
    return plan_step(recipe, shape, (available + CUDA_CONTEXT) / GIB)  # the context exists, so it is not in `available`
