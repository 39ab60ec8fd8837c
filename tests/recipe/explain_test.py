"""Every key is explained from the schema, and a misspelt one is answered with the nearest."""

from __future__ import annotations

import pytest

from folora_q.errors import UserError
from folora_q.recipe import Recipe
from folora_q.recipe.dataset import Source
from folora_q.recipe.explain import KeyFacts, SectionFacts, explain, sections
from folora_q.recipe.schema import LoggingSection


def key(name: str) -> KeyFacts:
    found = explain(name)
    assert isinstance(found, KeyFacts)
    return found


def test_every_section_and_every_key_is_explained() -> None:
    found = sections()
    assert [section.name for section in found] == list(Recipe.model_fields)
    for section in found:
        assert explain(section.name) == section
        assert section.text
        for facts in section.keys:
            assert key(facts.name) == facts
            assert facts.text and facts.kind, facts.name
    [data] = [section for section in found if section.name == "data"]
    assert [facts.name.partition(".")[2] for facts in data.keys if facts.of_source] == list(Source.model_fields)


@pytest.mark.parametrize(
    ("name", "kind", "default", "choices"),
    [
        ("training.learning_rate", "number above 0", "0.002", ()),
        ("training.max_length", "integer at least 16", "1024", ()),
        ("evaluation.max_kl", "number above 0", "null", ()),
        ("proxy.public_share", "number at least 0 and below 1", "0.3", ()),
        ("training.seed", "integer at least 0 and at most 4294967295", "0", ()),
        ("training.output_dir", "text", None, ()),
        ("data.overlong", "drop, truncate, split, raise", "drop", ("drop", "truncate", "split", "raise")),
        ("training.activation_checkpointing", "auto or true or false", "auto", ()),
        ("data.eval_dataset", "list of source", "null", ()),
    ],
)
def test_type_limits_default_and_choices(name: str, kind: str, default: str | None, choices: tuple[str, ...]) -> None:
    found = key(name)
    assert (found.kind, found.default, found.choices) == (kind, default, choices)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("learning_rate", "training.learning_rate"),
        ("fields", "data.fields"),
        ("data.train_dataset.fields", "data.fields"),
    ],
)
def test_a_key_may_come_without_its_section_and_with_its_source(name: str, full: str) -> None:
    assert key(name).name == full


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("training.lerning_rate", "did you mean `training.learning_rate`?"),
        ("trainin.learning_rate", "did you mean `training.learning_rate`?"),
        ("gate.max_length", "did you mean `training.max_length`?"),
        ("traning", "did you mean `training`?"),
        ("lr", "folora-q calls it `training.learning_rate`"),
        ("load_in_4bit", "the base is always loaded in 4 bits"),
        ("seed", "`seed` could be proxy.seed or training.seed"),
        ("quux", "there is no key `quux`"),
    ],
)
def test_what_is_unknown_is_answered_with_what_was_meant(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        explain(name)
    assert message in caught.value.message


def test_a_section_is_described_by_its_docstring() -> None:
    found = explain("logging")
    assert isinstance(found, SectionFacts)
    assert found.text == LoggingSection.__doc__
