"""Wrong values are described in words, never in pydantic's, and with the number that was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from folora_q.errors import UserError
from folora_q.recipe import load_recipe
from folora_q.recipe.findings import setting_for

MINIMAL = "model: {model_name_or_path: org/model}\ndata: {train_dataset: org/rows}\ntraining:\n  output_dir: run\n"


def refusal(tmp_path: Path, *overrides: str) -> UserError:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return caught.value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate=0,002", "must be a number, not '0,002'; did you mean 0.002?"),
        ("training.learning_rate=2e-3x", "must be a number, not '2e-3x'; did you mean 0.002?"),
        ("training.learning_rate=high", "must be a number, not 'high' ("),
        ("training.learning_rate=null", "must be a number, not null"),
        ("training.learning_rate=-1", "must be above 0, not -1"),
        ("training.warmup_steps=5%", "must be a number, not '5%'; did you mean 0.05?"),
        ("training.max_length=1,000", "must be an integer, not '1,000'; did you mean 1000?"),
        ("training.max_length=2k", "must be an integer, not '2k'; did you mean 2000?"),
        ("training.max_length=1.5", "must be an integer, not 1.5 ("),
        ("training.max_length=8", "must be at least 16, not 8"),
        ("data.eval_size=0", "must be above 0, not 0: some rows must be held out"),
        ("evaluation.steps=0", "must be at least 1, not 0: leave it out"),
        ("training.packing=perhaps", "must be true or false, not 'perhaps'"),
        ("training.activation_checkpointing=perhaps", "must be auto or true or false, not 'perhaps' ("),
        ("adapter.target_modules=q_proj", "names go in a list: [q_proj]"),
        ("data.train_dataset={path: ''}", "is empty"),
        ("model.revision=[a]", "must be text, not ['a']"),
        ("training=output_dir:x", "put a space after the colon"),
    ],
)
def test_a_wrong_value_is_described_in_words(tmp_path: Path, override: str, message: str) -> None:
    error = refusal(tmp_path, override)
    assert message in error.message and f"(override {override!r})" in error.message
    for inside in ("input should", "literal[", "list[str]", "parse string"):
        assert inside not in error.message
    assert error.message.count("\n") == 0


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["training.max_length=x"], "`folora-q explain training.max_length` says what it accepts"),
        (["training.max_length=x", "training.seed=x"], "`folora-q explain training` lists its keys"),
        (["training.max_lenght=1"], "`folora-q explain training` lists its keys"),
        (["training.max_length=x", "gate.rule=x"], "`folora-q explain` lists the sections and keys of a recipe"),
        (["data.train_dataset={path: a, weight: x}"], "`folora-q explain data.train_dataset` says what it accepts"),
    ],
)
def test_the_hint_is_the_command_that_explains_the_key(tmp_path: Path, overrides: list[str], hint: str) -> None:
    assert refusal(tmp_path, *overrides).hint == hint


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("--learning_rate", "training.learning_rate"),
        ("--learning-rate", "training.learning_rate"),
        ("--training.learning_rate", "training.learning_rate"),
        ("--lr", "training.learning_rate"),
        ("--max_seq_length", "training.max_length"),
        ("--seed", None),
        ("--load_in_4bit", None),
        ("--quux", None),
        ("--training.quux", None),
    ],
)
def test_options_of_other_tools_stand_for_keys(word: str, key: str | None) -> None:
    assert setting_for(word) == key
