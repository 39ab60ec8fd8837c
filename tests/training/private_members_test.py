"""The private members of other people's trainers that ours relies on exist in the installed versions."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from transformers import Trainer
from trl import SFTTrainer

from folora_q.training import fault_tolerant_trainer, resumable_trainer
from folora_q.training.fault_tolerant_trainer import FaultTolerantTrainer
from folora_q.training.resumable_trainer import OVERRIDDEN, RELIED_ON, ResumableTrainer


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_is_the_trainers(name: str) -> None:
    assert name in {**vars(FaultTolerantTrainer), **vars(ResumableTrainer)} and callable(getattr(Trainer, name))


@pytest.mark.parametrize("name", RELIED_ON)
def test_a_member_is_set_or_defined_there(name: str) -> None:
    sources = inspect.getsource(Trainer) + inspect.getsource(SFTTrainer)
    assert f"self.{name} = " in sources or f"self.{name}: " in sources or f"def {name}(" in sources


def test_no_other_private_member_is_used() -> None:
    files = [Path(module.__file__) for module in (fault_tolerant_trainer, resumable_trainer)]
    tree = ast.parse(
        "\n".join(file.read_text("utf-8").replace("from __future__ import annotations", "") for file in files)
    )
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
    }
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    assert private - own <= {*OVERRIDDEN, *RELIED_ON}
    assert {*RELIED_ON} <= private
