"""No message, help text or shipped recipe sends users to files of the repository, which an installed package lacks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import folora_q
from folora_q.recipe.shipped import shipped_recipes

HOUSE = Path(folora_q.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Folders and files of the repository; a full address is fine.
REPOSITORY = re.compile(
    r"(?<![\w/.-])(docs|recipes|tests|benchmarks)/\w|(?<![\w/.-])(CONTRIBUTING|CHANGELOG|Makefile|constraints\.txt)\b"
    r"|\bmake (setup|demo|test|check)\b"
)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Strings that users may see: all but docstrings, except those of commands, which are their help."""
    tree = ast.parse(path.read_text("utf-8"))
    inside: set[int] = set()
    for node in ast.walk(tree):
        is_command = isinstance(node, ast.FunctionDef) and path.parent.name == "cli" and node.decorator_list
        if isinstance(node, DOCUMENTED) and not is_command and node.body and isinstance(node.body[0], ast.Expr):
            inside.add(id(node.body[0].value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_messages_name_commands_and_addresses_instead_of_files(path: Path) -> None:
    assert [(line, text) for line, text in texts(path) if REPOSITORY.search(text)] == []


@pytest.mark.parametrize("recipe", shipped_recipes(), ids=lambda recipe: recipe.name)
def test_shipped_recipes_do_so_too(recipe) -> None:
    assert not REPOSITORY.search(recipe.path.read_text("utf-8"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("docs/recipe.md explains every key", True),
        ("see recipes/demo.yaml", True),
        ("run `make setup`", True),
        ("https://example.org/docs/recipe.md", False),
        ("`folora-q explain data.fields`", False),
        ("my-docs/a.md", False),
    ],
)
def test_the_pattern_finds_what_it_should(text: str, found: bool) -> None:
    assert bool(REPOSITORY.search(text)) == found
