"""Check what a model or adapter from elsewhere would do. By default it may only provide numbers.

Its JSON files are checked before a library follows them: they can name code to run, pickles to load and files outside
of their folder. Needs neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from folora_q.errors import UserError, first_line
from folora_q.models.patterns import check_patterns
from folora_q.storage.untrusted import MAX_JSON_BYTES, MIB, read_object

CODE_FLAG, PICKLE_FLAG = "--trust-remote-code", "--allow-pickle"
SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ENDING, INDEX_ENDING, PICKLE_ENDING = ".safetensors", ".safetensors.index.json", ".bin"
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
SAFE_ADAPTER, PICKLED_ADAPTER = "adapter_model.safetensors", "adapter_model.bin"
# Surrogates, which JSON can contain as escapes and file names cannot.
SURROGATES = re.compile("[\ud800-\udfff]")
# The files of a model that name others.
HEADS = (CONFIG, ADAPTER_CONFIG, SAFE_INDEX, PICKLES[1])
# Keys of config.json that may name compiled code on a hub, as owner/name, for transformers to run.
KERNELS = ("attn_implementation", "experts_implementation")
# PEFT's settings that name a module to import, or another model, adapter or file to load.
ELSEWHERE = ("megatron_config", "shadow_model", "adapters", "prompt_tuning_init_state_dict_path")
# The index of a model with a hundred thousand weights takes 10 MiB.
MAX_INDEX_BYTES = 32 * MIB
CONVERT = f"convert them to safetensors, or, if you trust who made them, add {PICKLE_FLAG}"


@dataclass(frozen=True)
class Trust:
    """What the user allowed on the command line; a recipe or a downloaded file cannot allow anything.

    Attributes:
        remote_code: run Python code that comes with a model.
        pickle: load weights that are pickles, with torch's loader for tensors only (`weights_only`).
    """

    remote_code: bool = False
    pickle: bool = False

    def flags(self) -> list[str]:
        """Return the command-line options for this trust."""
        return [CODE_FLAG] * self.remote_code + [PICKLE_FLAG] * self.pickle


NOTHING = Trust()


def check_model(folder: Path, trust: Trust) -> None:
    """Check a model's folder, or the downloaded files of a hub model, before it is loaded.

    Raises:
        UserError: loading would run code, load a pickle or read a file outside of the folder, and `trust` does not
            allow it; or there is also an adapter, which transformers would put on the model.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder} holds a model and an adapter on it ({ADAPTER_CONFIG})",
            "merge them, or move the adapter's files to a folder of their own and name the one that you mean",
        )
    config = _read(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if not trust.remote_code and (kernel := next(_kernels(config), None)) is not None:
        raise UserError(
            f"{folder / CONFIG} asks for compiled code from a hub: {kernel[:200]}",
            f"remove it, or, if you trust that code, add {CODE_FLAG}",
        )
    weights = config.get("transformers_weights")
    if weights is not None:
        if not (is_inside(str(weights)) and str(weights).endswith((ENDING, INDEX_ENDING))):
            raise UserError(
                f"{folder / CONFIG} names weights that are not safetensors in the same folder: {str(weights)[:200]!r}"
            )
        if str(weights).endswith(INDEX_ENDING) and (folder / str(weights)).is_file():
            shards_of(folder / str(weights))
    check_weights(folder, trust)


def check_weights(folder: Path, trust: Trust) -> None:
    """Check the names of a model's weight files.

    Raises:
        UserError: they are pickles that `trust` does not allow, or an index names a file outside of the folder.
    """
    if (folder / SAFE_INDEX).is_file():
        shards_of(folder / SAFE_INDEX)
    if (folder / SAFE_INDEX).is_file() or (folder / SAFE).is_file():
        return
    pickled = next((name for name in PICKLES if (folder / name).is_file()), None)
    if pickled is not None and not trust.pickle:
        raise pickled_weights(folder / pickled)
    if pickled == PICKLES[1]:
        shards_of(folder / pickled, PICKLE_ENDING)


def check_adapter(folder: Path, trust: Trust) -> None:
    """Check an adapter's folder.

    Raises:
        UserError: loading it would import or load something from elsewhere, or a pickle that `trust` does not allow, or
            could take forever.
    """
    config = _read(folder / ADAPTER_CONFIG)
    check_patterns(folder / ADAPTER_CONFIG, config)
    for key in ELSEWHERE:
        if config.get(key):
            raise UserError(
                f"{folder / ADAPTER_CONFIG} sets {key}, which names code or files other than the adapter's own",
                "folora-q loads only what is in an adapter's folder",
            )
    pickled = folder / PICKLED_ADAPTER
    if not trust.pickle and pickled.is_file() and not (folder / SAFE_ADAPTER).is_file():
        raise pickled_weights(pickled)


def shards_of(index: Path, ending: str = ENDING) -> dict[str, str]:
    """Return the shard of each weight from an index file; all shards are files in its own folder.

    Raises:
        UserError: it cannot be read, or names anything else.
    """
    found = _read(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(found, dict):
        raise UserError(f"{index} cannot be read: it holds no weight_map")
    for shard in dict.fromkeys(map(str, found.values())):
        if not is_inside(shard) or not shard.endswith(ending):
            raise UserError(
                f"{index} names {shard[:200]!r} as a shard, which is not a {ending} file in its folder",
                "download the model again from a source that you trust",
            )
    return {str(weight): str(shard) for weight, shard in found.items()}


def is_inside(name: str) -> bool:
    """Return whether a file name stays within its folder, on any system."""
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.drive or path.root or ".." in path.parts:
            return False
    return bool(name) and "\0" not in name and not SURROGATES.search(name)


def pickled_weights(path: Path | str) -> UserError:
    """Return the error for weights that are pickles and are not allowed."""
    return UserError(f"the weights are a pickle, which can hold code: {path}", CONVERT)


def code_needed(name: str) -> UserError:
    """Return the error for a model that needs its own code, which is not allowed."""
    return UserError(
        f"{name} can only be loaded by running Python code that comes with it",
        f"read that code; if you trust it, add {CODE_FLAG} to the command. A recipe alone cannot run code",
    )


def names_code(folder: Path) -> bool:
    """Return whether a model's folder names Python code, which a loader that trusts it would run."""
    names = (CONFIG, "tokenizer_config.json")
    return any(_read(folder / name).get("auto_map") for name in names if (folder / name).is_file())


def _kernels(config: Any) -> Iterator[str]:
    """Yield names of compiled code on a hub, anywhere in a configuration."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if str(key).removeprefix("_").removesuffix("_internal") in KERNELS:
            yield from (name for name in _strings(value) if "/" in name)
        else:
            yield from _kernels(value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else ():
        yield from _strings(inner)


def _read(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    try:
        return read_object(path, most)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
