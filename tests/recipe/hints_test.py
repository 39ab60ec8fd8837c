"""The words of other tools lead to keys that there are."""

from __future__ import annotations

import re

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from folora_q.recipe import Recipe
from folora_q.recipe.dataset import Source
from folora_q.recipe.hints import FOREIGN_WORDS
from folora_q.recipe.schema import Tracker
from folora_q.recipe.training import Optimizer, Scheduler

SECTIONS = {name: set(section.annotation.model_fields) for name, section in Recipe.model_fields.items()}


@pytest.mark.parametrize("word", FOREIGN_WORDS)
def test_every_hint_names_only_keys_that_exist(word: str) -> None:
    hint = FOREIGN_WORDS[word]
    for section, key in re.findall(r"\b([a-z]+)\.([a-z_0-9]+)\b", hint):
        if section in SECTIONS:
            assert key in SECTIONS[section], hint
    for key in re.findall(r"\{path: \.\.\., (\w+):", hint):
        assert key in Source.model_fields
    assert not re.search(r"(?<!\.\.)\.$", hint), "no full stop"


def test_no_word_of_ours_is_foreign_in_its_own_section() -> None:
    for section, keys in SECTIONS.items():
        for key in keys & FOREIGN_WORDS.keys():
            assert not FOREIGN_WORDS[key].startswith(f"{section}.{key}"), key


def test_names_that_stand_for_transformers_are_transformers() -> None:
    assert set(Optimizer.__args__) - {"auto"} <= {name.value for name in OptimizerNames}
    assert set(Scheduler.__args__) <= {name.value for name in SchedulerType}
    assert set(Tracker.__args__) <= set(INTEGRATION_TO_CALLBACK)
