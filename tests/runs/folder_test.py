"""A run folder takes only empty folders and old runs, and removes only what runs write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from folora_q.errors import UserError
from folora_q.runs.folder import RunFolder, open_run_folder


def finished_run(path: Path) -> RunFolder:
    folder = open_run_folder(path, overwrite=False)
    folder.write_manifest({"status": "complete"})
    folder.append_metrics({"step": 1})
    folder.append_metrics({"step": 2})
    folder.write_lines(folder.answers, [{"before": "é", "after": "\n"}])
    folder.adapter.mkdir()
    (folder.adapter / "weights").write_text("1")
    return folder


def test_every_line_is_json_in_the_order_of_writing(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "a" / "b")
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2]
    assert json.loads(folder.answers.read_text("utf-8")) == {"before": "é", "after": "\n"}
    assert json.loads(folder.manifest.read_text()) == {"status": "complete"}


def test_overwriting_removes_the_run_and_leaves_what_the_user_put_beside_it(tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds a run"):
        open_run_folder(tmp_path, overwrite=False)
    assert folder.adapter.exists()
    open_run_folder(tmp_path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_refused_and_hidden_ones_are_no_obstacle(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / ".gitkeep").touch()
    open_run_folder(tmp_path, overwrite)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match="holds files that are not a run"):
        open_run_folder(tmp_path, overwrite)
    assert (tmp_path / "adapter").exists()


def test_a_file_in_the_way_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot use"):
            open_run_folder(path, overwrite=False)


def test_what_a_killed_process_left_half_done_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    (tmp_path / ".checkpoint-8.abc").mkdir()
    (tmp_path / ".proxy.jsonl.l_gj_g7z").touch()
    (tmp_path / ".gitignore").touch()
    folder.discard_unfinished()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".gitignore",
        "answers.jsonl",
        "metrics.jsonl",
        "run.json",
    ]
