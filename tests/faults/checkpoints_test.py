"""Which checkpoint is whole, and which are kept: on files alone."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from folora_q.training.checkpoints import (
    PROGRESS,
    RANDOM_STATES,
    REQUIRED,
    TRAINER_STATE,
    checkpoints,
    damage,
    discard_after,
    newest_whole,
    rotate,
    seal,
    step_of,
)

FILES = {*REQUIRED, RANDOM_STATES[0]}


def saved(run: Path, step: int, best: int | None = None) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(random.Random(f"{name}{step}").randbytes(200))
    (folder / TRAINER_STATE).write_text(json.dumps({"global_step": step, "best_global_step": best}))
    seal(folder, step)
    return folder


def test_a_sealed_checkpoint_is_whole(tmp_path: Path) -> None:
    assert damage(saved(tmp_path, 3)) is None


@pytest.mark.parametrize("seed", range(20))
def test_any_byte_that_is_flipped_or_lost_is_found(tmp_path: Path, seed: int) -> None:
    folder, chance = saved(tmp_path, 3), random.Random(seed)
    victim = folder / chance.choice(sorted(FILES))
    data = bytearray(victim.read_bytes())
    at = chance.randrange(len(data))
    if chance.random() < 0.5:
        data[at] ^= 1 << chance.randrange(8)
        reason = "SHA-256"
    else:
        del data[at:]
        reason = f"has {at:,} bytes, not "
    victim.write_bytes(data)
    assert damage(folder).startswith(victim.name) and reason in damage(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "never finished"),
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"step": 3}', "cannot be read"),
        ('{"step": 3, "files": {}}', "does not name adapter_model.safetensors"),
        ('{"step": 4, "files": {}}', "belongs to step 4"),
    ],
)
def test_a_manifest_that_says_nothing_is_no_manifest(tmp_path: Path, content: str | None, reason: str) -> None:
    folder = saved(tmp_path, 3)
    if content is None:
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text(content)
    assert reason in damage(folder)


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    folder = saved(tmp_path, 3)
    (folder / PROGRESS).unlink()
    assert damage(folder) == "progress.json cannot be read (No such file or directory)"


def test_the_order_is_that_of_steps_whatever_the_clock_says(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        os.utime(saved(tmp_path, step), (1e9 - step, 1e9 - step))
    (tmp_path / "checkpoint-last").mkdir()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [100, 10, 9]
    assert newest_whole(tmp_path, False, print).name == "checkpoint-100"


def test_the_newest_whole_one_needs_its_best_where_that_is_kept(tmp_path: Path) -> None:
    told: list[str] = []
    for step, best in ((2, 2), (4, 4), (6, 4)):
        saved(tmp_path, step, best)
    (tmp_path / "checkpoint-4" / PROGRESS).write_text("0")
    assert newest_whole(tmp_path, False, told.append).name == "checkpoint-6" and not told
    assert newest_whole(tmp_path, True, told.append).name == "checkpoint-2"
    assert told[0].startswith(
        "checkpoint-6 is not used: the best checkpoint before it, checkpoint-4, is incomplete: progress"
    )
    assert told[1].startswith("checkpoint-4 is not used: progress.json has 1 bytes")


@pytest.mark.parametrize(
    ("kept", "needed", "left"),
    [
        (1, [], [5]),
        (2, [], [4, 5]),
        (2, [1], [1, 5]),
        (1, [1], [1, 5]),
        (3, [2, 1], [1, 2, 5]),
        (9, [], [1, 2, 3, 4, 5]),
    ],
)
def test_rotation_spares_the_newest_and_the_needed(tmp_path: Path, kept: int, needed: list, left: list) -> None:
    for step in range(1, 6):
        saved(tmp_path, step)
    rotate(tmp_path, kept, [tmp_path / f"checkpoint-{step}" for step in needed])
    assert sorted(step_of(path) for path in checkpoints(tmp_path)) == left


def test_what_comes_after_the_step_gone_on_from_is_removed(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        saved(tmp_path, step)
    discard_after(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
