"""Names of files, models and texts in a card are text: they end neither its head nor a table, and are no markup."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from folora_q.export.card import _code, _text, write_card, write_merged_card
from folora_q.models.load import LoadedModel
from folora_q.models.quantization import Quantization
from folora_q.recipe.dataset import Source
from folora_q.recipe.schema import Recipe
from tests.report.run_folder import Shape, evaluation

TAG = "base_model:adapter:somebody/model"
NAMES = [
    "a\n---\nlicense: mit\n---\n# Owned",
    "`](javascript:alert(1)) <img src=x onerror=alert(1)>",
    "a | b | c",
    "```\nimport os\n```",
    '"); import os; os.system("true',
    "key: value # comment\x1b[31m",
]


def written(path: Path, name: str) -> str:
    recipe = Recipe.model_validate(
        {"model": {"model_name_or_path": name}, "data": {"train_dataset": "/x"}, "training": {"output_dir": "run"}}
    )
    sources = [Source(path=f"/data/{name.replace('/', ' ')}.jsonl")]
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_dataset": sources})})
    base = LoadedModel(None, None, name, "main", "f", 1, Quantization())  # type: ignore[arg-type]
    found = evaluation(path, Shape(layers=1))
    write_card(path, recipe, base, replace(found, texts=[replace(text, name=name) for text in found.texts]))
    return path.read_text("utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_in_a_card(name: str, tmp_path: Path) -> None:
    text = written(tmp_path / "README.md", name)
    plain = written(tmp_path / "plain.md", "somebody/model")
    _, head, body = text.split("---\n", 2)
    found, expected = yaml.safe_load(head), yaml.safe_load(plain.split("---\n", 2)[1])
    assert found == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "qlora", "folora-q"]}
    assert expected == {**found, "base_model": "somebody/model", "tags": [*found["tags"], TAG]}
    # Line by line it has the form of a card whose names are harmless, so none of them began a line or ended a table.
    lines, others = body.splitlines(), plain.split("---\n", 2)[2].splitlines()
    assert len(lines) == len(others)
    for line, other in zip(lines, others, strict=True):
        assert line[:2] == other[:2]
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == other.count("|")
    assert "\x1b" not in text and "\n# Owned" not in text
    call = next(line for line in lines if line.startswith("base = "))
    assert eval(call.removeprefix("base = AutoModelForCausalLM.from_pretrained"), {}) == name


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_in_a_merged_models_card(name: str, tmp_path: Path) -> None:
    report = {
        "base": name,
        "revision": name,
        "base_weights": "original",
        "dtype": "bfloat16",
        "adapters": [{"name": name, "weight": 1.0}],
        "verified": False,
        "failures": [name],
    }
    write_merged_card(tmp_path / "README.md", report)
    text = (tmp_path / "README.md").read_text("utf-8")
    head, body = text.split("---\n", 2)[1:]
    assert yaml.safe_load(head)["tags"] == ["folora-q", "lora", "merged"] and "base_model:" not in head
    assert len(body.splitlines()) == 11 and "\n# Owned" not in body and "\n```" not in body and "\x1b" not in text


def test_code_and_text_in_markdown() -> None:
    assert _code("a/b") == "`a/b`" and _code("a`b") == "``a`b``" and _code("`a") == "`` `a ``"
    assert _text("a_b <c> d|e") == "a\\_b \\<c\\> d\\|e" and _text("a\nb") == "a\\\\nb"
