"""docs/coming-from.md: what it says of our side loads, and no word of the other side is left unexplained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from folora_q.recipe import Recipe, load_recipe
from folora_q.recipe.dataset import FieldName, Source
from folora_q.recipe.hints import FOREIGN_WORDS
from folora_q.recipe.paths import DATA_ENDINGS

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text("utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
THEIRS = [block for block in BLOCKS if re.match(r"# (axolotl|LLaMA-Factory|TRL): \S+", block)]
OURS = [block for block in BLOCKS if block.startswith("# folora-q\n")]
SECTIONS = {name: field.annotation for name, field in Recipe.model_fields.items()}
KNOWN = {
    *SECTIONS,
    *(key for section in SECTIONS.values() for key in section.model_fields),
    *Source.model_fields,
    *get_args(FieldName),
}
TABLE = re.findall(r"^\| (?!folora-q)(.*?) \|$", PAGE, re.MULTILINE)


def first_line(block: str) -> str:
    return block.splitlines()[0].removeprefix("# ")


def words_of(config: dict[str, Any]) -> Iterator[str]:
    """The keys of a configuration, and all those in its data sets."""
    yield from config
    for key in ("datasets", "pretraining_dataset"):
        yield from nested(config.get(key))


def nested(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nested(inner)


def unexplained(words: Iterator[str] | list[str]) -> list[str]:
    return sorted({word for word in words if word not in KNOWN and word not in FOREIGN_WORDS})


def backticked(cell: str) -> list[str]:
    return [word.split(":")[0] for word in re.findall(r"`([^`]+)`", cell)]


def make_data(folder: Path, recipe: dict[str, Any]) -> None:
    """Empty stand-ins for the files that a recipe names."""
    for key in ("train_dataset", "eval_dataset"):
        given = recipe["data"].get(key, [])
        for source in given if isinstance(given, list) else [given]:
            path = source["path"] if isinstance(source, dict) else source
            if path.endswith(DATA_ENDINGS):
                assert not Path(path).is_absolute()
                (folder / path).write_text("{}\n", encoding="utf-8")


def test_there_are_ten_pairs_of_three_tools() -> None:
    assert len(THEIRS) == len(OURS) == 10
    assert [block in THEIRS for block in BLOCKS] == [True, False] * 10
    titles = re.findall(r"^### (\d+)\. \S", PAGE, re.MULTILINE)
    assert [int(number) for number in titles] == list(range(1, 11))
    for tool in ("axolotl", "LLaMA-Factory", "TRL"):
        assert sum(block.startswith(f"# {tool}: ") for block in THEIRS) >= 3


@pytest.mark.parametrize("block", OURS, ids=range(1, len(OURS) + 1))
def test_our_side_is_a_recipe(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "folora_q.recipe.resolve.find_spec", lambda name: object()
    )  # trackers need not be installed here
    make_data(tmp_path, yaml.safe_load(block))
    path = tmp_path / "recipe.yaml"
    path.write_text(block, encoding="utf-8")
    assert isinstance(load_recipe(path), Recipe)


@pytest.mark.parametrize("block", THEIRS, ids=first_line)
def test_every_word_of_theirs_is_ours_or_has_a_hint(block: str) -> None:
    assert unexplained(words_of(yaml.safe_load(block))) == []


def test_the_list_of_words_has_rows_of_real_ones() -> None:
    rows = [row.split(" | ") for row in TABLE]
    assert len(rows) > 20
    for ours, *theirs in rows:
        for word in backticked(ours):
            section, _, key = word.rpartition(".")
            assert key in (SECTIONS[section].model_fields if section else Source.model_fields), word
        assert unexplained([word for cell in theirs for word in backticked(cell)]) == []


def test_template_names_exist() -> None:
    from folora_q.data.templates import template_names

    for block in OURS:
        name = yaml.safe_load(block)["data"].get("chat_template")
        assert name is None or name in template_names()
