"""Every name that a benchmark or a campaign imports exists: most are run by hand, long after a name has changed."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("benchmarks", "tests/campaigns") for path in (ROOT / folder).rglob("*.py"))
OURS = ("folora_q", "tests.", "benchmarks.")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_imported_name_exists(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OURS):
            module = import_module(node.module)
            missing = [name.name for name in node.names if not _has(module, node.module, name.name)]
            assert not missing, f"{node.module} has no {', '.join(missing)}"


def _has(module: object, path: str, name: str) -> bool:
    if hasattr(module, name):
        return True
    try:  # a module of a package
        import_module(f"{path}.{name}")
    except ModuleNotFoundError:
        return False
    return True
