"""Files around the package: the Dockerfile, the citation, templates, and addresses in the docs."""

from __future__ import annotations

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from folora_q import __version__

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
README, INSTALL = (ROOT / "README.md").read_text("utf-8"), (ROOT / "docs" / "install.md").read_text("utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
REPOSITORY = PROJECT["urls"]["Repository"]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, lines that are continued joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def test_every_address_of_the_repository_is_that_of_the_project() -> None:
    # As on a command line: tracked files and new ones.
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], capture_output=True, text=True, cwd=ROOT
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [ROOT / name for name in listed.stdout.splitlines()]
    files = [path for path in names if path.suffix in (".md", ".toml", ".yml", ".cff", ".ipynb") and path.is_file()]
    found = {
        address for path in files for address in re.findall(r"https://github\.com/[\w-]*/folora-q", path.read_text())
    }
    assert found == {REPOSITORY}


def test_the_dockerfile_copies_files_that_exist_and_are_in_its_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split()
    assert ignored[0] == "*"
    kept = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    copied = [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
    assert {"folora_q", "recipes"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists() and any(fnmatch(name, pattern) for pattern in kept), name
    # All that the build of the wheel reads.
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "constraints.txt"} <= set(copied)


def test_the_dockerfile_installs_as_the_readme_says() -> None:
    commands = [rest.replace("--no-cache-dir ", "") for word, rest in instructions() if word == "RUN"]
    installs = [command for command in commands if command.startswith("pip install")]
    assert installs[-1] == "pip install -c constraints.txt ."
    assert installs[-1] in README and installs[-1] in INSTALL
    assert all("-c constraints.txt" in command for command in installs)


def test_the_dockerfile_runs_without_root_and_keeps_the_hubs_cache() -> None:
    given = instructions()
    words = [word for word, _ in given]
    assert dict(given)["USER"] not in ("root", "0")
    assert words.index("USER") > max(place for place, word in enumerate(words) if word == "RUN")
    settings = " ".join(rest for word, rest in given if word == "ENV")
    home = re.search(r"HF_HOME=(\S+)", settings)
    assert home and Path(home[1]).is_relative_to(dict(given)["VOLUME"])
    assert f":{dict(given)['VOLUME']} " in INSTALL and f":{dict(given)['WORKDIR']} " in INSTALL
    assert dict(given)["ENTRYPOINT"] == '["folora-q"]'
    base = re.fullmatch(r"nvidia/cuda:(\d+)\.\d+\.\d+-base-ubuntu24\.04", dict(given)["FROM"])
    assert base and base[1] == "13"


def test_the_requirements_in_the_docs_are_those_of_doctor() -> None:
    from folora_q.doctor.nvidia import CUDA_12_DRIVER, CUDA_13_DRIVER, CUDA_13_FIRST

    assert f"{CUDA_13_DRIVER} or newer for PyTorch's builds for CUDA 13, {CUDA_12_DRIVER} for" in INSTALL
    assert f"| Turing (RTX 20, T4) | {CUDA_13_FIRST} | CUDA 13 or" in INSTALL
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"| Python | {oldest}," in INSTALL


def test_the_citation_is_that_of_this_version() -> None:
    assert CITATION["version"] == __version__ and CITATION["title"] == PROJECT["name"]
    assert CITATION["license"] == PROJECT["license"] and CITATION["repository-code"] == REPOSITORY
    assert [set(author) for author in CITATION["authors"]] == [{"name"}]
    (paper,) = CITATION["references"]
    assert paper["url"] == "https://arxiv.org/abs/2606.00132" and paper["url"] in README


def test_the_issue_form_asks_for_what_is_needed() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text("utf-8"))
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    required = {field["id"] for field in fields if field.get("validations", {}).get("required")}
    assert {"doctor", "recipe", "log"} <= required
    labels = {field["attributes"]["label"] for field in fields}
    assert "folora-q doctor --json" in labels and len(labels) == len(fields)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
