"""Find tokens of a tokenizer that exceed the embedding, from its files. Needs no transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from folora_q.data.examples import Example, content_of
from folora_q.storage.untrusted import MIB, read_json, read_text

# A tokenizer of 260,000 tokens with merges takes 33 MiB.
MAX_TOKENIZER_BYTES = 128 * MIB
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token")


def tokens_beyond(folder: Path, rows: int) -> dict[int, str]:
    """Return the tokens of a model's folder beyond the embedding's rows, by id."""
    return {number: token for number, token in sorted(_tokens(folder)) if number >= rows}


def new_tokens(adapter: Path, base: Path | None, rows: int) -> dict[int, str]:
    """Return the tokens of an adapter's tokenizer beyond the embedding's rows, except those of the base's tokenizer."""
    beyond = tokens_beyond(adapter, rows)
    known = tokens_beyond(base, rows) if beyond and base is not None else {}
    return {number: token for number, token in beyond.items() if number not in known}


def needed_tokens(folder: Path, beyond: Mapping[int, str], template: str | None) -> dict[int, str]:
    """Return those of `beyond` that every run would use: special tokens, or tokens in the chat template.

    Args:
        template: Jinja template to use instead of the model's own.
    """
    config = _object(folder / "tokenizer_config.json")
    named = [config.get(name) for name in NAMED]
    specials = {token["content"] if isinstance(token, Mapping) else token for token in named if token}
    written = template if template is not None else template_of(folder)
    return {number: token for number, token in beyond.items() if token in specials or token in written}


def tokens_in(example: Example, tokens: Mapping[int, str]) -> dict[int, str]:
    """Return those of `tokens` that an example's text contains."""
    content = content_of(example)
    return {number: token for number, token in tokens.items() if json.dumps(token, ensure_ascii=False)[1:-1] in content}


def _tokens(folder: Path) -> Iterator[tuple[int, str]]:
    held = _object(folder / "tokenizer.json")
    for added in held.get("added_tokens") or []:
        yield from _pair(added.get("id"), added.get("content")) if isinstance(added, Mapping) else ()
    model = held.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        for token, number in vocabulary.items():
            yield from _pair(number, token)
    elif isinstance(vocabulary, list):  # a unigram model: tokens with scores, in order of ids
        for number, entry in enumerate(vocabulary):
            yield from _pair(number, entry[0] if isinstance(entry, list) and entry else None)
    decoder = _object(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for number, added in decoder.items() if isinstance(decoder, Mapping) else ():
        content = added.get("content") if isinstance(added, Mapping) else added
        yield from _pair(int(number) if str(number).isdecimal() else None, content)
    for name in ("added_tokens.json", "vocab.json"):
        for token, number in _object(folder / name).items():
            yield from _pair(number, token)


def _pair(number: object, token: object) -> Iterator[tuple[int, str]]:
    if type(number) is int and isinstance(token, str):
        yield number, token


def template_of(folder: Path) -> str:
    """Return the text of a model's chat template, or of its templates as JSON; empty if it has none."""
    try:
        return read_text(folder / "chat_template.jinja", MIB)
    except (OSError, ValueError):
        own = _object(folder / "tokenizer_config.json").get("chat_template")
        return own if isinstance(own, str) else json.dumps(own or "", ensure_ascii=False)


def _object(path: Path) -> Mapping[str, Any]:
    """Read an object from a JSON file; empty if that fails, which loading the tokenizer will report."""
    try:
        value = read_json(path, MAX_TOKENIZER_BYTES)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, Mapping) else {}
