"""Choose how a run computes its optimizer steps on the GPU that it has."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from folora_q.distributed.processes import ONE, Processes
from folora_q.memory.estimate import CUDA_CONTEXT, GIB
from folora_q.memory.micro_batches import StepPlan, plan_step
from folora_q.memory.shapes_from_meta import find_shape
from folora_q.models.hardware import Hardware, available_memory
from folora_q.models.meta import parameter_shapes
from folora_q.models.stored_quantization import stored_quantization
from folora_q.recipe.schema import Recipe


def plan_on(
    hardware: Hardware, recipe: Recipe, config: PreTrainedConfig, processes: Processes = ONE
) -> StepPlan | None:
    """Return the plan for the GPU that a model will be on; None on a CPU, where the recipe is followed as it is.

    With several processes it is a plan for the smallest of their GPUs, and the same in all.

    Raises:
        UserError: transformers cannot build this model without weights, as with a model that brings its own code.
    """
    available = available_memory(hardware.device)
    if available is None:
        return None
    values = config.to_dict()
    stored = stored_quantization({"quantization_config": values.pop("quantization_config", None)})
    skipped = stored.skipped or () if stored is not None else ()
    shape = replace(find_shape(values, skipped, parameter_shapes), gpus=processes.count)
    available = processes.least(available)
    return plan_step(recipe, shape, (available + CUDA_CONTEXT) / GIB)  # the context exists, so it is not in `available`
