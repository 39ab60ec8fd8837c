"""YAML 1.2 as people mean it, with the line of every key, and no way to build an object or to blow up."""

from __future__ import annotations

import math
from typing import Any

import pytest

from folora_q.recipe.strict_yaml import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("+3", 3),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("1:30", "1:30"),
        ("on", "on"),
        ("no", "no"),
        ("yes", "yes"),
        ("True", True),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("[1, a]", [1, "a"]),
        ("{1: 2}", {"1": 2}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
    ],
)
def test_values_are_what_they_look_like(text: str, value: Any) -> None:
    assert parse_yaml(text)[0] == value
    assert type(parse_yaml(text)[0]) is type(value)


def test_every_key_and_item_has_its_line() -> None:
    _, lines = parse_yaml("a: 1\n\nb:\n  - x\n  - c: 2\n    d: [\n      3]\n")
    assert lines == {
        ("a",): 1,
        ("b",): 3,
        ("b", 0): 4,
        ("b", 1): 5,
        ("b", 1, "c"): 5,
        ("b", 1, "d"): 6,
        ("b", 1, "d", 0): 7,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", r"the key 'a' appears twice \(line 2, column 1\)"),
        ("a:\n  b: 1\n  b: 2", r"the key 'b' appears twice \(line 3"),
        ("? [a]\n: 1", "a key must be a word"),
        ("a: &x [1]\nb: *x", r"aliases are not allowed in a recipe; quote a value with a \* \(line 2"),
        ("&a [*a]", "aliases"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("a: *.csv", r"begins with \* must be in quotes \(line 1"),
        ("a: !!int x", "does not fit its tag"),
        ("a: !!timestamp x", "could not determine a constructor"),
        ("a: !!timestamp 2001-01-01", "could not determine a constructor"),
        ("a: !!binary aGk=", "could not determine a constructor"),
        ("a: !!set {x, y}", "could not determine a constructor"),
        ("!!omap [a: 1]", "could not determine a constructor"),
        ("!!python/object/new:os.system [x]", "could not determine a constructor"),
        ("!!map [a]", "does not fit its tag"),
        ("a: [", r"\(line 1, column 5\)"),
        ("a: 1\n\tb: 2", "line 2"),
        ("--- a\n--- b", "another document"),
        ("\x00", "special characters are not allowed"),
        ("[" * 5000, "nested too deeply"),
        ("{a: " * 5000, "nested too deeply"),
        ("9" * 5000, "does not fit its tag"),
    ],
)
def test_everything_else_is_one_line_that_names_the_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_a_bomb_of_aliases_does_not_go_off() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    with pytest.raises(ValueError, match="aliases"):
        parse_yaml(bomb)
