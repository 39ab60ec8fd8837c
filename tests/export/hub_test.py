"""A real client against a small hub on this machine, which can be told to fail at any of its endpoints."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from folora_q.errors import FoloraError, RunError, UserError
from folora_q.export.hub import push_folder

TOKEN = "hf_" + "SecretSecretSecret" * 2
REPO = "ada/booking"
MERGED = {
    "README.md": b"---\nlibrary_name: transformers\n---\n# A model\n",
    "config.json": b"{}",
    "merge.json": b'{"verified": true}',
    "model-00001-of-00002.safetensors": b"first" * 1000,
    "model-00002-of-00002.safetensors": b"second" * 1000,
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
}
ADAPTER = {"README.md": b"# An adapter\n", "adapter_config.json": b"{}", "adapter_model.safetensors": b"ab" * 100}


@dataclass
class Hub:
    """The repositories, every request, and what is to go wrong.

    Attributes:
        faults: answers in place of the right ones, by endpoint: (status, message), or "lost" for doing what was asked
            and closing the connection.
        ignored: names that a .gitignore in the repository holds.
    """

    url: str = ""
    commits: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    public: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: dict[str, tuple[int, str] | str] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)

    def answer(self, endpoint: str, repo: str, at: str | None, body: bytes) -> tuple[int, dict]:
        commits = self.commits.get(repo, [])
        match endpoint:
            case "model":
                if not commits:
                    return 404, {"error": "Repository not found"}
                files = commits[-1 if at is None else int(at, 16)]
                siblings = [{"rfilename": name} for name in files]
                sha = f"{len(commits) - 1 if at is None else int(at, 16):040x}"
                return 200, {"id": repo, "sha": sha, "private": repo not in self.public, "siblings": siblings}
            case "create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                if repo in self.commits:
                    return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}
                self.commits[repo] = [{".gitattributes": b""}]
                if asked["visibility"] == "public":
                    self.public.add(repo)
                return 200, {"url": f"{self.url}/{repo}"}
            case "yaml":
                return 200, {}
            case "preupload":
                return 200, {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": file["path"] in self.ignored,
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            case "lfs":
                objects = json.loads(body)["objects"]
                return 200, {
                    "objects": [o | {"actions": {"upload": {"href": f"{self.url}/blob/{o['oid']}"}}} for o in objects]
                }
            case "blob":
                self.blobs[hashlib.sha256(body).hexdigest()] = body
                return 200, {}
            case "commit":
                files = dict(commits[-1])
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = self.blobs[value["oid"]]
                commits.append(files)
                return 200, {"commitUrl": f"{self.url}/{repo}/commit/1", "commitOid": f"{len(commits) - 1:040x}"}
        return 404, {}


ENDPOINTS = {
    r"GET /api/models/(?P<repo>\w+/\w+)(/revision/(?P<at>\w+))?": "model",
    r"POST /api/repos/create": "create",
    r"POST /api/validate-yaml": "yaml",
    r"POST /api/models/(?P<repo>\w+/\w+)/preupload/main": "preupload",
    r"POST /(?P<repo>\w+/\w+)\.git/info/lfs/objects/batch": "lfs",
    r"PUT /blob/\w+": "blob",
    r"POST /api/models/(?P<repo>\w+/\w+)/commit/main": "commit",
}


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        line = f"{self.command} {self.path}"
        endpoint, match = next((e, m) for pattern, e in ENDPOINTS.items() if (m := re.fullmatch(pattern, line)))
        if endpoint != "blob":  # the storage is another's, who gets no token
            assert self.headers["Authorization"] == f"Bearer {TOKEN}", line
        self.hub.requests.append(endpoint)
        found = match.groupdict()
        fault = self.hub.faults.get(endpoint)
        if isinstance(fault, tuple):
            status, answer = fault[0], {"error": fault[1]}
        else:
            status, answer = self.hub.answer(endpoint, found.get("repo") or "", found.get("at"), body)
        if fault == "lost":
            self.close_connection = True
            return
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = handle_one

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    return write(tmp_path / "merged", MERGED)


def push(hub: Hub, folder: Path, private: bool = True) -> str:
    return push_folder(folder, REPO, private, HfApi(endpoint=hub.url))


def failure(hub: Hub, folder: Path, kind: type[FoloraError], private: bool = True) -> FoloraError:
    """What a push that fails says; never the token, also not to who looks at tracebacks."""
    with pytest.raises(kind) as caught:
        push(hub, folder, private)
    assert TOKEN not in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert caught.value.exit_code == (2 if kind is UserError else 1)
    return caught.value


@pytest.mark.parametrize("private", [True, False])
def test_every_file_goes_into_one_commit(hub: Hub, merged: Path, private: bool) -> None:
    write(merged, {".cache/x": b"hidden", ".model.gguf.tmp": b"hidden", "more/.cache/x": b"hidden"})
    assert push(hub, merged, private) == f"{hub.url}/{REPO}"
    before, commit = hub.commits[REPO]
    assert commit == before | MERGED
    assert (REPO in hub.public) is not private
    assert [request for request in hub.requests if request != "blob"] == [
        *("model", "create", "model", "yaml", "preupload", "lfs", "commit", "model")
    ]
    assert hub.requests.count("blob") == 2


def test_an_adapter_is_pushed_and_pushed_again(hub: Hub, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", ADAPTER)
    push(hub, folder)
    push(hub, write(folder, {"adapter_model.safetensors": b"new"}))
    assert [commit.get("adapter_model.safetensors") for commit in hub.commits[REPO]] == [None, b"ab" * 100, b"new"]


def test_each_file_is_named_once_in_the_operations(hub: Hub, merged: Path) -> None:
    asked: list[str] = []

    class Watched(HfApi):
        def create_commit(self, repo_id, operations, **options):
            asked.extend(operation.path_in_repo for operation in operations)
            return super().create_commit(repo_id, operations, **options)

    push_folder(merged, REPO, True, Watched(endpoint=hub.url))
    assert sorted(asked) == sorted(MERGED)


def test_without_a_token_nothing_is_sent(hub: Hub, merged: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    error = failure(hub, merged, UserError)
    assert "without a token" in error.message
    assert "`hf auth login`" in error.hint and "HF_TOKEN" in error.hint
    assert not hub.requests


def test_offline_nothing_is_sent(hub: Hub, merged: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = failure(hub, merged, UserError)
    assert "HF_HUB_OFFLINE" in error.message and "unset" in error.hint
    assert not hub.requests


@pytest.mark.parametrize(
    "report", [b'{"verified": false}', b'{"verified": null}', b"{}", b'{"verified": "yes"}', b"[]", b""]
)
def test_a_merged_model_that_was_not_verified_is_not_pushed(hub: Hub, merged: Path, report: bytes) -> None:
    write(merged, {"merge.json": report})
    assert "does not say that the merged model was verified" in failure(hub, merged, UserError).message
    assert not hub.requests


def test_what_is_no_finished_model_is_not_pushed(hub: Hub, merged: Path, tmp_path: Path) -> None:
    (merged / "merge.json").unlink()
    assert "neither an adapter nor a finished merged model" in failure(hub, merged, UserError).message
    assert "there is no folder" in failure(hub, tmp_path / "gone", UserError).message
    assert not hub.requests


@pytest.mark.parametrize("repo_id", ["booking", "ada/two/parts", "ada/with space", TOKEN])
def test_a_repository_needs_an_owner_and_a_name(hub: Hub, merged: Path, repo_id: str) -> None:
    with pytest.raises(UserError, match="is not the id of a repository") as caught:
        push_folder(merged, repo_id, True, HfApi(endpoint=hub.url))
    assert TOKEN not in caught.value.message
    assert not hub.requests


@pytest.mark.parametrize("endpoint", ["yaml", "preupload", "lfs", "blob", "commit"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_push_that_fails_half_way_leaves_nothing_and_says_so(
    hub: Hub, merged: Path, endpoint: str, exists: bool
) -> None:
    hub.commits.update({REPO: [{"README.md": b"old"}]} if exists else {})
    hub.faults[endpoint] = (400, f"no, {TOKEN}")
    error = failure(hub, merged, RunError)
    left = " is unchanged" if exists else ", which was created for it, is empty"
    assert f"nothing of the model was committed, and the repository {hub.url}/{REPO}{left}" in error.message
    assert (endpoint == "yaml" and "Invalid metadata" in error.message) or "no, [token]" in error.message
    assert hub.commits == {REPO: [{"README.md": b"old"} if exists else {".gitattributes": b""}]}
    hub.faults.clear()
    assert push(hub, merged)


@pytest.mark.parametrize("endpoint", ["model", "create", "commit"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_may_not_write_is_the_users_mistake(hub: Hub, merged: Path, endpoint: str, status: int) -> None:
    hub.faults[endpoint] = (status, "You don't have the rights")
    error = failure(hub, merged, UserError)
    assert f"({status} You don't have the rights" in error.message
    assert "`hf auth login`" in error.hint
    assert len(hub.commits.get(REPO, [])) == (endpoint == "commit")


def test_an_answer_that_was_lost_is_not_called_a_failure_to_commit(hub: Hub, merged: Path) -> None:
    hub.faults["commit"] = "lost"
    error = failure(hub, merged, RunError)
    assert f"but {hub.url}/{REPO} has the new commit {1:040x}" in error.message
    assert "nothing" not in error.message


def test_what_cannot_be_found_out_is_not_claimed(hub: Hub, merged: Path) -> None:
    class Cut(HfApi):
        def create_commit(self, *arguments, **options):
            hub.faults["model"] = "lost"
            raise KeyboardInterrupt if interrupted else ConnectionError(f"Illegal header value 'Bearer {TOKEN}'")

    for interrupted in (False, True):
        hub.faults.clear()
        with pytest.raises(KeyboardInterrupt if interrupted else RunError) as caught:
            push_folder(merged, REPO, True, Cut(endpoint=hub.url))
        assert f"it could not be determined whether the model was committed; look at {hub.url}/{REPO}" in str(
            caught.value
        )
        assert TOKEN not in str(caught.value)


def test_an_interrupted_push_says_what_is_there(hub: Hub, merged: Path) -> None:
    class Interrupted(HfApi):
        def create_commit(self, *arguments, **options):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="nothing of the model was committed, .* is empty"):
        push_folder(merged, REPO, True, Interrupted(endpoint=hub.url))


def test_a_commit_that_lacks_a_file_is_not_called_a_success(hub: Hub, merged: Path) -> None:
    hub.ignored.add("model-00002-of-00002.safetensors")
    error = failure(hub, merged, RunError)
    assert "was committed" in error.message and "without model-00002-of-00002.safetensors" in error.message
    assert ".gitignore" in error.hint


def test_a_hub_that_cannot_be_reached(hub: Hub, merged: Path) -> None:
    with pytest.raises(
        RunError, match="cannot read the state of http://127.0.0.1:9/.* nothing of the model was committed"
    ):
        push_folder(merged, REPO, True, HfApi(endpoint="http://127.0.0.1:9"))


def test_other_weights_are_not_mixed_with_these(hub: Hub, merged: Path) -> None:
    """As after a push of the same model in other shards: a loader could take some of each."""
    hub.commits[REPO] = [{"model.safetensors": b"old", "original/x.safetensors": b"old", "config.json": b"old"}]
    assert "already has other weights, model.safetensors" in failure(hub, merged, UserError).message
    del hub.commits[REPO][0]["model.safetensors"]
    assert push(hub, merged)


def test_a_private_model_does_not_go_into_a_public_repository(hub: Hub, merged: Path) -> None:
    hub.commits[REPO] = [{}]
    hub.public.add(REPO)
    assert "already exists and is public; nothing was pushed" in failure(hub, merged, UserError).message
    assert len(hub.commits[REPO]) == 1
    assert push(hub, merged, private=False)
