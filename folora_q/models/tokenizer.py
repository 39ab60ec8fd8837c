"""Locate a model, check that it may be loaded, and load its tokenizer. Needs no bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import cached_file

from folora_q.errors import UserError, first_line
from folora_q.models.demo import DEMO_MODEL, demo_model_folder
from folora_q.models.gguf import MALFORMED, convert_gguf
from folora_q.models.trust import CONFIG, HEADS, NOTHING, Trust, check_model, code_needed, pickled_weights
from folora_q.recipe.hub import hub_problem
from folora_q.recipe.schema import ModelSection

# Arguments of `cached_file` for files that a model need not have.
IF_THERE = {
    f"_raise_exceptions_for_{reason}": False for reason in ("missing_entries", "connection_errors", "gated_repo")
}


def load_tokenizer(section: ModelSection, chat_template: str | None = None, trust: Trust = NOTHING) -> Tokenizer:
    """Load a model's tokenizer, without the model.

    Args:
        chat_template: Jinja text that replaces the tokenizer's own template.

    Raises:
        UserError: there is no such model, it has no tokenizer, or its tokenizer is code that is not trusted.
        RunError: the demo's model could not be downloaded.
    """
    with loading(section):
        tokenizer = AutoTokenizer.from_pretrained(
            local_or_hub(section.model_name_or_path),
            revision=section.revision,
            trust_remote_code=trust.remote_code,  # unset, transformers asks on the terminal
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


@contextmanager
def loading(section: ModelSection) -> Iterator[None]:
    """Convert errors of transformers about a model that is missing, invalid or not trusted into a UserError."""
    name = section.model_name_or_path
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"cannot load the model {name}: its safetensors are damaged or not safetensors ({first_line(error)})"
        ) from error
    except UnpicklingError as error:
        raise UserError(
            f"cannot load the model {name}: its weights are a pickle that contains more than tensors; it was not loaded"
        ) from error
    except (OSError, ValueError, ImportError) as error:
        reason = str(error)
        if "trust_remote_code=True" in reason:
            raise code_needed(name) from error
        if "cannot be loaded with `safetensors`" in reason:  # on a hub, whose files are not known in advance
            raise pickled_weights(name) from error
        problem = hub_problem(name, error) or (
            f"cannot load the model {name}: {first_line(error)}",
            "give a hub id, a local folder with config.json, or a .gguf file",
        )
        raise UserError(*problem) from error
    except MALFORMED as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _malformed(name, error) from error
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises a plain Exception for an invalid tokenizer.json
            raise
        raise _malformed(name, error) from error


def _malformed(name: str, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {first_line(error)}".removeprefix("Exception: ")
    return UserError(
        f"cannot load the model {name}: transformers cannot build a model from its files ({reason})",
        "is it damaged, or for another version of transformers? --debug shows where it failed",
    )


def safe_source(section: ModelSection, trust: Trust) -> tuple[str, str | None]:
    """Return what transformers should load after checking it: a folder, or a hub id with its commit.

    Raises:
        UserError: there is no such model, or `trust` does not allow what loading it would do.
        RunError: the demo's model could not be downloaded.
    """
    with loading(section):
        source = local_or_hub(section.model_name_or_path)
        if Path(source).is_dir():
            check_model(Path(source), trust)
            return source, section.revision
        config = cached_file(source, CONFIG, revision=section.revision)
        assert config is not None, "cached_file raises where a file is missing"
        found = Path(config)
        # The checked commit and the loaded one must be the same; the cache names its folders after commits.
        commit = found.parent.name if found.parent.parent.name == "snapshots" else section.revision
        for name in HEADS:
            cached_file(source, name, revision=commit, **IF_THERE)
    check_model(found.parent, trust)
    return source, commit


def local_or_hub(name: str) -> str:
    """Return what transformers loads: a folder (GGUF files and the demo's model are converted) or a hub id."""
    if name == DEMO_MODEL:
        return str(demo_model_folder())
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"`model.model_name_or_path`: no file at {path}")
        return str(convert_gguf(path))
    return name
