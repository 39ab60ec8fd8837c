"""What a launcher started: the number of processes, and settings that contradict the recipe. Standard library only."""

from __future__ import annotations

import os

from folora_q.errors import UserError

# torchrun and `accelerate launch` pass the number of processes and these, by which the processes find each other.
COUNT, MEETING = "WORLD_SIZE", ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Variables by which MPI passes the number of processes, as accelerate reads them.
COUNTS_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Variables that `accelerate launch` sets from its own configuration, and that accelerate obeys in any process.
SWITCHES = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "CPU")
CHOICES = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND")
# Why an engine is not used, where that is more than another setting than the recipe's.
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not used: ZeRO-2 shards only the adapter's gradients and optimizer, "
    "which are small, and ZeRO-3 does not shard weights that were loaded in 4 bits",
    "ACCELERATE_USE_FSDP": "accelerate's FSDP is not used, since it would shard the adapter too: model.fsdp shards the "
    "base, where it is too large for a GPU",
}
ON = ("true", "1", "yes", "y", "t", "on")
TORCHRUN = "torchrun --nproc-per-node {} -m folora_q"
EXAMPLE = f"{TORCHRUN.format(2)} train recipe.yaml"


def launched_processes() -> int:
    """Return the number of processes that a launcher started for this run.

    Raises:
        UserError: they cannot find each other, or the launcher told accelerate to use another precision, device or
            engine than the recipe's.
    """
    _require_the_recipes_engine()
    for name in COUNTS_OF_MPI:
        if _count(name) > 1:
            raise UserError(
                f"this is one of {_count(name)} processes of MPI ({name}), which do not know each other's address",
                f"start it with torchrun: `{EXAMPLE}`",
            )
    count = _count(COUNT)
    missing = [name for name in MEETING if not os.environ.get(name)]
    if count > 1 and missing:
        raise UserError(
            f"this is one of {count} processes ({COUNT}={count}), but {missing[0]} is not set",
            f"start it with torchrun: `{EXAMPLE}`",
        )
    return count


def rank() -> int:
    """Return the number of this process among those of the launcher, before torch is imported."""
    value = os.environ.get("RANK", "")
    return int(value) if _count(COUNT) > 1 and value.isdecimal() else 0


def launch_line() -> str:
    """Return how torchrun starts folora-q with as many processes on this machine as now."""
    return TORCHRUN.format(_count("LOCAL_WORLD_SIZE"))


def require_one_process(command: str) -> None:
    """Check that a launcher did not start several processes for a command that is one process's work.

    Raises:
        UserError: it did.
    """
    if (count := launched_processes()) > 1:
        raise UserError(f"`folora-q {command}` runs in one process, and this is one of {count}", "start it by itself")


def _count(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() and int(value) > 1 else 1


def _require_the_recipes_engine() -> None:
    switches = [f"ACCELERATE_USE_{switch}" for switch in SWITCHES]
    changed = [name for name in switches if os.environ.get(name, "").lower() in ON]
    changed += [name for name in CHOICES if os.environ.get(name, "").lower() not in ("", "no")]
    if changed and (reason := ENGINES.get(changed[0])) is not None:
        raise UserError(f"{reason} ({changed[0]} is set)", f"start it with `{EXAMPLE}`")
    if changed:
        raise UserError(
            f"the environment sets {changed[0]}={os.environ[changed[0]]}, which makes accelerate train differently "
            "from the recipe",
            f"start it with torchrun, or unset {changed[0]}",
        )
