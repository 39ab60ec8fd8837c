"""Data at an address: fetched through fsspec from a web server of our own, and from its filesystem in memory."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from datasets import Dataset, DatasetDict

from folora_q.cli.app import main
from folora_q.data import remote
from folora_q.data.loading import read_task_data
from folora_q.data.rows import Row
from folora_q.data.sources import find, read_source
from folora_q.errors import UserError
from folora_q.recipe import load_recipe
from folora_q.recipe.dataset import DataSection, Source
from tests.data.rows import write_jsonl

ROWS = [{"prompt": f"{number}", "completion": "b"} for number in range(9)]


@pytest.fixture(autouse=True)
def fetched_anew() -> Iterator[None]:
    """Each test is a process of its own, as far as copies go."""
    remote._copies.cache_clear()
    yield
    remote._copies().cleanup()
    remote._copies.cache_clear()


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def web(tmp_path: Path, asked: list[str]) -> Iterator[str]:
    """The address of a web server of the folder tmp_path/web."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args) -> None:
            super().__init__(*args, directory=str(folder))

        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path.startswith("/private"):
                self.send_error(403)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def rows(address: str, split: str | None = None) -> list[tuple[str, object]]:
    found = read_source(Source(path=address, split=split))
    return [(row.where, row.values) for row in found if isinstance(row, Row)]


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.parquet", "r%20s.jsonl"])
def test_a_file_of_a_web_server_is_read_under_its_address(tmp_path: Path, web: str, name: str) -> None:
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    path = tmp_path / "web" / name.replace("%20", " ")
    if name.endswith(".parquet"):
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    kind = "row" if name.endswith(".parquet") else "line"
    expected = [(f"{web}/{name}?v=2 {kind} {number}", row) for number, row in enumerate(ROWS, 1)]
    assert rows(f"{web}/{name}?v=2") == expected


def test_what_is_fetched_is_fetched_once_and_its_checksum_is_of_what_was_read(
    tmp_path: Path, web: str, asked: list[str]
) -> None:
    write_jsonl(tmp_path / "web" / "r.jsonl", ROWS)
    address = f"{web}/r.jsonl"
    assert rows(address) == rows(address)
    [(name, path)] = find(Source(path=address)).files().items()
    assert name == address and path.read_bytes() == (tmp_path / "web" / "r.jsonl").read_bytes()
    assert len([request for request in asked if request == "/r.jsonl"]) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.jsonl", "there is nothing at {web}/gone.jsonl"),
        ("private.jsonl", "cannot read {web}/private.jsonl: 403, message='Forbidden'"),
        ("r.xlsx", "cannot read {web}/r.xlsx: its ending is not one of .jsonl"),
        ("broken.jsonl", "{web}/broken.jsonl line 2: it is not JSON"),
        ("empty.jsonl", "{web}/empty.jsonl holds no rows"),
    ],
)
def test_what_cannot_be_read_is_a_sentence_with_the_address(tmp_path: Path, web: str, path: str, message: str) -> None:
    for name, content in {"r.xlsx": "x", "broken.jsonl": '{"text": "a"}\n{\n', "empty.jsonl": ""}.items():
        (tmp_path / "web" / name).write_text(content)
    with pytest.raises(UserError) as caught:
        read_task_data(DataSection(train_dataset=[f"{web}/{path}"]), seed=0)
    assert caught.value.message.startswith(message.format(web=web)) and "\n" not in caught.value.message


def test_a_server_that_is_not_there_is_a_sentence() -> None:
    with closing(ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler).socket) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(
        UserError, match=f"cannot read http://127.0.0.1:{port}/r.jsonl: Cannot connect to host"
    ) as caught:
        rows(f"http://127.0.0.1:{port}/r.jsonl")
    assert caught.value.hint is not None and "download it" in caught.value.hint


def test_a_hub_that_must_not_be_asked_is_a_sentence() -> None:
    with pytest.raises(UserError, match="cannot read hf://datasets/org/name/r.jsonl: "):
        rows("hf://datasets/org/name/r.jsonl")


def test_a_disk_without_room_is_a_sentence(tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "web" / "r.jsonl", ROWS)
    monkeypatch.setattr(remote, "free_bytes", lambda folder: 10**6)
    with pytest.raises(UserError, match="the disk has no room for http://") as caught:
        rows(f"{web}/r.jsonl")
    assert caught.value.hint is not None and "TMPDIR" in caught.value.hint
    assert not list(Path(remote._copies().name).rglob("*.jsonl*"))


def test_a_folder_and_a_pattern_are_read_file_by_file(memory: fsspec.AbstractFileSystem) -> None:
    for name in ("b/2.jsonl", "b/1.jsonl", "b/more/3.jsonl.gz", "b/README.md", "b/.x/4.jsonl"):
        content = json.dumps({"text": name}).encode()
        memory.pipe(f"/{name}", gzip.compress(content) if name.endswith("gz") else content)
    expected = [f"memory:///b/{name} line 1" for name in ("1.jsonl", "2.jsonl", "more/3.jsonl.gz")]
    for address in ("memory://b", "memory://b/"):
        assert [where for where, _ in rows(address)] == expected
        unread = find(Source(path=address)).unread
        assert unread == {"README.md": "a text file among tables", ".x/4.jsonl": "hidden"}
    assert [where for where, _ in rows("memory://b/*.jsonl")] == expected[:2]
    with pytest.raises(UserError, match="there is nothing at memory://c"):
        rows("memory://c")
    with pytest.raises(UserError, match=r"there is nothing at memory://b/\*\.csv"):
        rows("memory://b/*.csv")


def test_a_saved_dataset_can_lie_elsewhere(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])}).save_to_disk(
        tmp_path / "saved"
    )
    memory.put(str(tmp_path / "saved"), "/saved", recursive=True)
    assert rows("memory://saved") == [
        (f"memory:///saved/train row {number}", row) for number, row in enumerate(ROWS, 1)
    ]
    assert len(rows("memory://saved", "test")) == 2
    assert len(rows("memory://saved/test")) == 2
    assert find(Source(path="memory://saved")).unread == {"test/": "another split than train"}


def test_a_name_that_leaves_the_folder_is_passed_over_or_refused(memory: fsspec.AbstractFileSystem) -> None:
    memory.store["/b/../../x.jsonl"] = memory.store["/b/a.jsonl"] = fsspec.implementations.memory.MemoryFile(
        memory, "/b/a.jsonl", b'{"text": "a"}'
    )
    assert [where for where, _ in rows("memory://b")] == ["memory:///b/a.jsonl line 1"]
    assert find(Source(path="memory://b")).unread == {"../../x.jsonl": "hidden"}
    with pytest.raises(UserError, match="has a file whose name cannot be used here"):
        remote.Remote("memory://b").fetch("/b/a.jsonl", "../x.jsonl")


def recipe_with(recipe_file: Path, address: str) -> Path:
    text = recipe_file.read_text().replace("train_dataset: train.jsonl", f"train_dataset: {address}")
    assert address in text
    recipe_file.write_text(text)
    return recipe_file


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://bucket/r.jsonl", "needs the package s3fs, which is not installed: pip install s3fs"),
        ("gs://bucket/r.jsonl", "needs the package gcsfs"),
        ("s4://bucket/r.jsonl", "cannot be read: s4 is not one of http, https, s3"),
        ("git://r.jsonl", "cannot be read: git is not one of"),
        ("reference://r.json", "cannot be read: reference is not one of"),
        ("http://a/b.zip::r.jsonl", "is a chain of addresses"),
    ],
)
def test_an_address_that_cannot_be_read_is_found_in_the_recipe(recipe_file: Path, address: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_with(recipe_file, address))
    assert f"`data.train_dataset.path`: {address} {message}" in caught.value.message
    assert f"{recipe_file} line " in caught.value.message


def test_a_file_address_is_a_path(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_with(recipe_file, (tmp_path / "train.jsonl").as_uri()))
    assert recipe.data.train_dataset[0].path == str(tmp_path / "train.jsonl")


def test_validation_asks_no_server_and_a_run_reads_and_remembers_the_file(
    recipe_file: Path, tmp_path: Path, web: str, asked: list[str], capfd
) -> None:
    write_jsonl(tmp_path / "web" / "r.jsonl", [{"prompt": "a", "completion": "b"} for _ in range(8)])
    path = str(recipe_with(recipe_file, f"{web}/r.jsonl"))
    for command, more in (("validate", []), ("train", ["gate.enabled=false", "evaluation.metric=none"])):
        with pytest.raises(SystemExit) as caught:
            main([command, path, *more])
        assert caught.value.code == 0
        if command == "validate":
            assert not asked and f"{web}/r.jsonl, not checked" in capfd.readouterr().out
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert f"{web}/r.jsonl" in saved["data_sha256"]
