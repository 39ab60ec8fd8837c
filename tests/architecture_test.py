"""The rooms and the arrows between them, as the design lays them out."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import folora_q

HOUSE = Path(folora_q.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))
# A room may import rooms of earlier tiers and itself, never a sibling.
TIERS = [
    {"block_sizes", "errors", "progress", "storage", "folora_q"},
    {"core", "distributed", "recipe"},
    {"models", "data", "runs", "memory"},
    {"calibration", "evaluation", "kernels", "preflight", "rules"},
    {"training", "export", "report"},
    {"targets", "trimming"},
    {"workflows", "chat", "doctor"},
    {"cli"},
    {"__main__"},
]
TIER_OF = {room: number for number, rooms in enumerate(TIERS) for room in rooms}


def room_of(path: Path) -> str:
    first = path.relative_to(HOUSE).parts[0].removesuffix(".py")
    return "folora_q" if first == "__init__" else first


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_imports_go_down_the_tiers(path: Path) -> None:
    room = room_of(path)
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "folora_q":
            continue
        other = parts[1] if len(parts) > 1 else "folora_q"
        assert other == room or TIER_OF[other] < TIER_OF[room], f"{room} must not import {other}"


def test_core_needs_torch_alone() -> None:
    for path in (HOUSE / "core").glob("*.py"):
        outside = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "folora_q"}, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_only_the_cli_prints_or_exits_and_only_files_renames(path: Path) -> None:
    calls = {
        ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)
    }
    if room_of(path) != "cli":
        assert not calls & {"print", "sys.exit", "exit", "quit", "os._exit"}
    if room_of(path) != "storage":
        assert not calls & {"os.replace", "os.rename", "shutil.move"}


@pytest.mark.parametrize(
    "statement",
    [
        "import folora_q",
        "import folora_q.errors, folora_q.storage.files",
        "import folora_q.distributed.launch",
        "import folora_q.recipe",
        "import folora_q.cli.app",
        "import folora_q.cli.train",
        "import folora_q.cli.report, folora_q.cli.compare",
        "from folora_q.cli.app import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from folora_q.cli.app import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass",
        *(
            f"from folora_q.cli.app import main\ntry: main({arguments})\nexcept SystemExit as end: assert not end.code"
            for arguments in (
                ["train", "recipes/demo.yaml", "--dry-run"],
                ["validate", "recipes/demo.yaml", "--all-rows"],
                ["preview", "--help"],
                ["recipes"],
                ["estimate", "recipes/demo.yaml", "--gpu", "8"],
                ["inspect", "--help"],
                ["schema"],
            )
        ),
    ],
)
def test_no_heavy_import_before_it_is_needed(statement: str) -> None:
    heavy = "torch transformers peft trl bitsandbytes accelerate datasets numpy matplotlib"
    code = f"{statement}\nimport sys\nfound = set('{heavy}'.split()) & set(sys.modules)\nassert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HOUSE.parent)
    assert done.returncode == 0, done.stderr


def test_git_ignores_no_source_file() -> None:
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--", "*.py", "*.yaml", "*.jsonl"]
    done = subprocess.run(
        [*command, ":!.venv", ":!runs", ":!site"], capture_output=True, text=True, cwd=HOUSE.parent, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    assert done.stdout == ""
