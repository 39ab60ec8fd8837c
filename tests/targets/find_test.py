"""What a name stands for, without loading it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from folora_q.errors import UserError
from folora_q.models.demo import DEMO_MODEL
from folora_q.recipe.schema import ModelSection
from folora_q.runs.folder import RunFolder
from folora_q.targets.find import find_target
from tests.targets.folders import write_adapter, write_merged, write_run


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tiny_folder, tmp_path_factory.mktemp("find") / "adapter")


@pytest.fixture
def run(tiny_folder: Path, adapter: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(write_run(tiny_folder, adapter, tmp_path / "run"))


def refuses(name: object, message: str) -> UserError:
    with pytest.raises(UserError, match=message) as caught:
        find_target(str(name))
    return caught.value


def test_a_run_is_its_adapter_on_the_recipes_base(run: RunFolder, tiny_folder: Path) -> None:
    found = find_target(str(run.path))
    assert (found.name, found.adapter, found.base, found.run) == (str(run.path), run.adapter, None, run)
    assert found.section == ModelSection(model_name_or_path=str(tiny_folder), dtype="float32"), "any attention will do"
    assert found.kind == f"adapter of a run on {tiny_folder}"
    run.recipe.unlink()
    found = find_target(str(run.path))
    assert (found.name, found.adapter, found.run) == (str(run.path), run.adapter, run)
    assert found.section.model_name_or_path == str(tiny_folder)


def test_what_lies_in_a_runs_folder_belongs_to_it(run: RunFolder, tiny_folder: Path, tmp_path, monkeypatch) -> None:
    merged = find_target(str(run.merged))
    assert (merged.adapter, merged.base) == (None, ModelSection(model_name_or_path=str(tiny_folder)))
    assert merged.kind == f"merged model, its base {tiny_folder}"
    checkpoint = run.path / "checkpoint-2"
    for folder in (run.adapter, checkpoint):
        assert find_target(str(folder)).adapter == folder
    (tmp_path / "link").symlink_to(run.adapter)
    for folder in (run.adapter, run.merged, checkpoint, tmp_path / "link"):
        assert find_target(str(folder)).run == run
    monkeypatch.chdir(run.adapter)
    assert find_target(".").run == run
    monkeypatch.chdir(tmp_path)
    assert find_target("run/merged/").run == RunFolder(Path("run")), "as it was named"

    other = run.adapter.rename(run.path / "other")
    assert find_target(str(other)).run is None
    run.manifest.unlink()
    assert find_target(str(run.merged)).run is None


def test_a_model_is_a_folder_or_a_hub_id(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.gguf").touch()
    for name in (str(tiny_folder), "there.gguf", "gpt2", "no/such-model", DEMO_MODEL):
        found = find_target(name)
        assert (found.name, found.kind, found.adapter, found.base, found.run) == (name, "model", None, None, None)
        assert found.section == ModelSection(model_name_or_path=name)
    other = find_target(str(write_merged(tiny_folder, tmp_path / "own-name", Path("a/base"))))
    assert other.base == ModelSection(model_name_or_path="a/base") and other.run is None


def test_an_adapter_is_put_on_a_base_that_is_held_as_in_training(adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["auto_mapping"] = {"quantization_config": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    section = find_target(str(folder)).section
    assert (section.bnb_4bit_quant_type, section.bnb_4bit_use_double_quant) == ("fp4", False)


def test_a_wrong_name_says_what_is_there(run: RunFolder, tmp_path: Path) -> None:
    refuses(run.path / "adaptr", f"there is no run, adapter or model at '.*'; did you mean {run.adapter}\\?")
    inside = refuses(
        tmp_path, "is not a run, adapter or model: it holds no run.json, adapter_config.json or config.json"
    )
    assert inside.hint == f"did you mean {run.path}?"
    refuses(run.manifest, "is a file, but not a .gguf file")
    for name in ("gone.gguf", "", "/" + "x" * 5000, "a\0b", "a b"):
        assert "name a run folder" in refuses(name, "there is no run, adapter or model at").hint


def test_what_says_nothing_of_use_is_not_taken(run: RunFolder, adapter: Path) -> None:
    recipe = run.recipe.read_text()
    for broken in ("model: [", "model: {}", "data: {}", "[]", ""):
        run.recipe.write_text(broken)
        error = refuses(run.path, "recipe.resolved.yaml cannot be read")
        assert error.hint == f"name the adapter itself: {run.adapter}"
    run.recipe.write_text(recipe)

    config = run.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    refuses(run.adapter, "adapter_config.json names no base model")
    config.write_text("{")
    refuses(run.adapter, "adapter_config.json cannot be read")
    config.unlink()
    run.manifest.write_text(json.dumps({"status": "interrupted"}))
    assert "checkpoint-2" in refuses(run.path, "has no adapter: it is marked as interrupted").hint

    (run.merged / "merge.json").write_text("[]")
    refuses(run.merged, "merge.json cannot be read: it holds no JSON object")
