"""Push a folder to the Hugging Face Hub in one commit."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from folora_q import __version__
from folora_q.errors import FoloraError, RunError, UserError
from folora_q.models.trust import ADAPTER_CONFIG
from folora_q.runs.folder import MERGE_REPORT as REPORT

LOG_IN = (
    "log in with `hf auth login`, or set HF_TOKEN to a token that may write: https://huggingface.co/settings/tokens"
)
# Weights that a loader would find next to, or instead of, those that are pushed.
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


@dataclass(frozen=True)
class _State:
    """The state of a repository at one commit."""

    commit: str | None
    files: frozenset[str]
    private: bool


@dataclass(frozen=True)
class _Hub:
    """Accesses one repository with one token."""

    api: HfApi
    repo_id: str
    token: str

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo_id}"

    def state(self, commit: str | None = None) -> _State | None:
        """Return the state at the head or at a commit; None if there is no such repository."""
        try:
            info = self.api.model_info(self.repo_id, revision=commit, token=self.token)
        except RepositoryNotFoundError:
            return None
        return _State(info.sha, frozenset(file.rfilename for file in info.siblings or []), bool(info.private))

    def failure(self, what: str, error: BaseException) -> FoloraError:
        """Convert an error of the hub client, which raises whatever its transport does."""
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        message = f"{what} ({_reason(error, self.token)})"
        if status == 401:
            return UserError(message, f"the hub does not accept the token; {LOG_IN}")
        if status == 403:
            return UserError(message, f"the token may not write to {self.repo_id}; {LOG_IN}")
        return RunError(message, "push again; files that are already on the hub are not sent twice")


def push_folder(folder: Path, repo_id: str, private: bool, api: HfApi | None = None) -> str:
    """Push a verified merged model, or an adapter.

    Args:
        folder: all of its files are pushed, except hidden ones.
        repo_id: such as name/model; created if it does not exist.
        private: whether a repository that is created is private.
        api: the hub to push to.

    Returns:
        The repository's URL.

    Raises:
        UserError: there is no token, offline mode is on, the folder is neither, or the repository refuses it or has
            other weights; nothing was committed.
        RunError: the push failed; the message says what is on the hub, as far as it is known.
    """
    files = _files(folder)
    kind = _kind(folder)
    hub = _Hub(
        api or HfApi(library_name="folora-q", library_version=__version__), _repository(repo_id), require_token()
    )
    nothing = "nothing of the model was committed"
    try:
        before = hub.state()
    except Exception as error:
        raise hub.failure(f"cannot read the state of {hub.url}; {nothing}", error) from None
    created = before is None
    if before is not None:
        _refuse_mixture(hub, before, files, private)
    try:
        hub.api.create_repo(repo_id, private=private, exist_ok=True, token=hub.token)
        before = before or hub.state()
    except Exception as error:
        raise hub.failure(f"cannot create the repository {hub.url}; {nothing}", error) from None
    try:
        commit = hub.api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()],
            commit_message=f"{kind}, by folora-q {__version__}",
            token=hub.token,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_outcome(hub, before, created)) from None
    except Exception as error:
        raise hub.failure(f"the push failed; {_outcome(hub, before, created)}", error) from None
    try:
        after = hub.state(commit.oid)
    except Exception as error:
        raise hub.failure(f"the model was committed to {hub.url}, which could not be checked", error) from None
    if missing := sorted(files.keys() - (after.files if after else frozenset())):
        raise RunError(
            f"the model was committed to {hub.url} without {missing[0]}, and cannot be loaded from there as it is",
            "the repository's .gitignore may name it; push to another repository, or correct that one",
        )
    return hub.url


def _files(folder: Path) -> dict[str, Path]:
    """Return the files to push, by their names in the repository."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to push")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if not re.search(r"(^|/)\.", name)}


def _kind(folder: Path) -> str:
    """Return what the folder is, for the commit message.

    Raises:
        UserError: it is neither a merged model that was verified nor an adapter.
    """
    if not (folder / REPORT).exists():
        if (folder / ADAPTER_CONFIG).exists():
            return "Adapter"
        raise UserError(
            f"{folder} is neither an adapter nor a finished merged model: it has no {ADAPTER_CONFIG} and no {REPORT}",
            "merge it with `folora-q merge`, which writes the latter when the merged model is verified",
        )
    try:
        verified = json.loads((folder / REPORT).read_text(encoding="utf-8"))["verified"]
    except (OSError, ValueError, LookupError, TypeError):
        verified = None
    if verified is not True:
        raise UserError(
            f"{folder} is not pushed: its {REPORT} does not say that the merged model was verified to be the adapter",
            "merge again; a merged model that fails the verification must not be shared",
        )
    return "Merged model"


def _repository(repo_id: str) -> str:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        valid = False
    else:
        valid = "/" in repo_id
    if not valid:
        raise UserError(f"{_without_tokens(repo_id)} is not the id of a repository", "give it as name/model")
    return repo_id


def require_token() -> str:
    """Return the token of the user who is logged in.

    Raises:
        UserError: nobody is logged in, or offline mode is on.
    """
    if is_offline_mode():
        raise UserError("cannot push: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set", "unset it for this command")
    try:
        token = get_token()
    except Exception as error:  # from an exchange of tokens in CI
        raise UserError(f"cannot push without a token: {_reason(error, '')}", LOG_IN) from None
    if not token:
        raise UserError("cannot push to the Hugging Face Hub without a token", LOG_IN)
    return token


def _refuse_mixture(hub: _Hub, before: _State, files: dict[str, Path], private: bool) -> None:
    """Raise an error if an existing repository is public although it should be private, or has other weights."""
    if private and not before.private:
        raise UserError(
            f"{hub.url} already exists and is public; nothing was pushed",
            "push to another repository, or make that one private in its settings",
        )
    others = sorted(name for name in before.files - files.keys() if "/" not in name and name.endswith(WEIGHTS))
    if others:
        raise UserError(
            f"{hub.url} already has other weights, {others[0]}, which would mix with these; nothing was pushed",
            "push to another repository, or delete them there first",
        )


def _outcome(hub: _Hub, before: _State | None, created: bool) -> str:
    """Describe what is on the hub after a commit failed: it may have succeeded although the answer was lost."""
    try:
        now = hub.state()
    except Exception:
        return f"it could not be determined whether the model was committed; look at {hub.url}"
    if now is None or before is None or now.commit == before.commit:
        left = "which was created for it, is empty" if created else "is unchanged"
        return f"nothing of the model was committed, and the repository {hub.url}{',' * created} {left}"
    return f"but {hub.url} has the new commit {now.commit}; check whether it is this model"


def _reason(error: BaseException, token: str) -> str:
    """Describe an error of the hub client on one line, with its cause, without the token."""
    if isinstance(error, HfHubHTTPError):
        text = f"{error.response.status_code} {error.server_message or error.response.reason_phrase}"
    else:
        text = str(error) or type(error).__name__
        if error.__cause__ is not None:
            text = f"{text.strip().rstrip('.')}: {_reason(error.__cause__, token)}"
    return _without_tokens(" ".join(text.split()), token)[:300]


def _without_tokens(text: str, token: str = "") -> str:
    return re.sub(r"hf_\w{20,}", "[token]", text.replace(token, "[token]") if token else text)
