from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import folora_q
from folora_q.recipe import Recipe
from folora_q.runs import manifest


def test_a_checkout_that_is_not_installed_knows_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if name == "folora-q":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(manifest, "version", installed)
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    recipe = Recipe.model_validate(
        {"model": {"model_name_or_path": "m"}, "data": {"train_dataset": str(data)}, "training": {"output_dir": "o"}}
    )
    found = manifest.new_manifest(recipe, {str(data): data})
    assert found["versions"]["folora-q"] == folora_q.__version__
    assert found["versions"]["torch"] == version("torch")
    assert found["data_sha256"][str(data)] == hashlib.sha256(b"{}\n").hexdigest()
