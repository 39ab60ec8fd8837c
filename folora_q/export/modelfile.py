"""Write a Modelfile, from which `ollama create` makes a model of a GGUF file.

The grammar is that of Ollama's parser (parser/parser.go): an instruction per line, values in quotes or triple quotes
without escapes, and comments in lines that begin with #.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q import __version__
from folora_q.errors import UserError
from folora_q.export.go_template import THINKING, TOOLS, UnsupportedTemplateError, derive_go_template
from folora_q.models.trust import Trust
from folora_q.storage.files import atomic_write

NAME = "Modelfile"
FIRST_LINE = "# Written by folora-q"
# Sampling settings of generation_config.json, and Ollama's names for them.
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile that was written.

    Attributes:
        template: whether it has a TEMPLATE, which then renders the same text as the model's chat template.
        kept: a Modelfile that someone else had written, and that was not replaced.
    """

    path: Path
    template: bool
    kept: Path | None = None


def write_modelfile(folder: Path, file: Path, trust: Trust) -> Modelfile:
    """Write a Modelfile next to a GGUF file.

    It is called Modelfile, or, if there is one that folora-q did not write, like the GGUF file with .Modelfile.

    Args:
        folder: the Hugging Face model that the file was made from.
        file: the GGUF file.

    Raises:
        UserError: generation_config.json is not valid.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.remote_code)
    path, kept = file.with_name(NAME), None
    if path.exists() and not path.read_text("utf-8", errors="replace").startswith(FIRST_LINE):
        path, kept = file.with_name(f"{file.stem}.{NAME}"), path
    template, has_template = _template(tokenizer, _adds_bos(file))
    config = _generation_config(folder)
    lines = [
        f"{FIRST_LINE} {__version__}. Make and run the model in Ollama with",
        f"#   ollama create my-model -f {path.name}",
        "#   ollama run my-model",
        f"FROM ./{file.name}",
        "",
        *template,
        "",
        "# The tokens that end an answer.",
        *(f'PARAMETER stop "{text}"' for text in _stop_texts(tokenizer, config)),
        "",
        *_sampling(config),
    ]
    atomic_write(path, "\n".join(lines) + "\n")
    return Modelfile(path, has_template, kept)


def _template(tokenizer: Tokenizer, adds_bos: bool | None) -> tuple[list[str], bool]:
    try:
        found = derive_go_template(tokenizer, adds_bos)
    except UnsupportedTemplateError as reason:
        return [
            f"# There is no TEMPLATE here, since the model's chat template {reason}.",
            "# Ollama then uses one of its own templates if it resembles that of the GGUF file. Otherwise recent",
            "# versions run the file's, and older ones add nothing to a prompt: see `ollama show --template`.",
        ], False
    limits = [f"# It lacks of the model's template: {', '.join(found.limits)}."] if found.limits else []
    if {TOOLS, THINKING} & {*found.limits}:
        limits.append("# Recent versions of Ollama use the GGUF file's own template instead if that can do more.")
    return [
        "# The model's chat template as a Go template. Both were compared on conversations with and without a system",
        "# message.",
        *limits,
        f'TEMPLATE """{found.text}"""',
    ], True


def _adds_bos(file: Path) -> bool | None:
    """Return whether llama.cpp puts the start token before a prompt; None if the file does not say it."""
    reader = gguf.GGUFReader(file)
    if (field := reader.get_field(gguf.Keys.Tokenizer.ADD_BOS)) is not None:
        return bool(field.contents())
    kind = reader.get_field(gguf.Keys.Tokenizer.MODEL)
    return True if kind is not None and kind.contents() == "llama" else None  # the default of sentencepiece models


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return config if isinstance(config, dict) else {}


def _stop_texts(tokenizer: Tokenizer, config: dict[str, Any]) -> list[str]:
    ends = config.get("eos_token_id")
    ids = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    texts = [str(tokenizer.decode([token])) for token in ids if isinstance(token, int) and 0 <= token < len(tokenizer)]
    return [text for text in dict.fromkeys(texts) if text.strip() and text.isprintable()]


def _sampling(config: dict[str, Any]) -> list[str]:
    if config.get("do_sample"):
        known = {ollama: config[ours] for ours, ollama in SAMPLING.items() if isinstance(config.get(ours), int | float)}
        lines = [f"PARAMETER {name} {value}" for name, value in known.items()]
        return ["# Sampling as in the model's generation_config.json.", *lines] if lines else []
    return [
        "# Without this line Ollama samples at temperature 0.8. generation_config.json does not ask for sampling, and",
        "# folora-q measured the most likely answers.",
        "PARAMETER temperature 0",
    ]
