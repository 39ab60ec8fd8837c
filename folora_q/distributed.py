"""Whether this process is one of several. Standard library only."""

from __future__ import annotations

import os

from folora_q.errors import UserError

# How torchrun, `accelerate launch` and MPI tell their processes how many there are, as accelerate reads it.
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def require_one_process() -> None:
    """See that no launcher started several processes, each of which would train and write the same run.

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
