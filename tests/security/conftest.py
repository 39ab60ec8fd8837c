"""Where transformers copies the code that it runs: a folder of the test's, in place of the user's cache."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No code is copied to, or taken from, the user's cache."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture(scope="session")
def tiny_adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on the tiny model."""
    from tests.targets.folders import write_adapter

    return write_adapter(tiny_folder, tmp_path_factory.mktemp("adapter") / "adapter", std=0.05)
