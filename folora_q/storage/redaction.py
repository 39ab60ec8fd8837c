"""Redact tokens and passwords from everything that is shown or written.

Standard library only.
"""

from __future__ import annotations

import os
import re

HIDDEN = "<hidden>"
# Name endings of environment variables with secrets: HF_TOKEN, WANDB_API_KEY, CLEARML_API_SECRET_KEY.
HOLDS_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|(API|ACCESS|SECRET)_?KEY)$", re.IGNORECASE)
# Shorter values are switches such as yes and no, and would match inside of words.
MIN_SECRET_LENGTH = 8
LOOKS_SECRET = re.compile(
    r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}"  # the hub's tokens
    r"|(?<=Bearer )[^\s'\"]+"
    r"|(?<=://)[^/\s@]+(?=@)"  # of https://user:password@host
    r"|(?<=:/)[^/\s@:]+:[^/\s@]+(?=@)"  # the same as a path, with one slash
    r"|(?:(?<=[?&]token=)|(?<=[?&]sig=)|(?<=[?&]api_key=)|(?<=[?&]Signature=)|(?<=X-Amz-Signature=))[^&\s'\"]+"
)
# Every match of the above contains one of these.
SIGNS = ("hf_", "Bearer ", ":/", "?", "&")


def conceal(text: str) -> str:
    """Return the text with tokens and passwords replaced."""
    for secret in _of_the_environment():
        text = text.replace(secret, HIDDEN)
    return LOOKS_SECRET.sub(HIDDEN, text) if any(sign in text for sign in SIGNS) else text


def holds_secret(text: str) -> bool:
    """Whether the text contains a token or a password."""
    return conceal(text) != text


def _of_the_environment() -> list[str]:
    """Return the secrets in environment variables, the longest first: one may be the beginning of another."""
    found = {
        value for name, value in os.environ.items() if len(value) >= MIN_SECRET_LENGTH and HOLDS_SECRET.search(name)
    }
    return sorted(found, key=len, reverse=True)
