"""The cache of Σp: a second task gives the same gates as without it, from fewer readings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from folora_q.calibration.collect import StatisticsSettings, build_gates
from folora_q.core import SpectralGate
from folora_q.data.tokens import batches, count_tokens
from folora_q.progress import StageTimer
from folora_q.recipe.gate import GateSection
from folora_q.storage.files import cache_folder
from tests.calibration.collect_test import CPU, model, sequences  # noqa: F401  (a fixture)
from tests.conftest import Silent

STAGE = "statistics of both texts"
SECTION = GateSection(rank=6, oversampling=2, ridge=0.05)
PROXY = list(batches(sequences(1), 4, CPU))


def gates_of(model, seed: int, progress: Silent, **settings) -> dict[str, SpectralGate]:  # noqa: F811
    task = list(batches(sequences(seed), 4, CPU))
    return build_gates(model, PROXY, task, StatisticsSettings(SECTION, **settings), StageTimer(progress))


def equal(one: dict[str, SpectralGate], other: dict[str, SpectralGate]) -> bool:
    assert one.keys() == other.keys() and one
    return all(torch.equal(one[name].basis, gate.basis) for name, gate in other.items())


@pytest.mark.parametrize("memory", [None, 1e-5])
def test_a_second_task_reads_the_text_to_preserve_once_less_and_gets_the_same_gates(model, memory) -> None:  # noqa: F811
    first, second, again = Silent(), Silent(), Silent()
    gates_of(model, 2, first, penalty_key="a base and a text", memory=memory)
    files = list((cache_folder() / "penalty").iterdir())
    assert len(files) == (1 if memory is None else 8), "one for each share of the layers"
    found = gates_of(model, 3, second, penalty_key="a base and a text", memory=memory)
    for file in files:
        file.unlink()
    assert equal(found, gates_of(model, 3, again, penalty_key="a base and a text", memory=memory))
    saved = again.stages[STAGE][0] - second.stages[STAGE][0]
    assert saved == count_tokens(PROXY) * len(files)
    for progress in (first, second, again):
        total, *done = progress.stages[STAGE]
        assert sum(done) == total
    assert any("read from" in note for note in second.notes) and not any("read from" in note for note in again.notes)


def test_another_base_text_or_setting_has_another_file(model) -> None:  # noqa: F811
    for key in ("one", "other"):
        gates_of(model, 2, Silent(), penalty_key=key)
    assert len(list((cache_folder() / "penalty").iterdir())) == 2
    progress = Silent()
    build_gates(model, PROXY, PROXY, StatisticsSettings(GateSection(rank=4), penalty_key="one"), StageTimer(progress))
    assert not progress.notes


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None])
def test_a_damaged_file_is_collected_again(model, damage: bytes | None) -> None:  # noqa: F811
    expected = gates_of(model, 2, Silent(), penalty_key="a")
    (file,) = (cache_folder() / "penalty").iterdir()
    file.write_bytes(damage if damage is not None else file.read_bytes()[:-100])
    assert equal(gates_of(model, 2, Silent(), penalty_key="a"), expected)
    assert equal(gates_of(model, 2, Silent(), penalty_key="a"), expected), "and written again"


def test_a_cache_that_cannot_be_written_costs_nothing_but_the_file(model, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("FOLORA_Q_CACHE", str(blocked))
    progress = Silent()
    assert gates_of(model, 2, progress, penalty_key="a")
    assert any("covariances could not be saved" in note for note in progress.notes)
