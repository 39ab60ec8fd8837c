"""Write a GGUF file of a k-quant with llama.cpp's llama-quantize, and check it tensor by tensor."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from folora_q.errors import RunError, UserError
from folora_q.export.gguf import require_room, require_written, run_program, write_gguf
from folora_q.export.gguf_check import GgufFacts
from folora_q.export.gguf_quantized import check_quantized
from folora_q.export.gguf_types import CONVERTED, K_QUANTS
from folora_q.models.weight_files import open_checkpoint
from folora_q.storage.files import commit_file

PROGRAM = "llama-quantize"
INSTALL = (
    "install llama.cpp, which has it (`brew install llama.cpp`, or build the target llama-quantize of "
    "https://github.com/ggml-org/llama.cpp with cmake), and put it on PATH or name it with --llama-quantize or "
    "$LLAMA_QUANTIZE; --gguf q8_0 and f16 do not need it"
)
# The type of the file that llama-quantize reads, by the dtype of the merged weights.
SOURCE_TYPES = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


@dataclass(frozen=True)
class GgufTools:
    """Programs of llama.cpp.

    Attributes:
        converter: the result of `find_converter`.
        quantizer: path of llama-quantize, for a type of K_QUANTS.
    """

    converter: list[str]
    quantizer: Path | None = None


def find_quantizer(named: Path | None) -> Path:
    """Find llama-quantize: `named`, $LLAMA_QUANTIZE, $LLAMA_CPP_DIR/build/bin, or on PATH.

    Raises:
        UserError: there is none; the hint says what to install.
    """
    if named is None and (variable := os.environ.get("LLAMA_QUANTIZE")):
        named = Path(variable)
    if named is not None:
        return _executable(named)
    if folder := os.environ.get("LLAMA_CPP_DIR"):
        built = Path(folder).expanduser() / "build" / "bin" / PROGRAM
        if built.is_file():
            return _executable(built)
    if found := shutil.which(PROGRAM):
        return Path(found)
    raise UserError(f"{PROGRAM} was not found on PATH, and LLAMA_QUANTIZE is not set", INSTALL)


def _executable(path: Path) -> Path:
    path = path.expanduser().absolute()
    path = path / PROGRAM if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"there is no {PROGRAM} at {path}", INSTALL)
    if not os.access(path, os.X_OK):
        raise UserError(f"{path} is not executable", f"name llama.cpp's {PROGRAM}, or make the file executable")
    return path


def write_k_quant(folder: Path, target: Path, kind: str, tools: GgufTools) -> GgufFacts:
    """Convert a model to 16 bits, quantize that file, and move the result to the target if every tensor is right.

    Args:
        folder: a Hugging Face model with safetensors.
        target: the file to create or replace.
        kind: one of K_QUANTS.

    Raises:
        UserError: target or folder is invalid, the disk is full, or a program is missing.
        RunError: a program failed, or its file is not the model; `target` is unchanged.
    """
    if kind not in K_QUANTS or tools.quantizer is None:
        raise UserError(f"{kind} is not a type that {PROGRAM} makes here", f"one of {', '.join(K_QUANTS)}")
    tensors = open_checkpoint(folder).tensors.values()
    dtypes = {stored.dtype for stored in tensors if stored.dtype in SOURCE_TYPES}
    outtype = SOURCE_TYPES[dtypes.pop()] if len(dtypes) == 1 else "f32"
    numel = sum(stored.numel for stored in tensors)
    require_room(target, numel * (CONVERTED[outtype] + K_QUANTS[kind]))
    source = target.with_name(f".{target.stem}-{outtype}.gguf")
    try:
        facts = write_gguf(folder, source, outtype, tools.converter)
        with commit_file(target) as staging:
            _quantize([str(tools.quantizer), str(source), str(staging), kind.upper()], folder)
            try:
                require_written(staging, PROGRAM)
                return check_quantized(staging, source, facts, target)
            except RunError as error:
                raise RunError(error.message, "the file was not kept; a newer llama.cpp may write it rightly") from None
    finally:
        source.unlink(missing_ok=True)


def _quantize(command: list[str], folder: Path) -> None:
    """Run llama-quantize on a file of the model in a folder."""
    by_hand = shlex.join([command[0], "16-BIT.gguf", "OUTPUT.gguf", command[-1]])
    run_program(command, PROGRAM, f"{by_hand} on a file of --gguf f16", folder, INSTALL)
