"""Derive full names of a model's modules from its config.json alone."""

from __future__ import annotations

from folora_q.memory.model_families import FAMILIES
from folora_q.memory.shapes import Config, is_known, shape_of, text_config
from folora_q.recipe.target_modules import Modules


def modules_of_config(config: Config) -> Modules | None:
    """Return the modules of a model that is in the table and whose layers are all alike; None for any other.

    Raises:
        UserError: config.json lacks a required value.
    """
    family = FAMILIES.get(text_config(config).get("model_type", ""))
    if family is None or not is_known(config) or family.expert_width:
        return None
    shape = shape_of(config)
    ((layer, depth),) = shape.layers
    linears = [f"{family.stack}.{index}.{linear.name}" for index in range(depth) for linear in layer.linears]
    holders = [name.rpartition(".")[0] for name in linears] + [f"{family.stack}.{index}" for index in range(depth)]
    return Modules(linears, family.embeddings, family.head, shape.tied, list(dict.fromkeys(holders)))
