"""Commands that install into the running environment, and no other."""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

# Modules that are installed by another name.
DISTRIBUTIONS = {"yaml": "pyyaml", "google": "protobuf", "PIL": "pillow", "sklearn": "scikit-learn"}


def pip_install(*arguments: str) -> str:
    """A line to type: `python -m pip install ...`, or uv's where the environment was made without pip."""
    words = (
        [_interpreter(), "-m", "pip", "install"]
        if find_spec("pip")
        else ["uv", "pip", "install", "--python", _interpreter()]
    )
    return " ".join(map(quoted, [*words, *arguments]))


def install_missing(error: BaseException) -> str | None:
    """The line that installs the module that an import did not find; None if it found all and failed otherwise."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    module = error.name.split(".")[0]
    # A part that is missing of a package that is there is another version's.
    return None if find_spec(module) else pip_install(DISTRIBUTIONS.get(module, module))


def quoted(word: str) -> str:
    """Double quotes, which both a Unix shell and Windows take, around what a shell would read otherwise."""
    return f'"{word}"' if re.search(r"[\s<>=,;*\[\]()&|]", word) else word


def _interpreter() -> str:
    """The shortest name of this Python that is right where the command is typed."""
    if (on_path := shutil.which("python")) and os.path.abspath(on_path) == os.path.abspath(sys.executable):
        return "python"
    executable = Path(sys.executable)
    return str(executable.relative_to(Path.cwd())) if executable.is_relative_to(Path.cwd()) else str(executable)
