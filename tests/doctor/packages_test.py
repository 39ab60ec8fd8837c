"""Versions, missing packages, and packages that do not load."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from folora_q.doctor import State, packages, pip, requirements
from folora_q.doctor.nvidia import Card, Driver
from folora_q.doctor.packages import check_other_packages, check_package, check_python


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "ask_driver", lambda: None)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What is installed, where a test says so; None is not there."""
    said: dict[str, str | None] = {}

    def version(name: str) -> str:
        found = said.get(name, "missing")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return importlib.metadata.version(name) if found == "missing" else found

    monkeypatch.setattr(packages, "version", version)
    return said


def uninstall(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(requirements, "requires", missing)
    monkeypatch.setattr(packages, "metadata", missing)


@pytest.mark.parametrize(
    ("name", "found", "needed"), [("trl", "2.0.1", ">=1.16,<2"), ("transformers", "5.16.9", ">=5.17,<6")]
)
def test_a_version_outside_the_range_is_a_failure(versions, name: str, found: str, needed: str) -> None:
    versions[name] = found
    (line,) = check_package(name)
    assert (line.state, line.fact) == (State.FAILURE, f"{found}, outside {needed}")
    assert line.fix.endswith(f'-m pip install "{name}{needed}"')


def test_a_nightly_build_counts_as_its_version(versions) -> None:
    versions["torch"] = "2.15.0.dev20261101+cu132"
    assert check_package("torch")[0].state is State.GOOD


def test_a_missing_package_is_a_failure_with_the_line_that_installs_it(versions) -> None:
    versions["peft"] = None
    (line,) = check_package("peft")
    assert (line.state, line.fact) == (State.FAILURE, "not installed")
    assert line.fix.endswith('-m pip install "peft>=0.19"')


def test_a_missing_torch_is_installed_for_the_hardware(versions, monkeypatch: pytest.MonkeyPatch) -> None:
    versions["torch"] = None
    assert check_package("torch")[0].fix.endswith('"torch>=2.11" --index-url https://download.pytorch.org/whl/cpu')
    monkeypatch.setattr(packages, "ask_driver", lambda: Driver((Card("RTX 4090", "580.65.06", 8.9),)))
    assert check_package("torch")[0].fix.endswith("/whl/cu130")


@pytest.mark.parametrize(
    ("error", "fact", "fix"),
    [
        (ImportError("undefined symbol: x\nsecond line"), "undefined symbol: x", '--no-deps "trl>=1.16,<2"'),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "No module named 'torch'", "fix torch first"),
        (ModuleNotFoundError("No module named 'yaml'", name="yaml_"), "No module named 'yaml'", "pip install yaml_"),
        (ModuleNotFoundError("No module named 'trl.x'", name="trl.x"), "No module named 'trl.x'", '"trl>=1.16,<2"'),
        (OSError("libcudart.so.13: cannot open"), "libcudart.so.13: cannot open", '--no-deps "trl>=1.16,<2"'),
    ],
)
def test_a_package_that_does_not_load_says_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception, fact: str, fix: str
) -> None:
    def load(name: str) -> None:
        raise RuntimeError("a lazy module's sentence") from error

    monkeypatch.setattr(packages, "import_module", load)
    (line,) = check_package("trl")
    assert line.state is State.FAILURE
    assert line.fact.endswith(f" does not load: {fact}")
    assert line.fix.endswith(fix)


def test_every_other_requirement_is_looked_at(versions) -> None:
    (line,) = check_other_packages()
    assert line.state is State.GOOD
    versions.update(pyyaml=None, numpy="1.26.4")
    lines = {line.name: line for line in check_other_packages()}
    assert {name: line.fact for name, line in lines.items()} == {
        "pyyaml": "not installed",
        "numpy": "1.26.4, outside >=2.0",
    }
    assert all(line.state is State.FAILURE for line in lines.values())


def test_an_old_python_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [line.state for line in check_python()] == [State.GOOD]
    monkeypatch.setattr("platform.python_version", lambda: "3.10.14")
    (line,) = check_python()
    assert (line.state, line.fact) == (State.FAILURE, "3.10.14, outside >=3.11")
    assert "venv" in line.fix


def test_a_checkout_that_is_not_installed_is_no_failure(versions, monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch)
    (line,) = check_python()
    assert line.state is State.WARNING and line.fix.endswith("pip install -e .")
    assert check_other_packages() == []
    versions["torch"] = "2.13.0"
    (line,) = check_package("torch")
    assert (line.state, line.fact) == (State.GOOD, "2.13.0")


def test_an_environment_of_uv_has_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pip, packages):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert [line.state for line in check_python()] == [State.GOOD, State.WARNING]
    assert pip.pip_install("x>=1").startswith("uv pip install --python ")


def test_the_python_of_the_command_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert pip.pip_install("x") == ".venv/bin/python -m pip install x"
    monkeypatch.setattr(sys, "executable", "/opt/my env/bin/python")
    assert pip.pip_install("x<2") == '"/opt/my env/bin/python" -m pip install "x<2"'
    monkeypatch.setattr("shutil.which", lambda name: sys.executable)
    assert pip.pip_install("x") == "python -m pip install x"
