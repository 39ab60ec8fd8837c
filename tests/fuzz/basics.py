"""What the targets share: commands in this process, a tiny model and an adapter on it."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.conftest import save_tiny_model

# The step of the one checkpoint that a run has here.
STEP = 2
CHECKPOINT = f"checkpoint-{STEP}"


def command(*arguments: object) -> None:
    """A command as the command line runs it; what it raises comes through, whatever exit code it would be."""
    from folora_q.cli.app import group

    group.main([str(argument) for argument in arguments], standalone_mode=False)


@cache
def _holder() -> TemporaryDirectory:
    return TemporaryDirectory(prefix="fuzz-")  # which removes itself when the process ends


def kept(name: str) -> Path:
    """A new folder that stays as long as the process."""
    folder = Path(_holder().name) / name
    folder.mkdir()
    return folder


@cache
def tiny() -> Path:
    """The tiny model, made once."""
    return save_tiny_model(kept("tiny") / "model")


@cache
def tiny_adapter() -> Path:
    """An adapter on it, as folora-q saves one."""
    from tests.targets.folders import write_adapter

    return write_adapter(tiny(), tiny().with_name("adapter"), 0.1)


def beside_the_model(folder: Path) -> None:
    """The tiny model, and the adapter on it."""
    shutil.copytree(tiny(), folder / "model")
    shutil.copytree(tiny_adapter(), folder / "adapter")


def named(kind: str, *names: str) -> dict[str, str]:
    """Files of one kind."""
    return dict.fromkeys(names, kind)
