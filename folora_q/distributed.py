"""Refuse to run as one of several processes, or with launcher settings that contradict the recipe. Standard library."""

from __future__ import annotations

import os

from folora_q.errors import UserError

# Variables by which torchrun, `accelerate launch` and MPI pass the number of processes, as accelerate reads them.
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Variables that `accelerate launch` sets from its own configuration, and that accelerate obeys in any process.
SWITCHES = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "CPU")
CHOICES = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND")
ON = ("true", "1", "yes", "y", "t", "on")


def require_one_process() -> None:
    """Check that no launcher started several processes, each of which would train and write the same run.

    Also check that no launcher told accelerate to use another precision, device or engine than the recipe's.

    Raises:
        UserError: a launcher did either.
    """
    for name in COUNTS:
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 1:
            raise UserError(
                f"this is one of {value} processes ({name}={value}), but folora-q runs as a single process on one GPU",
                "start it without torchrun, `accelerate launch` or mpirun; CUDA_VISIBLE_DEVICES chooses the GPU",
            )
    switches = [f"ACCELERATE_USE_{switch}" for switch in SWITCHES]
    changed = [name for name in switches if os.environ.get(name, "").lower() in ON]
    changed += [name for name in CHOICES if os.environ.get(name, "").lower() not in ("", "no")]
    if changed:
        raise UserError(
            f"the environment sets {changed[0]}={os.environ[changed[0]]}, which makes accelerate train differently "
            "from the recipe",
            f"start it without `accelerate launch`, or unset {changed[0]}",
        )
