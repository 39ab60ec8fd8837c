"""A file, a folder, a glob, a dataset on a hub: which files they stand for, and what they say when there is nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
from datasets import Audio, Dataset

from folora_q.data.loading import read_task_data
from folora_q.data.rows import Row
from folora_q.data.sources import _read_hub, find, read_source
from folora_q.errors import UserError
from folora_q.recipe.dataset import DataSection, Source
from tests.data.rows import write_jsonl

QA = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def source(path: Path | str, **more: str) -> Source:
    return Source(path=str(path), **more)


def files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")


def named(folder: Path, pattern: str = "") -> list[str]:
    return [str(part.path.relative_to(folder)) for part in find(source(folder / pattern)).parts]


def test_a_folder_stands_for_its_tables_at_any_depth_sorted(tmp_path: Path) -> None:
    files(tmp_path, "b.jsonl", "a/z.JSON", "a/b/y.jsonl", "c.csv")
    files(tmp_path, "README.md", "notes.txt", "a/model.safetensors", ".hidden.jsonl", ".git/x.jsonl", "a/.cache/x.csv")
    assert named(tmp_path) == ["a/b/y.jsonl", "a/z.JSON", "b.jsonl", "c.csv"]


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    files(tmp_path / ".data", "a.jsonl", ".b.jsonl")
    assert named(tmp_path / ".data") == ["a.jsonl"]


def test_a_folder_of_texts_alone_stands_for_them(tmp_path: Path) -> None:
    files(tmp_path, "b.md", "a/c.txt", "picture.png")
    assert named(tmp_path) == ["a/c.txt", "b.md"]
    assert [row.where for row in read_source(source(tmp_path))] == [str(tmp_path / "a/c.txt"), str(tmp_path / "b.md")]


@pytest.mark.parametrize("names", [[], ["picture.png", ".a.jsonl"]])
def test_a_folder_without_data_is_refused(tmp_path: Path, names: list[str]) -> None:
    files(tmp_path, *names)
    with pytest.raises(UserError) as caught:
        list(read_source(source(tmp_path)))
    assert caught.value.message == f"the folder {tmp_path} holds no data file"
    assert caught.value.hint is not None and ".parquet" in caught.value.hint


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("?.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[b]*", ["b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "d/c.jsonl", "d/e/f.jsonl"]),
        ("d/**/*.jsonl", ["d/c.jsonl", "d/e/f.jsonl"]),
        ("*/*.txt", ["d/t.txt"]),
        ("d*", []),
        ("*.csv", []),
        ("gone/*.jsonl", []),
    ],
)
def test_a_pattern_stands_for_the_files_that_match_it_sorted(tmp_path: Path, pattern: str, names: list[str]) -> None:
    files(tmp_path, "d/e/f.jsonl", "d/c.jsonl", "b.jsonl", "a.jsonl", "d/t.txt")
    assert named(tmp_path, pattern) == names


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    files(tmp_path, "rows[1].jsonl", "rows1.jsonl")
    assert named(tmp_path, "rows[1].jsonl") == ["rows[1].jsonl"]


def unread(folder: Path, pattern: str = "") -> dict[str, str]:
    return {name.removeprefix(f"{folder}/"): reason for name, reason in find(source(folder / pattern)).unread.items()}


def test_every_file_of_a_folder_is_read_or_named_with_the_reason(tmp_path: Path) -> None:
    names = [
        "b.jsonl",
        "a/z.JSON.GZ",
        "a/t.csv.zst",
        "README.md",
        "notes.txt.xz",
        "a/model.safetensors",
        "run",
        "x.zip",
    ]
    names += [
        ".hidden.jsonl",
        ".git/x.jsonl",
        "a/.cache/x.csv",
        "b.jsonl.gz",
        "p.parquet.gz",
        "p.parquet",
        "c.jsonl.lz4",
    ]
    files(tmp_path, *names, "out/x.tar.gz")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    ending = "not a data file, by its ending"
    assert named(tmp_path) == ["a/t.csv.zst", "a/z.JSON.GZ", "b.jsonl", "p.parquet"]
    assert unread(tmp_path) == {
        "README.md": "a text file among tables",
        "notes.txt.xz": "a text file among tables",
        "a/model.safetensors": ending,
        "run": ending,
        "c.jsonl.lz4": ending,
        "x.zip": "it is an archive: unpack it",
        "out/x.tar.gz": "it is an archive: unpack it",
        ".hidden.jsonl": "hidden",
        ".git/": "hidden",
        "a/.cache/": "hidden",
        "b.jsonl.gz": "its unpacked copy is next to it",
        "p.parquet.gz": ".parquet is already compressed internally: unpack it",
        "linked/": "a link to a folder",
        "gone.jsonl": "not a file, or a broken link",
    }


def test_compressed_files_of_a_folder_count(tmp_path: Path) -> None:
    """A folder of which one half was compressed gave half of its rows, without a word."""
    write_jsonl(tmp_path / "a.jsonl", QA)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    [facts] = read_task_data(DataSection(train_dataset=[str(tmp_path)], eval_size=1), seed=0).facts
    assert (facts.rows, facts.unread, facts.remarks) == (4, {}, [])


def test_what_is_not_read_is_told_by_reason_and_a_thousand_names_are_some(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", QA)
    files(tmp_path, "README.md", *(f"{number:04}.png" for number in range(1000)))
    [facts] = read_task_data(DataSection(train_dataset=[str(tmp_path)], eval_size=1), seed=0).facts
    (told,) = facts.remarks
    assert (
        told is not None and "0000.png, 0001.png, " in told and " and 990 more (not a data file, by its ending)" in told
    )
    assert "README.md (a text file among tables)" in told and len(facts.unread) == 1001


def test_a_folder_that_a_pattern_matches_is_named(tmp_path: Path) -> None:
    files(tmp_path, "a.jsonl", "more/b.jsonl")
    assert unread(tmp_path, "*") == {"more/": "a folder: name it, or use **"}
    assert unread(tmp_path, "**/*.jsonl") == {}


def test_rows_come_file_by_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", [{"n": 3}])
    write_jsonl(tmp_path / "a.jsonl", [{"n": 1}, {"n": 2}])
    expected = [(f"{tmp_path}/a.jsonl line 1", 1), (f"{tmp_path}/a.jsonl line 2", 2), (f"{tmp_path}/b.jsonl line 1", 3)]
    for place in (tmp_path, tmp_path / "*.jsonl"):
        assert [(row.where, row.values["n"]) for row in read_source(source(place))] == expected


def test_a_file_without_rows_among_others_is_refused_and_named(tmp_path: Path) -> None:
    files(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"^\S+/b\.jsonl holds no rows$"):
        list(read_source(source(tmp_path)))


def test_a_pattern_may_name_a_file_of_no_known_ending_which_is_refused(tmp_path: Path) -> None:
    files(tmp_path, "a.jsonl", "b.xlsx")
    with pytest.raises(UserError, match=r"cannot read \S+/b\.xlsx: its ending is not one of"):
        list(read_source(source(tmp_path / "*")))


@pytest.mark.parametrize("name", ["*.jsonl", "gone.jsonl"])
def test_files_that_are_gone_since_the_recipe_was_checked_are_a_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"\.jsonl"):
        read_task_data(DataSection(train_dataset=[source(tmp_path / name)]), seed=0)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that datasets takes for what a hub has: it looks for org/name there first. Its own cache is beside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "org" / "name").mkdir(parents=True)
    return tmp_path / "org" / "name"


def test_a_hub_dataset_has_rows_and_their_places_and_no_local_files(hub: Path) -> None:
    write_jsonl(hub / "data.jsonl", QA)
    assert list(_read_hub(source("org/name"))) == [
        Row("org/name (train) row 1", QA[0]),
        Row("org/name (train) row 2", QA[1]),
    ]
    assert [row.where for row in read_source(source("org/name", split="train[1:]"))] == ["org/name (train[1:]) row 1"]
    assert find(source("org/name")).parts == []


def test_a_hub_datasets_configuration_and_split_are_chosen_by_name(hub: Path) -> None:
    splits = "[{split: train, path: a.jsonl}, {split: test, path: b.jsonl}]"
    configs = f"- config_name: main\n  data_files: {splits}\n- config_name: other\n  data_files: c.jsonl\n"
    (hub / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in "abc":
        write_jsonl(hub / f"{name}.jsonl", [{"text": name}])
    assert [row.values for row in _read_hub(source("org/name", name="main", split="test"))] == [{"text": "b"}]
    assert [row.values for row in _read_hub(source("org/name", name="other"))] == [{"text": "c"}]


def test_a_hub_that_cannot_be_reached_is_one_sentence_with_the_id(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        list(read_source(source("org/name")))
    message, hint = caught.value.message, caught.value.hint
    assert message.startswith("cannot load the dataset org/name from the hub") and "\n" not in message
    assert hint is not None and "HF_HUB_OFFLINE must not be set" in hint


@pytest.mark.parametrize(
    ("content", "more", "reason"),
    [
        ('{"a": 1}\n{"a": \n', {}, ""),
        ("", {}, ""),
        ('{"a": 1}\n', {"split": "test"}, 'Unknown split "test"'),
        ('{"a": 1}\n', {"split": "train[:0]"}, "no data"),
        ('{"a": 1}\n', {"name": "main"}, "'main' not found"),
    ],
)
def test_what_datasets_raises_becomes_one_sentence_with_the_id(
    hub: Path, content: str, more: dict[str, str], reason: str
) -> None:
    (hub / "data.jsonl").write_text(content)
    with pytest.raises(UserError) as caught:
        list(read_source(source("org/name", **more)))
    assert "org/name" in caught.value.message and reason in caught.value.message
    assert "\n" not in caught.value.message and len(caught.value.message) < 500


def test_a_folder_with_a_loading_script_is_refused(hub: Path) -> None:
    (hub / "name.py").write_text("raise SystemExit('the script was run')\n")
    with pytest.raises(UserError, match="org/name"):
        list(read_source(source("org/name")))


def test_a_hub_dataset_whose_rows_cannot_be_decoded_is_a_sentence(hub: Path) -> None:
    sound = Dataset.from_dict({"text": ["a"], "audio": [{"bytes": b"", "path": None}]})
    sound.cast_column("audio", Audio()).to_parquet(hub / "data.parquet")
    with pytest.raises(UserError, match="org/name"):
        list(read_source(source("org/name")))


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("Training/a.jsonl", "eval/a.jsonl"),
        ("my_train_set.json", "my_dev_set.json"),
    ],
)
def test_beside_training_data_a_test_set_is_not_trained_on(tmp_path: Path, names: tuple[str, str]) -> None:
    """As a clone of a hub's dataset has them: both were trained on, without a word."""
    files(tmp_path, *names, "README.md")
    assert named(tmp_path) == [names[0]]
    assert unread(tmp_path) == {names[1]: "another split than train", "README.md": "a text file among tables"}


def test_a_split_by_its_name_can_be_chosen(tmp_path: Path) -> None:
    files(tmp_path, "train.jsonl", "val.jsonl", "test.jsonl", "more.jsonl")
    found = {split: find(source(tmp_path, split=split)) for split in ("validation", "val", "test", "train")}
    read = {split: [part.name for part in each.parts] for split, each in found.items()}
    assert read == {
        "validation": [str(tmp_path / "val.jsonl")],
        "val": [str(tmp_path / "val.jsonl")],
        "test": [str(tmp_path / "test.jsonl")],
        "train": [str(tmp_path / "train.jsonl")],
    }
    assert named(tmp_path) == ["more.jsonl", "train.jsonl"]
    with pytest.raises(UserError, match=r"has no split 'train\[:10%\]': it has test, train, validation"):
        find(source(tmp_path, split="train[:10%]"))


@pytest.mark.parametrize(
    "names",
    [("test.jsonl",), ("test.jsonl", "val.jsonl"), ("train_test.jsonl", "a.jsonl"), ("contest.jsonl", "train.jsonl")],
)
def test_without_training_data_beside_it_every_file_is_read(tmp_path: Path, names: tuple[str, ...]) -> None:
    files(tmp_path, *names)
    assert named(tmp_path) == sorted(names) and not unread(tmp_path)


def test_a_split_of_a_file_and_a_name_of_a_folder_are_refused_rather_than_passed_over(tmp_path: Path) -> None:
    files(tmp_path, "a.jsonl")
    for place in (tmp_path / "a.jsonl", tmp_path / "*.jsonl"):
        assert len(find(source(place, split="train")).parts) == 1, "recipes of earlier runs say so"
        with pytest.raises(UserError, match=r"`split` is 'train\[:10%\]', but \S+ names files"):
            find(source(place, split="train[:10%]"))
    for key in ("name", "revision"):
        with pytest.raises(UserError, match=f"`{key}` is for hub datasets"):
            find(source(tmp_path, **{key: "main"}))
