"""Detect the language of a short text: by its script, or by the most frequent words of European languages.

Needs no model: eight languages are enough for the packaged prompts, and an answer in another one scores 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Frequent words of each language, also those that several share.
WORDS: Mapping[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the and of to is that it for with are this be from by they have not which you your can its in a as",
        "de": "der die das und ist nicht ein eine einen einem mit von zu im auf für sich auch werden wird sind den dem",
        "fr": "le la les et est un une des de du dans pour que qui pas sur avec plus par vous nous sont au aux il en",
        "es": "el la los las de y es un una del en para que por con se su más como son pero esta este muy al lo a",
        "it": "il la gli e è un una di che per non con del della sono le si più nel alla dei anche come questo da in a",
        "pt": "o a os as e é um uma de do da em para que não com por mais se dos das são ao você como seu sua no na",
        "nl": "de het een en is van niet dat te op met voor zijn er die aan je om ook als maar door worden naar in of",
    }.items()
}
SCRIPTS = {
    "ru": re.compile(r"[а-яёА-ЯЁ]"),
    "zh": re.compile(r"[\u4e00-\u9fff]"),
    "other": re.compile(r"[\u3040-\u30ff\uac00-\ud7af]"),
}
LETTER = re.compile(r"[^\W\d_]")
# Share of a text's letters that are of one script, so that names in other letters do not matter.
MAJORITY = 0.5
MIN_FREQUENT = 2


def language_of(text: str) -> str | None:
    """Return the code of a text's language; None if it cannot be determined."""
    letters = len(LETTER.findall(text))
    if not letters:
        return None
    counts = {name: len(script.findall(text)) for name, script in SCRIPTS.items()}
    if counts["other"] > MAJORITY / 5 * letters:  # Japanese has Chinese characters too
        return "other"
    for name in ("ru", "zh"):
        if counts[name] > MAJORITY * letters:
            return name
    words = re.findall(r"[^\W\d_]+", text.lower())
    found = {language: sum(word in known for word in words) for language, known in WORDS.items()}
    best = max(found, key=lambda language: found[language])
    others = max(count for language, count in found.items() if language != best)
    return best if found[best] >= MIN_FREQUENT and found[best] > others else None
