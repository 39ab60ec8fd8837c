"""Whether this process is one of several, or was started to train otherwise than its recipe says. Standard library."""

from __future__ import annotations

import os

from folora_q.errors import UserError

# How torchrun, `accelerate launch` and MPI tell their processes how many there are, as accelerate reads it.
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# What `accelerate launch` sets by its own configuration, and accelerate obeys in any process.
SWITCHES = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "CPU")
CHOICES = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND")
ON = ("true", "1", "yes", "y", "t", "on")


def require_one_process() -> None:
    """See that no launcher started several processes, each of which would train and write the same run.

    Nor may a launcher of one process have told accelerate to use another precision, device or engine than the recipe's.

    Raises:
        UserError: one did.
    """
    for name in COUNTS:
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 1:
            raise UserError(
                f"this is one of {value} processes ({name}={value}), and folora-q works in one, on one GPU",
                "start it without torchrun, `accelerate launch` or mpirun; CUDA_VISIBLE_DEVICES chooses the GPU",
            )
    switches = [f"ACCELERATE_USE_{switch}" for switch in SWITCHES]
    changed = [name for name in switches if os.environ.get(name, "").lower() in ON]
    changed += [name for name in CHOICES if os.environ.get(name, "").lower() not in ("", "no")]
    if changed:
        raise UserError(
            f"the environment sets {changed[0]}={os.environ[changed[0]]}, by which accelerate would train otherwise "
            "than the recipe says",
            f"start it without `accelerate launch`, or unset {changed[0]}",
        )
