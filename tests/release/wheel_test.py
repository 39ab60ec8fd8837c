"""The wheel: built and installed without the network, it has all that a user needs, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

import pytest

import folora_q
from folora_q import __version__

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "folora_q"
# Files that are no part of the package.
IGNORED = {"__pycache__", ".DS_Store"}


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run([*command, "--disable-pip-version-check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--target", folder, wheel)
    return folder


def run(installed: Path, arguments: Sequence[object], folder: Path) -> str:
    """What a Python with the wheel and no other folora-q prints; dependencies are those of this environment."""
    environment = os.environ | {"PYTHONPATH": str(installed), "FOLORA_Q_CACHE": str(folder / "cache"), "COLUMNS": "200"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_has_every_file_of_the_package_and_the_recipes(wheel: Path) -> None:
    assert wheel.name == f"folora_q-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    source = {
        f"folora_q/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and not IGNORED & set(path.parts)
    }
    recipes = {
        f"folora_q/_recipes/{path.relative_to(ROOT / 'recipes').as_posix()}"
        for path in (ROOT / "recipes").rglob("*")
        if path.is_file() and not IGNORED & set(path.parts)
    }
    assert names == source | recipes
    needed = ("py.typed", "memory/shipped_models.json", "calibration/public.txt", "evaluation/general/prose.txt")
    needed += ("report/page.html.jinja", "data/chat_templates/chatml.jinja", "_recipes/demo/train.jsonl")
    assert {f"folora_q/{name}" for name in needed} <= names
    assert not [name for name in names if "test" in name.rsplit("/", 1)[-1].split("_")]


def test_its_metadata_are_those_of_the_project(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(file.read(name).decode())
        entry_points = file.read(name.replace("METADATA", "entry_points.txt")).decode()
        assert name.replace("METADATA", "licenses/LICENSE") in file.namelist()
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL", []))
    assert urls == project["urls"]
    assert metadata.get_all("Classifier") == project["classifiers"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    assert metadata["License-Expression"] == project["license"] == "Apache-2.0"
    assert "folora-q = folora_q.cli.app:main" in entry_points


def test_classifiers_name_the_versions_of_python_that_it_requires(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = [line.rsplit(" ", 1)[1] for line in project["classifiers"] if line.startswith("Programming Language")]
    assert project["requires-python"] == ">=" + min((v for v in named if "." in v), key=lambda v: int(v.split(".")[1]))


def test_it_works_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    found = run(installed, ["-c", "import folora_q; print(folora_q.__file__)"], tmp_path)
    assert Path(found.strip()).is_relative_to(installed)
    assert Path(folora_q.__file__).is_relative_to(ROOT)
    assert (installed / "bin" / "folora-q").is_file()
    assert "estimate" in run(installed, ["-m", "folora_q", "--help"], tmp_path)
    assert "7b-8gb-code" in run(installed, ["-m", "folora_q", "recipes"], tmp_path)
    run(installed, ["-m", "folora_q", "recipes", "copy", "7b-8gb-code"], tmp_path)
    said = run(installed, ["-m", "folora_q", "estimate", "7b-8gb-code.yaml", "--gpu", "8"], tmp_path)
    assert "mistralai/Mistral-7B-Instruct-v0.3: 7.25 billion parameters" in said
    assert "shipped numbers are used" in said and "fits, " in said
