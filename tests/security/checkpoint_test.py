"""A checkpoint from somebody else, whose manifest agrees with it, runs no code when a run goes on from it."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from folora_q.training.checkpoints import damage, seal
from tests.conftest import write_recipe
from tests.faults.conftest import SAVING
from tests.security.hostile import Touch, edit_json, run


@pytest.fixture(scope="module")
def stopped(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe, whose run was interrupted after its second checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLORA_Q_CACHE", str(folder / "cache"))
        assert run("train", write_recipe(folder, tiny_folder), *SAVING) == 0
    shutil.rmtree(folder / "run" / "checkpoint-6")
    edit_json(folder / "run" / "run.json", status="interrupted")
    return folder


@pytest.fixture
def newest(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its newest checkpoint, in a copy of the run."""
    monkeypatch.setenv("FOLORA_Q_CACHE", str(stopped / "cache"))
    return Path(shutil.copytree(stopped / "run", tmp_path / "run")) / "checkpoint-4"


def resume(stopped: Path, newest: Path) -> int:
    return run("train", stopped / "recipe.yaml", *SAVING, "--resume", f"training.output_dir={newest.parent}")


def seal_again(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, 4)


def test_our_own_files_in_it_are_numbers_and_json(stopped: Path) -> None:
    kinds = {".safetensors", ".json", ".jinja", ".md"}
    pickles = {path.name for path in stopped.rglob("checkpoint-*/*") if path.suffix not in kinds}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for path in stopped.rglob("checkpoint-*/*.pt*"):
        torch.load(path, weights_only=path.name != "rng_state.pth")  # numpy's state is allowed by name there
    rest = [path for path in stopped.rglob("run/**/*") if path.is_file() and not path.parent.name.startswith("check")]
    assert not [path for path in rest if path.suffix not in {*kinds, ".jsonl", ".yaml"}]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("raw", [False, True], ids=["torch", "python"])
def test_a_pickle_that_runs_code_is_not_unpickled(
    name: str, raw: bool, stopped: Path, newest: Path, tmp_path: Path, capfd
) -> None:
    hostile = {"state": Touch(tmp_path / "ran"), "param_groups": []}
    if raw:
        (newest / name).write_bytes(pickle.dumps(hostile))
    else:
        torch.save(hostile, newest / name)
    seal_again(newest)
    assert damage(newest) is None, "its manifest agrees"
    assert resume(stopped, newest) == 1
    assert "checkpoint-4 holds more than tensors and numbers" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "other/adapter_model.bin"])
@pytest.mark.parametrize("sealed", [False, True])
def test_weights_that_have_no_place_in_it_are_not_looked_at(
    name: str, sealed: bool, stopped: Path, newest: Path, tmp_path: Path
) -> None:
    """The Trainer takes a whole model's, and every folder with an adapter in it, before the checkpoint's own."""
    (newest / name).parent.mkdir(exist_ok=True)
    torch.save(Touch(tmp_path / "ran"), newest / name)
    if sealed:
        seal_again(newest)
    assert damage(newest) in (
        f"it contains an unexpected file, {name.partition('/')[0]}",
        f"its manifest.json names {name!r}, which is not a file in its folder",
    )
    if sealed and "/" in name:
        assert resume(stopped, newest) == 0, "the one before is used"
        assert not (tmp_path / "ran").exists()


def test_a_manifest_names_files_of_its_own_folder(newest: Path) -> None:
    sealed = json.loads((newest / "manifest.json").read_text("utf-8"))["files"]
    for name in ("../../elsewhere", "/dev/zero", "a/b"):
        files = {**sealed, name: {"sha256": "0" * 64, "size": 0}}
        edit_json(newest / "manifest.json", files=files)
        assert damage(newest) == f"its manifest.json names {name!r}, which is not a file in its folder"
