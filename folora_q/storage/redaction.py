"""Redact tokens and passwords from everything that is shown or written.

Standard library only.
"""

from __future__ import annotations

import os
import re

HIDDEN = "<hidden>"
# Variables that hold one, by their names' ends: HF_TOKEN, WANDB_API_KEY, CLEARML_API_SECRET_KEY, COMET_API_KEY.
HOLDS_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|(API|ACCESS|SECRET)_?KEY)$", re.IGNORECASE)
# A shorter value says yes or no, and would be found inside of other words.
MIN_SECRET_LENGTH = 8
LOOKS_SECRET = re.compile(
    r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}"  # the hub's tokens
    r"|(?<=Bearer )[^\s'\"]+"
    r"|(?<=://)[^/\s@]+(?=@)"  # of https://user:password@host
    r"|(?<=:/)[^/\s@:]+:[^/\s@]+(?=@)"  # which a path writes with one slash
    r"|(?:(?<=[?&]token=)|(?<=[?&]sig=)|(?<=[?&]api_key=)|(?<=[?&]Signature=)|(?<=X-Amz-Signature=))[^&\s'\"]+"
)
# All of the above holds one of these.
SIGNS = ("hf_", "Bearer ", ":/", "?", "&")


def conceal(text: str) -> str:
    """The text without tokens and passwords."""
    for secret in _of_the_environment():
        text = text.replace(secret, HIDDEN)
    return LOOKS_SECRET.sub(HIDDEN, text) if any(sign in text for sign in SIGNS) else text


def holds_secret(text: str) -> bool:
    """Whether there is a token or a password in it."""
    return conceal(text) != text


def _of_the_environment() -> list[str]:
    """The longest first: one may be the beginning of another."""
    found = {
        value for name, value in os.environ.items() if len(value) >= MIN_SECRET_LENGTH and HOLDS_SECRET.search(name)
    }
    return sorted(found, key=len, reverse=True)
