"""Where a model is, and its tokenizer, which is loaded without it. Needs no bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.errors import UserError, first_line
from folora_q.models.demo import DEMO_MODEL, demo_model_folder
from folora_q.models.gguf import convert_gguf
from folora_q.recipe.schema import ModelSection


def load_tokenizer(section: ModelSection, chat_template: str | None = None) -> Tokenizer:
    """The model's tokenizer, without the model.

    Args:
        chat_template: Jinja that takes the place of its own.

    Raises:
        UserError: there is no such model, or it has no tokenizer.
        RunFailed: the demo's model could not be fetched.
    """
    with loading(section):
        tokenizer = AutoTokenizer.from_pretrained(local_or_hub(section.model_name_or_path), revision=section.revision)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


@contextmanager
def loading(section: ModelSection) -> Iterator[None]:
    """Turn what transformers raises for a model that is not there into the user's mistake."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
        raise UserError(
            f"cannot load the model {section.model_name_or_path}: {reason}",
            "give a hub id, a local folder with config.json, or a .gguf file",
        ) from error


def local_or_hub(name: str) -> str:
    """What transformers loads: a folder, which a GGUF file and the demo's model are turned into, or a hub id."""
    if name == DEMO_MODEL:
        return str(demo_model_folder())
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"`model.model_name_or_path`: no file at {path}")
        return str(convert_gguf(path))
    return name
