"""Compressed files are read as what they hold, line for line; damaged ones, and bombs, are a sentence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from folora_q.data import files
from folora_q.data.file_readers import read_file
from folora_q.data.files import DataFile
from folora_q.data.loading import read_task_data
from folora_q.data.rows import Row, RowError
from folora_q.errors import UserError
from folora_q.recipe.dataset import DataSection
from folora_q.recipe.paths import COMPRESSED_ENDINGS

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}
LINES = [json.dumps({"prompt": f"{number} ü", "completion": "x" * (1 + number % 70)}) for number in range(5000)]
TEXTS = {
    "r.jsonl": "\n".join(LINES).encode(),
    "r.json": f"[{','.join(LINES)}]".encode(),
    "r.csv": b"prompt,completion\n" + b'"a\nb",c\n' * 900 + b"d,e,f\n" + b"g,h\n",
    "r.tsv": b"prompt\tcompletion\na\tb\n",
    "r.txt": "\ufeffa\r\nü\n".encode() * 90_000,
    "r.md": b"# A\n",
}


def found(path: Path) -> list[tuple[str, object]]:
    rows = read_file(DataFile(path, str(path)))
    return [(row.where.replace(path.name, "r"), row.values if isinstance(row, Row) else row.reason) for row in rows]


def test_every_compressed_ending_is_tested() -> None:
    assert set(PACKERS) == set(COMPRESSED_ENDINGS) == set(files.UNPACKERS)


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("name", TEXTS)
def test_a_compressed_text_has_the_rows_and_places_of_the_text(tmp_path: Path, name: str, ending: str) -> None:
    (tmp_path / name).write_bytes(TEXTS[name])
    packed = tmp_path / (name.upper() + ending)
    packed.write_bytes(PACKERS[ending](TEXTS[name]))
    assert found(packed) == found(tmp_path / name)


@pytest.mark.parametrize("ending", PACKERS)
def test_a_broken_line_is_named_by_its_number_in_what_was_packed(tmp_path: Path, ending: str) -> None:
    lines = [*LINES[:4710], '{"prompt": }', *LINES[4711:]]
    path = tmp_path / f"r.jsonl{ending}"
    path.write_bytes(PACKERS[ending]("\n".join(lines).encode()))
    with pytest.raises(RowError, match=r"r\.jsonl\.\w+ line 4711: it is not JSON"):
        read_task_data(DataSection(train_dataset=[str(path)]), seed=0)


@pytest.mark.parametrize("ending", PACKERS)
def test_files_that_were_packed_one_behind_the_other_are_read_to_the_end(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"r.jsonl{ending}"
    path.write_bytes(PACKERS[ending](b'{"a": 1}\n') + PACKERS[ending](b'{"a": 2}\n'))
    assert [values for _, values in found(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("harm", ["cut short", "another file", "hole"])
def test_a_damaged_compressed_file_is_a_sentence_with_its_name(tmp_path: Path, ending: str, harm: str) -> None:
    whole = PACKERS[ending](TEXTS["r.jsonl"])
    half = len(whole) // 2
    content = {
        "cut short": whole[: len(whole) - 20],
        "another file": b'{"a": 1}\n' * 9,
        "hole": whole[:half] + bytes(200) + whole[half + 200 :],
    }[harm]
    path = tmp_path / f"r.jsonl{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        [row for row in read_file(DataFile(path, str(path))) if isinstance(row, Row)]
    assert caught.value.message.startswith(f"{path} is damaged or cut short: it cannot be unpacked beyond byte ")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.txt"])
def test_a_decompression_bomb_is_refused_before_it_fills_the_memory(
    tmp_path: Path, name: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 4 * 2**20)
    path = tmp_path / (name + ending)
    path.write_bytes(PACKERS[ending](b" " * 64 * 2**20))
    if (most := files.MAX_UNPACKED_RATIO * path.stat().st_size) > 32 * 2**20:
        pytest.fail(f"the test needs a file that packs better: {most}")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"unpacks to over \d+ MiB, 100 times its own size"):
            found(path)
        assert tracemalloc.get_traced_memory()[1] < 48 * 2**20
    finally:
        tracemalloc.stop()


def test_lines_that_repeat_are_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "the same"}\n' * 100_000))
    assert len(found(path)) == 100_000


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("r.parquet.gz", r"\.parquet is already compressed internally: unpack it"),
        ("r.tar.gz", "it is an archive: unpack it"),
        ("r.zip", "it is an archive: unpack it"),
        ("r.jsonl.lz4", r"its ending is not one of .*\.md \(text may also end in \.gz, \.zst, \.bz2, \.xz\)"),
        ("r.gz", "its ending is not one of"),
        ("data.arrow", "is read as a part of a folder that `save_to_disk` made"),
    ],
)
def test_what_cannot_be_read_says_what_to_do(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=reason):
        found(tmp_path / name)
