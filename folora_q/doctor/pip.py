"""Commands that install into the running environment."""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

# Modules whose package has another name.
DISTRIBUTIONS = {"yaml": "pyyaml", "google": "protobuf", "PIL": "pillow", "sklearn": "scikit-learn"}


def pip_install(*arguments: str) -> str:
    """Return the command `python -m pip install ...`, or uv's if the environment has no pip."""
    words = (
        [_interpreter(), "-m", "pip", "install"]
        if find_spec("pip")
        else ["uv", "pip", "install", "--python", _interpreter()]
    )
    return " ".join(map(quoted, [*words, *arguments]))


def install_missing(error: BaseException) -> str | None:
    """Return the command that installs the module that an import did not find; None for other errors."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    module = error.name.split(".")[0]
    # If the package is installed and only a submodule is missing, the version is wrong.
    return None if find_spec(module) else pip_install(DISTRIBUTIONS.get(module, module))


def quoted(word: str) -> str:
    """Put double quotes, for Unix shells and Windows, around a word that a shell would interpret."""
    return f'"{word}"' if re.search(r"[\s<>=,;*\[\]()&|]", word) else word


def _interpreter() -> str:
    """Return the shortest name of this Python that is valid in the working directory."""
    if (on_path := shutil.which("python")) and os.path.abspath(on_path) == os.path.abspath(sys.executable):
        return "python"
    executable = Path(sys.executable)
    return str(executable.relative_to(Path.cwd())) if executable.is_relative_to(Path.cwd()) else str(executable)
