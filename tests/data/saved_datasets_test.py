"""Folders of `save_to_disk`: found by what lies in them, read through datasets, one split of several."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from folora_q.data.loading import read_task_data
from folora_q.data.rows import Row
from folora_q.data.sources import find, read_source
from folora_q.errors import UserError
from folora_q.recipe.dataset import DataSection, Source
from tests.data.rows import assistant, user, write_jsonl


def chats(name: str, count: int) -> list[dict[str, object]]:
    return [{"messages": [user(f"{name} {i}"), assistant("yo")], "tags": [name]} for i in range(count)]


def read(path: Path, split: str | None = None) -> list[tuple[str, object]]:
    rows = read_source(Source(path=str(path), split=split))
    return [(row.where.removeprefix(str(path)), row.values) for row in rows if isinstance(row, Row)]


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    parts = {name: Dataset.from_list(chats(name, count)) for name, count in (("test", 2), ("train", 3))}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_dataset_is_read_and_not_its_description(tmp_path: Path) -> None:
    rows = chats("a", 5)
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=3)
    assert read(tmp_path / "saved") == [(f" row {number}", row) for number, row in enumerate(rows, 1)]
    found = find(Source(path=str(tmp_path / "saved")))
    assert found.unread == {}
    assert len(found.files()) == 5 and all(file.is_file() for file in found.files().values())


def test_what_was_saved_as_tensors_or_with_rows_in_another_order_is_read_as_rows(tmp_path: Path) -> None:
    kinds = Features({"text": Value("string"), "kind": ClassLabel(names=["bad", "good"]), "n": [Value("int64")]})
    dataset = Dataset.from_dict({"text": list("abc"), "kind": [1, 0, 1], "n": [[1], [2], [3]]}, features=kinds)
    dataset.select([2, 0]).with_format("numpy").save_to_disk(tmp_path / "saved")
    assert [values for _, values in read(tmp_path / "saved")] == [
        {"text": "c", "kind": 1, "n": [3]},
        {"text": "a", "kind": 1, "n": [1]},
    ]


def test_of_several_splits_train_is_read_and_the_others_are_named(splits: Path) -> None:
    assert [values for _, values in read(splits)] == chats("train", 3)
    assert read(splits)[0][0] == "/train row 1"
    assert find(Source(path=str(splits))).unread == {"test/": "another split than train"}
    assert [values for _, values in read(splits, "test")] == chats("test", 2)
    assert [values for _, values in read(splits / "test")] == chats("test", 2)


def test_a_split_that_is_not_there_is_answered_with_those_that_are(splits: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(splits, "validation")
    assert caught.value.message == f"{splits} has no split 'validation': it has test, train"


def test_without_train_the_only_split_is_read_and_among_several_one_is_asked_for(tmp_path: Path) -> None:
    dataset = Dataset.from_list(chats("x", 2))
    DatasetDict({"all": dataset}).save_to_disk(tmp_path / "one")
    assert len(read(tmp_path / "one")) == 2
    DatasetDict({"first": dataset, "second": dataset}).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "two")
    assert caught.value.message == f"{tmp_path / 'two'} has the splits first, second"
    assert caught.value.hint == "set `split` of this source to the one to read"


def test_saved_datasets_among_other_files_are_each_read_whole(tmp_path: Path, splits: Path) -> None:
    Dataset.from_list(chats("b", 2)).save_to_disk(tmp_path / "b")
    write_jsonl(tmp_path / "z.jsonl", chats("z", 2))
    (tmp_path / "README.md").write_text("about")
    found = find(Source(path=str(tmp_path)))
    assert [part.name for part in found.parts] == [str(tmp_path / name) for name in ("b", "saved/train", "z.jsonl")]
    assert found.unread == {"saved/test/": "another split than train", "README.md": "a text file among tables"}
    assert len(read(tmp_path)) == 7


def test_what_lies_in_a_saved_dataset_besides_is_named(tmp_path: Path) -> None:
    Dataset.from_list(chats("a", 2)).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "picture.png").touch()
    assert list(find(Source(path=str(tmp_path / "saved"))).unread) == ["picture.png"]


def test_arrow_files_alone_are_refused_and_their_description_is_no_data(tmp_path: Path) -> None:
    Dataset.from_list(chats("a", 2)).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").unlink()
    with pytest.raises(UserError, match="holds no data file") as caught:
        read(tmp_path / "saved")
    assert caught.value.hint is not None and ".arrow" in caught.value.hint


@pytest.mark.parametrize("harm", ["cut", "empty", "no JSON", "gone"])
def test_a_damaged_saved_dataset_is_a_sentence(tmp_path: Path, harm: str) -> None:
    Dataset.from_list(chats("a", 200)).save_to_disk(tmp_path / "saved")
    [data] = (tmp_path / "saved").glob("*.arrow")
    match harm:
        case "cut":
            data.write_bytes(data.read_bytes()[:300])
        case "empty":
            data.write_bytes(b"")
        case "no JSON":
            (tmp_path / "saved" / "state.json").write_text("{")
        case "gone":
            data.unlink()
    with pytest.raises(UserError) as caught:
        read(tmp_path / "saved")
    assert caught.value.message.startswith(f"{tmp_path / 'saved'} is not a saved dataset that can be read: ")
    assert "\n" not in caught.value.message


def test_an_empty_saved_dataset_holds_no_rows(tmp_path: Path) -> None:
    Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"saved holds no rows$"):
        read(tmp_path / "saved")


def test_splits_of_one_folder_can_be_trained_on_and_held_out(splits: Path) -> None:
    section = DataSection(train_dataset=[str(splits)], eval_dataset=[{"path": str(splits), "split": "test"}])
    task = read_task_data(section, seed=0)
    assert (len(task.train), len(task.heldout), task.repeated) == (3, 2, 0)


def test_a_saved_dataset_names_no_file_outside_of_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Dataset.from_list(chats(name, 2)).save_to_disk(tmp_path / name)
    state = json.loads((tmp_path / "a" / "state.json").read_text())
    state["_data_files"] = [{"filename": f"../b/{state['_data_files'][0]['filename']}"}]
    (tmp_path / "a" / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"state\.json names a file outside of it: \.\./b/"):
        read(tmp_path / "a")


def test_a_damaged_offset_in_an_arrow_file_is_found_before_arrow_follows_it(tmp_path: Path) -> None:
    """Arrow reads from wherever an offset points to, and the process ends without a word: so it runs in another one."""
    Dataset.from_dict({"text": ["x" * 40] * 9}).save_to_disk(tmp_path / "saved")
    [data] = (tmp_path / "saved").glob("*.arrow")
    offsets = struct.pack("<10i", *range(0, 400, 40))
    assert data.read_bytes().count(offsets) == 1
    data.write_bytes(data.read_bytes().replace(offsets, struct.pack("<10i", *range(0, 360, 40), 2**30)))
    code = "import sys\nfrom folora_q.data.sources import read_source\nfrom folora_q.recipe.dataset import Source\n"
    code += "from folora_q.errors import UserError\ntry: list(read_source(Source(path=sys.argv[1])))\n"
    code += "except UserError as error: print(error.message)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "saved"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "is not a saved dataset that can be read" in done.stdout, done.stderr
