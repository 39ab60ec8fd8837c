"""SIGKILL, at moments chosen by what is done to files and by what is finished; and a disk that fills up.

Whatever a kill leaves, `--resume` completes the same run. tests/campaigns/kills.py tries it a hundred times.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from folora_q.training.checkpoints import damage
from tests.export.models import save_adapter, sharded_llama
from tests.faults.commands import assert_the_same_run, at_step, manifest, run, steps_saved
from tests.faults.kills import (
    SAVING,
    assert_it_resumes,
    assert_merged_whole_or_not,
    assert_pages_whole_or_not,
    killed_after,
    killed_at,
    recorded,
    same_files,
    traced,
)
from tests.forked import forked, in_a_child

SEED = 7
# Stages of a run, and how many kills each gets; what comes after training, until the last file, is one.
SAMPLING, STATISTICS, TRAINING = "sampling text from the base model", "statistics of both texts", "training"
EVALUATION = [
    "comparing losses and predictions",
    "answering, as base and as tuned",
    "measuring how far each layer moved",
]
KILLS = [([SAMPLING], 1), ([STATISTICS], 1), ([TRAINING], 1), ([SAVING], 2), (EVALUATION, 1)]


def test_killed_at_any_moment_a_run_goes_on_to_the_same_end(
    demanding: list[object], straight: Path, tmp_path: Path, capfd
) -> None:
    folder, trace, chance = tmp_path / "stopped" / "run", tmp_path / "trace", random.Random(SEED)
    seen = recorded(["train", *demanding], trace)
    assert_the_same_run(straight, folder)
    for stages, kills in KILLS:
        numbers = [number for number, moment in enumerate(seen) if moment.stage in stages]
        assert len(numbers) >= 9, stages
        for number in chance.sample(numbers, kills):
            shutil.rmtree(folder)
            shutil.rmtree(tmp_path / "cache")
            killed_at(["train", *demanding], trace, number)
            capfd.readouterr()
            assert_it_resumes(demanding, folder, straight)
            if SAMPLING not in stages:
                assert "sampling text" not in capfd.readouterr().err, "what was finished is not done twice"


def test_a_killed_run_is_continued_by_a_fresh_process(saving: list[object], finished: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "stopped" / "run", tmp_path / "output.txt"
    killed = traced(["train", *saving], tmp_path / "trace")
    assert in_a_child(killed, kill=(folder / "checkpoint-2").exists) < 0
    assert manifest(folder)["status"] == "running" and 2 in steps_saved(folder)
    process = json.loads((folder / ".lock").read_text())["pid"]
    with forked(["train", *saving, "--resume"], output) as resumed:
        resumed.join(100)
    said = output.read_text("utf-8")
    assert resumed.exitcode == 0, said
    assert f"took over {folder} from process {process}: it is gone" in said
    assert f"resuming from checkpoint-{manifest(folder)['resumed'][0]['step']}" in said
    assert_the_same_run(finished, folder)


def test_a_killed_merge_leaves_nothing_or_the_whole_and_can_be_made_again(tmp_path: Path) -> None:
    base = sharded_llama(tmp_path)
    adapter = save_adapter(base, tmp_path / "adapter")
    target, trace, chance = tmp_path / "adapter-merged", tmp_path / "trace", random.Random(SEED)
    wholes = []
    for dtype in ("float32", "bfloat16"):
        recorded(["merge", adapter, "--dtype", dtype], trace)
        wholes.append(target.rename(tmp_path / dtype))
    # The old one takes the new one's place: at the end there are two, and one of them has its name.
    arguments = ["merge", adapter, "--dtype", "bfloat16", "--overwrite"]
    shutil.copytree(wholes[0], target)
    seen = recorded(arguments, trace)
    assert same_files(target, wholes[1])
    placed = range(len(seen) - 30, len(seen))
    for number in (*chance.sample(range(placed[0]), 2), *chance.sample(placed, 4)):
        shutil.rmtree(target)
        shutil.copytree(wholes[0], target)
        if number in placed:
            killed_at(arguments, trace, number)
        else:
            assert killed_after(arguments, trace, number, seconds=chance.uniform(0, 0.01))
        assert_merged_whole_or_not(target, wholes)
        assert in_a_child(traced(arguments, trace)) == 0
        assert same_files(target, wholes[1])


def test_a_report_that_is_killed_leaves_no_half_of_a_page(finished: Path, tmp_path: Path) -> None:
    whole, killed, trace = tmp_path / "whole", tmp_path / "killed", tmp_path / "trace"
    seen = recorded(["report", finished, "--output", whole / "page.html"], trace)
    arguments = ["report", finished, "--output", killed / "page.html"]
    killed_at(arguments, trace, random.Random(SEED).randrange(len(seen)))
    assert_pages_whole_or_not(killed, whole)
    assert in_a_child(traced(arguments, trace)) == 0 and same_files(killed, whole)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="takes root, to mount a small disk")
def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(
    saving: list[object], finished: Path, tmp_path: Path, capfd
) -> None:
    disk = tmp_path / "stopped"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    folder, ballast = disk / "run", disk / "ballast"
    try:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 3, lambda: ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 60_000))))
            assert run(*saving) == 1
        assert "cannot save " in (talk := capfd.readouterr().err) and "checkpoint-4" in talk
        assert steps_saved(folder) == [2] and damage(folder / "checkpoint-2") is None
        assert not list(folder.glob(".checkpoint-*"))
        ballast.unlink()
        assert run(*saving, "--resume") == 0
        assert_the_same_run(finished, folder)
    finally:
        subprocess.run(["umount", disk], check=False)


def test_a_file_that_may_not_grow_ends_the_save_and_not_what_was_saved(
    saving: list[object], finished: Path, tmp_path: Path, capfd
) -> None:
    """A quota, which a limit on the size of files stands for: it takes no root."""
    folder, limits = tmp_path / "stopped" / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    half = (finished / "checkpoint-2" / "optimizer.pt").stat().st_size // 2
    try:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, limits[1])))
            assert run(*saving) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot save " in (talk := capfd.readouterr().err) and "checkpoint-4" in talk
    assert steps_saved(folder) == [2] and not list(folder.glob(".checkpoint-*"))
    assert run(*saving, "--resume") == 0
    assert_the_same_run(finished, folder)


def test_where_the_recipe_says_so_training_goes_on_without_the_checkpoint(
    saving: list[object], finished: Path, tmp_path: Path, capfd
) -> None:
    folder, limits = tmp_path / "stopped" / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    half = (finished / "checkpoint-2" / "optimizer.pt").stat().st_size // 2
    try:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, limits[1])))
            at_step(patch, 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
            assert run(*saving, "training.on_save_error=continue") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    talk = " ".join(capfd.readouterr().err.split())
    assert "checkpoint-4: " in talk and "training continues without it (training.on_save_error)" in talk
    assert steps_saved(folder) == [2, 6] and damage(folder / "checkpoint-6") is None
    assert not list(folder.glob(".checkpoint-*"))
    assert_the_same_run(finished, folder)
