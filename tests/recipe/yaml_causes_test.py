"""An error in YAML names the line with the mistake, shows it, and says how to correct it."""

from __future__ import annotations

import pytest

from folora_q.recipe.strict_yaml import parse_yaml
from folora_q.recipe.yaml_causes import YamlError

GOOD = """\
model:
  model_name_or_path: x

data:
  train_dataset: a.jsonl
  eval_size: 6

training:
  output_dir: runs/a
  learning_rate: 2e-3
  max_length: 128
"""

# What to replace in the good text, the line with the mistake, and what is said about it.
CASES = {
    "first key too deep": ("  train_dataset", "   train_dataset", 5, "indented by 3 spaces, but the other keys"),
    "last key too deep": ("  max_length", "    max_length", 11, "indented by 4 spaces, but the other keys"),
    "middle key too deep": ("  learning_rate", "   learning_rate", 10, "indented by 3 spaces"),
    "key too shallow": ("  learning_rate", " learning_rate", 10, "indented by 1 space,"),
    "key not indented": ("  learning_rate", "learning_rate", 10, "the line is not indented, but the other keys"),
    "tab": ("  train_dataset", "\ttrain_dataset", 5, "indented with a tab"),
    "tab after spaces": ("  eval_size", "  \teval_size", 6, "indented with a tab"),
    "no space after the colon": ("eval_size: 6", "eval_size:6", 6, "a space is missing after the colon"),
    "no space, first key": ("output_dir: runs/a", "output_dir:runs", 9, "a space is missing after the colon"),
    "no colon": ("learning_rate: 2e-3", "learning_rate 2e-3", 10, "no colon after its key"),
    "section without a colon": ("data:", "data", 4, "no colon after its key"),
    "colon in a value": ("runs/a", "a: b", 9, "a value contains a colon"),
    "quote": ("runs/a", '"runs/a', 9, "a quote is opened here and not closed"),
    "backslash": ("runs/a", '"C:\\data\\x"', 9, "a backslash has a meaning of its own"),
    "bracket": ("a.jsonl", "[a.jsonl, b.jsonl", 5, "a [ is not closed"),
    "brace": ("a.jsonl", "{path: a.jsonl", 5, "a { is not closed"),
    "at sign": ("a.jsonl", "@a.jsonl", 5, "begins with @ must be in quotes"),
    "percent sign": ("a.jsonl", "%a", 5, "begins with % must be in quotes"),
    "glob": ("a.jsonl", "*.jsonl", 5, "begins with * must be in quotes"),
}


def test_the_text_is_good_otherwise() -> None:
    assert parse_yaml(GOOD)[0]["training"]["max_length"] == 128


@pytest.mark.parametrize("case", CASES)
def test_the_line_with_the_mistake_is_named_and_shown(case: str) -> None:
    old, new, line, message = CASES[case]
    text = GOOD.replace(old, new)
    with pytest.raises(YamlError) as caught:
        parse_yaml(text)
    error = caught.value
    assert message in str(error) and f"(line {line}, column " in str(error)
    assert "\n" not in str(error)
    assert error.line == line
    assert error.quoted == f"{error}\n       {line} | {text.splitlines()[line - 1].expandtabs(4)}"
    assert error.hint or "must be in quotes" in message or "not closed" in message
