"""Shared by the targets: commands in this process, a tiny model and an adapter on it."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.conftest import save_tiny_model

# The step of a run's only checkpoint.
STEP = 2
CHECKPOINT = f"checkpoint-{STEP}"


def command(*arguments: object) -> None:
    """Run a command as the command line does, but let its exceptions through."""
    from folora_q.cli.app import group

    group.main([str(argument) for argument in arguments], standalone_mode=False)


@cache
def _holder() -> TemporaryDirectory:
    return TemporaryDirectory(prefix="fuzz-")  # removed when the process ends


def kept(name: str) -> Path:
    """Create a folder that is removed when the process ends."""
    folder = Path(_holder().name) / name
    folder.mkdir()
    return folder


@cache
def tiny() -> Path:
    """Return the tiny model's folder; it is created once."""
    return save_tiny_model(kept("tiny") / "model")


@cache
def tiny_adapter() -> Path:
    """Return the folder of an adapter on the tiny model, as folora-q saves one."""
    from tests.targets.folders import write_adapter

    return write_adapter(tiny(), tiny().with_name("adapter"), 0.1)


def build_adapter(folder: Path) -> None:
    """Copy the tiny model and the adapter on it."""
    shutil.copytree(tiny(), folder / "model")
    shutil.copytree(tiny_adapter(), folder / "adapter")


def named(kind: str, *names: str) -> dict[str, str]:
    """Return these files as files of one kind."""
    return dict.fromkeys(names, kind)
