"""Models, adapters and pickles that run code where they are loaded carelessly: each leaves a file behind if it ran."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from folora_q.cli.app import main

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

with Path({mark!r}).open("a") as file:
    file.write("{what}\\n")

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineModel(LlamaForCausalLM):
    config_class = MineConfig

class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""


def run(*arguments: object) -> int:
    """`folora-q ...`, and its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def edit_json(path: Path, **values: Any) -> Path:
    """Change keys of a JSON file; None removes one."""
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    kept = {key: value for key, value in {**found, **values}.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")
    return path


def coded_model(tiny: Path, folder: Path, mark: Path) -> Path:
    """The tiny model under a type that transformers lacks, with the code for it, which notes in a file that it ran."""
    shutil.copytree(tiny, folder)
    mapped = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineModel"}
    edit_json(folder / "config.json", model_type="mine", auto_map=mapped)
    (folder / "mine.py").write_text(CODE.format(mark=str(mark), what="model"), encoding="utf-8")
    return folder


def coded_tokenizer(tiny: Path, folder: Path, mark: Path) -> Path:
    """The tiny model with a tokenizer of its own code."""
    shutil.copytree(tiny, folder)
    mapped = {"AutoTokenizer": [None, "words.MineTokenizer"]}
    edit_json(folder / "tokenizer_config.json", tokenizer_class="MineTokenizer", auto_map=mapped)
    (folder / "words.py").write_text(CODE.format(mark=str(mark), what="tokenizer"), encoding="utf-8")
    return folder


def pickled_model(tiny: Path, folder: Path, mark: Path | None = None, raw: bool = False) -> Path:
    """The tiny model with a pickle for its weights, which makes a folder if it is unpickled and `mark` is given.

    Args:
        raw: pickled by Python itself, without torch's archive around it.
    """
    shutil.copytree(tiny, folder)
    weights: Any = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if mark is not None:
        weights = Touch(mark) if raw else {**weights, "more": Touch(mark)}
    if raw:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(weights))
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    return folder


def pickled_adapter(adapter: Path, folder: Path, mark: Path | None = None) -> Path:
    """An adapter with a pickle for its weights, as PEFT wrote them once."""
    shutil.copytree(adapter, folder)
    weights: dict[str, Any] = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights if mark is None else {**weights, "more": Touch(mark)}, folder / "adapter_model.bin")
    return folder
