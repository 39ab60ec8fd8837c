"""Redact tokens, passwords and user names from reports that are meant to be shared.

This is stricter than `folora_q.storage.redaction`: everything that begins with hf_ is hidden.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from folora_q.doctor.findings import Finding
from folora_q.storage.redaction import HIDDEN, conceal

HUB_TOKEN = re.compile(r"hf_\w{6,}")


def without_secrets(finding: Finding) -> Finding:
    """Return the finding without tokens and passwords, which network errors quote, and with ~ for the home folder."""
    return _each(finding, _conceal)


def without_user(finding: Finding) -> Finding:
    """Return the finding without folders named like the user, as in /data/NAME/models."""
    try:
        user = re.compile(rf"(?<=[/\\]){re.escape(getpass.getuser())}(?=[/\\):\s]|$)")
    except (OSError, KeyError, ImportError):  # in a container the user may have no name
        return finding
    return _each(finding, lambda text: user.sub("USER", text))


def _conceal(text: str) -> str:
    with suppress(Exception):  # huggingface_hub may be broken
        from huggingface_hub import get_token

        if token := get_token():
            text = text.replace(token, HIDDEN)
    text = HUB_TOKEN.sub(HIDDEN, conceal(text))
    with suppress(RuntimeError):  # no home
        text = re.sub(rf"{re.escape(str(Path.home()))}(?=[/\\):\s]|$)", "~", text)
    return text


def _each(finding: Finding, change: Callable[[str], str]) -> Finding:
    return replace(finding, fact=change(finding.fact), fix=None if finding.fix is None else change(finding.fix))
