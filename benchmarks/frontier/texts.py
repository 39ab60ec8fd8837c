"""Three kinds of text that no run trains on, all of this machine: prose, manual pages and code."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

from folora_q.evaluation.loss import GENERAL_TEXT

TEXT_SIZE = GENERAL_TEXT.stat().st_size


def real_texts(folder: Path) -> list[Path]:
    """Their files, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    manual, code = folder / "manual.txt", folder / "code.txt"
    manual.write_text("\n\n".join(topics[name] for name in sorted(topics))[:TEXT_SIZE], encoding="utf-8")
    code.write_text((inspect.getsource(ast) + inspect.getsource(textwrap))[:TEXT_SIZE], encoding="utf-8")
    prose = folder / "prose.txt"
    prose.write_bytes(GENERAL_TEXT.read_bytes())
    return [prose.absolute(), manual.absolute(), code.absolute()]
