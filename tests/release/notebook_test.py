"""The notebook's cells work: all but the installation run here, on a CPU, with a tiny model and few steps."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from folora_q.cli.app import main
from folora_q.evaluation.loss import GENERAL_TEXTS

ROOT = Path(__file__).parents[2]
CELLS: list[dict[str, Any]] = json.loads((ROOT / "notebooks" / "first_run.ipynb").read_text("utf-8"))["cells"]
CHANGES = (
    "model.dtype=float32 adapter.r=4 adapter.lora_alpha=4 data.max_train_samples=12 data.max_eval_samples=4 "
    "proxy.num_samples=4 proxy.num_heldout_samples=2 proxy.max_new_tokens=24 proxy.public_share=0 gate.rank=8 "
    "gate.num_task_samples=6 training.max_steps=8 training.learning_rate=1e-2 training.max_length=512 "
    "evaluation.steps=null evaluation.max_new_tokens=8 evaluation.general_text=prose.txt"
)
VARIABLE = re.compile(r"\{(\w+)\}")


def code(tag: str | None = None) -> list[str]:
    """The sources of the code cells, or of those with a tag."""
    cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in cells if tag is None or tag in cell["metadata"].get("tags", [])]


def parts(source: str) -> Iterator[str]:
    """A cell's shell lines, each alone, and the Python between them."""
    for is_shell, lines in groupby(source.splitlines(keepends=True), lambda line: line.startswith("!")):
        block = list(lines)
        yield from block if is_shell else ["".join(block)]


def shell(line: str, variables: dict[str, Any]) -> int:
    """Run a shell line with IPython's {variables}; `folora-q` in this process, which has imported what it needs."""
    command = VARIABLE.sub(lambda match: str(variables[match[1]]), line.removeprefix("!").strip())
    words = shlex.split(command)
    if words[0] != "folora-q":
        return subprocess.run(command, shell=True).returncode
    with pytest.raises(SystemExit) as caught:
        main(words[1:])
    return int(caught.value.code or 0)


def run_python(source: str, variables: dict[str, Any]) -> list[str]:
    """Run Python as IPython would, and return what it displayed."""
    shown: list[str] = []
    module = ModuleType("IPython.display")
    vars(module).update(HTML=str, display=shown.append)
    with pytest.MonkeyPatch.context() as patch:  # only here, since matplotlib asks whether it is in IPython
        patch.setitem(sys.modules, "IPython", ModuleType("IPython"))
        patch.setitem(sys.modules, "IPython.display", module)
        exec(source, variables)
    return shown


def test_the_cells_run_in_order(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prose.txt").write_text(GENERAL_TEXTS["prose"].read_text("utf-8")[:2000], encoding="utf-8")
    (install,), (parameters,) = code("install"), code("parameters")
    variables: dict[str, Any] = {}
    shown: list[str] = []
    for source in code():
        if source == install:
            continue
        for part in parts(source):
            if part.startswith("!"):
                assert shell(part, variables) == 0, capfd.readouterr().err
            else:
                shown += run_python(part, variables)
        if source == parameters:
            variables["changes"] = f"model.model_name_or_path={tiny_folder} {CHANGES}"
    said = capfd.readouterr().out
    assert "What was learned, what was forgotten" in said and "Is it the adapter?" in said
    assert (tmp_path / "runs" / "demo" / "merged" / "config.json").is_file()
    (page,) = shown
    assert page.startswith("<iframe") and "&lt;!doctype html&gt;" in page.lower()


def test_the_installation_is_that_of_the_docs() -> None:
    (install,) = code("install")
    clone, pip = install.splitlines()
    page = (ROOT / "docs" / "install.md").read_text("utf-8")
    assert clone.removeprefix("!").replace("--quiet ", "") in page
    assert pip == "!pip install --quiet -c folora-q/constraints.txt ./folora-q"


def test_it_is_saved_without_results_and_its_python_is_valid() -> None:
    for cell in CELLS:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    for source in code():
        for part in parts(source):
            assert part.startswith("!") or ast.parse(part)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
