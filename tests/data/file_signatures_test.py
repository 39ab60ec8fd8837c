"""Files that are not what their names say: pointers, web pages, and what is compressed or binary."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from folora_q.data.file_readers import READERS, read_file
from folora_q.data.files import DataFile
from folora_q.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4689\n"
PAGE = b"\n<!DOCTYPE html>\n<html lang='en'><head><title>alpaca.json at main</title></head></html>"
TEXT = b'{"text": "a"}\n'


def refusal(path: Path, content: bytes) -> UserError:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_file(DataFile(path, path.name)))
    return caught.value


@pytest.mark.parametrize("ending", [*READERS, ".jsonl.gz", ".txt.zst"])
def test_a_pointer_of_git_lfs_is_no_data_and_is_never_learned(tmp_path: Path, ending: str) -> None:
    error = refusal(tmp_path / f"train{ending}", POINTER)
    assert error.message == f"train{ending} is a Git LFS pointer, not the data itself"
    assert error.hint is not None and "git lfs pull" in error.hint


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet", ".json.gz"])
def test_a_web_page_in_place_of_a_file_is_named(tmp_path: Path, ending: str) -> None:
    error = refusal(tmp_path / f"train{ending}", PAGE)
    assert "is a web page, not a ." in error.message and error.hint is not None and "blob" in error.hint


def test_a_text_may_be_a_web_page(tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_bytes(PAGE)
    assert len(list(read_file(DataFile(tmp_path / "page.txt", "page.txt")))) == 1


@pytest.mark.parametrize(
    ("content", "ending"),
    [
        (gzip.compress(TEXT), ".gz"),
        (bz2.compress(TEXT), ".bz2"),
        (lzma.compress(TEXT), ".xz"),
        (pa.Codec("zstd").compress(TEXT, asbytes=True), ".zst"),
    ],
    ids=["gzip", "bzip2", "xz", "zstandard"],  # gzip's bytes have the time, which differs between processes
)
@pytest.mark.parametrize("name", ["train.jsonl", "train.txt"])
def test_what_is_compressed_under_another_name_is_named_and_renaming_mends_it(
    tmp_path: Path, content: bytes, ending: str, name: str
) -> None:
    error = refusal(tmp_path / name, content)
    assert error.message == f"{name} is compressed, but its name does not say so"
    assert error.hint == f"rename it to {name}{ending}"
    renamed = (tmp_path / name).rename(tmp_path / f"{name}{ending}")
    assert len(list(read_file(DataFile(renamed, renamed.name)))) == 1


def test_an_excel_or_parquet_file_under_a_texts_name_is_named(tmp_path: Path) -> None:
    assert (
        "is a zip archive or an Excel file, not a .csv file" in refusal(tmp_path / "t.csv", b"PK\x03\x04....").message
    )
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    assert len(list(read_file(DataFile(tmp_path / "t.parquet", "t.parquet")))) == 1
    content = (tmp_path / "t.parquet").read_bytes()
    assert "is a parquet file, not a .jsonl file" in refusal(tmp_path / "t.jsonl", content).message
