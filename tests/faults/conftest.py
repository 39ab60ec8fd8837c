"""What the tests with faults share; a run that nothing stops is made once, since it does not depend on where."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import write_recipe
from tests.faults.commands import run

# A run of a few seconds that saves every second step.
SAVING = [
    "evaluation.metric=none",
    "evaluation.num_answers=1",
    "gate.enabled=false",
    "training.max_steps=6",
    "training.save_steps=2",
    "training.save_total_limit=3",
    "logging.logging_steps=1",
]
# Accumulation, dropout, measurements between checkpoints, a refresh of B's gate between them, and the best is kept;
# text and statistics in several batches.
DEMANDING = [
    "proxy.batch_size=2",
    "gate.batch_size=2",
    "evaluation.metric=none",
    "evaluation.num_answers=1",
    "training.max_steps=7",
    "training.per_device_train_batch_size=2",
    "training.gradient_accumulation_steps=2",
    "adapter.lora_dropout=0.2",
    "gate.refresh_every=3",
    "evaluation.steps=2",
    "training.early_stopping_patience=3",
    "training.save_steps=2",
    "logging.logging_steps=3",
]


@pytest.fixture
def saving(recipe_file: Path, tmp_path: Path) -> list[object]:
    """What `folora-q train` is given; the run goes to tmp_path/stopped/run."""
    return [recipe_file, *SAVING, f"training.output_dir={tmp_path / 'stopped' / 'run'}"]


@pytest.fixture
def demanding(recipe_file: Path, tmp_path: Path) -> list[object]:
    """The same of the other run."""
    return [recipe_file, *DEMANDING, f"training.output_dir={tmp_path / 'stopped' / 'run'}"]


@pytest.fixture(scope="session")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`saving`, which nothing stopped."""
    return _finished(tiny_folder, tmp_path_factory.mktemp("finished"), SAVING)


@pytest.fixture(scope="session")
def straight(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`demanding`, which nothing stopped."""
    return _finished(tiny_folder, tmp_path_factory.mktemp("straight"), DEMANDING)


def _finished(model: Path, folder: Path, changes: list[str]) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLORA_Q_CACHE", str(folder / "cache"))
        assert run(write_recipe(folder, model), *changes) == 0
    return folder / "run"
