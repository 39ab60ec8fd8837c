"""Check the Hugging Face Hub: allowed, reachable, and with a token that it accepts."""

from __future__ import annotations

from threading import Thread
from urllib.parse import urlsplit

from folora_q.doctor.findings import Finding, State
from folora_q.errors import first_line

SECONDS = 3.0
NAME = "hub"
WITHOUT = "local models and the demo still work"
REFUSED = {403, 407, 429}  # by a proxy, or by the hub itself
LOG_IN = "hf auth login"


def check_hub() -> list[Finding]:
    """Check whether models and data can be fetched. The token is sent to the hub, as in downloads, and never shown."""
    from huggingface_hub import constants, get_token, is_offline_mode

    token = get_token()
    held = "a token is set" if token else "no token"
    if is_offline_mode():
        fact = f"HF_HUB_OFFLINE is set, so nothing is downloaded; {held}"
        return [Finding(NAME, State.WARNING, fact, f"unset HF_HUB_OFFLINE to download; {WITHOUT}")]
    host = urlsplit(constants.ENDPOINT).hostname or "the hub"
    status = _ask(f"{constants.ENDPOINT}/api/whoami-v2", token)
    if isinstance(status, str):
        fix = f"check the network, or HTTPS_PROXY; {WITHOUT}"
        return [Finding(NAME, State.WARNING, f"{host} cannot be reached ({status}); {held}", fix)]
    if status in REFUSED or status >= 500:
        fact, fix = f"{host} answers with HTTP {status}; {held}", f"try again later, or check HTTPS_PROXY; {WITHOUT}"
        return [Finding(NAME, State.WARNING, fact, fix)]
    if token is None:
        fact = f"{host} can be reached; {held}, which only gated and private models, and pushing, require: {LOG_IN}"
        return [Finding(NAME, State.GOOD, fact)]
    if status == 401:
        return [Finding(NAME, State.WARNING, f"{host} can be reached but does not accept the token", LOG_IN)]
    return [Finding(NAME, State.GOOD, f"{host} can be reached; {held if status != 200 else 'it accepts the token'}")]


def _ask(url: str, token: str | None) -> int | str:
    """Return the HTTP status, or why there is none, within SECONDS: a client's timeout does not cover name lookup."""
    answer: list[int | str] = []

    def ask() -> None:
        try:
            from huggingface_hub.utils import get_session

            headers = {"authorization": f"Bearer {token}"} if token else {}
            answer.append(get_session().get(url, headers=headers, timeout=SECONDS).status_code)
        except Exception as error:
            answer.append(first_line(error))

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answer[0] if answer else f"no answer within {SECONDS:g} s"
