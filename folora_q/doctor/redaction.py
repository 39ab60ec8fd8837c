"""Redact reports that are made to be shared: no token, no password, no user name.

More is hidden here than in what a run says (`folora_q.storage.redaction`): everything that begins with hf_.
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
    """The finding without tokens and passwords, which errors of the network quote, and with ~ for the home folder."""
    return _each(finding, _conceal)


def without_user(finding: Finding) -> Finding:
    """The finding without the user's name as a folder, as in /data/NAME/models."""
    try:
        user = re.compile(rf"(?<=[/\\]){re.escape(getpass.getuser())}(?=[/\\):\s]|$)")
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return finding
    return _each(finding, lambda text: user.sub("USER", text))


def _conceal(text: str) -> str:
    with suppress(Exception):  # of a broken huggingface_hub
        from huggingface_hub import get_token

        if token := get_token():
            text = text.replace(token, HIDDEN)
    text = HUB_TOKEN.sub(HIDDEN, conceal(text))
    with suppress(RuntimeError):  # no home
        text = re.sub(rf"{re.escape(str(Path.home()))}(?=[/\\):\s]|$)", "~", text)
    return text


def _each(finding: Finding, change: Callable[[str], str]) -> Finding:
    return replace(finding, fact=change(finding.fact), fix=None if finding.fix is None else change(finding.fix))
