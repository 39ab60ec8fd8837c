"""The generated tasks: every answer is checked by other code than that which wrote it."""

from __future__ import annotations

import ast
import json
import re
from fractions import Fraction
from math import gcd

import pytest

from benchmarks.frontier.__main__ import HERE, TASKS
from folora_q.recipe import load_recipe


def rows(name: str) -> list[tuple[str, str]]:
    lines = (HERE / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [tuple(turn["content"] for turn in json.loads(line)["messages"]) for line in lines]


@pytest.mark.parametrize("task", ["code", "mathematics", "constraints"])
def test_no_held_out_row_is_trained_on(task: str) -> None:
    train, heldout = rows(f"{task}-train"), rows(f"{task}-heldout")
    assert len(train) == len({prompt for prompt, _ in train}) == 400 and len(heldout) == 48
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in heldout}
    assert not {answer for _, answer in train} & {answer for _, answer in heldout if task != "mathematics"}


@pytest.mark.parametrize("half", ["train", "heldout"])
def test_code_is_the_function_that_the_prompt_names(half: str) -> None:
    for prompt, answer in rows(f"code-{half}"):
        (function,) = ast.parse(answer.removeprefix("```python\n").removesuffix("\n```")).body
        assert isinstance(function, ast.FunctionDef)
        assert f"`{function.name}({ast.unparse(function.args)})`" in prompt


def solved(question: str) -> Fraction:
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    if "greatest common divisor" in question:
        return Fraction(gcd(*numbers))
    if question.startswith("Solve"):
        a, b, c = numbers
        return Fraction(c - b, a)
    if "percent" in question:
        return Fraction(numbers[0] * numbers[1], 100)
    if "lowest terms" in question:
        return sum((Fraction(part) for part in re.findall(r"\d+(?:/\d+)?", question)), Fraction(0))
    if "change" in question:
        a, b, c, d, paid = numbers
        return Fraction(paid - a * b - c * d)
    return Fraction(numbers[0] * numbers[1])


@pytest.mark.parametrize("half", ["train", "heldout"])
def test_every_step_of_the_working_is_true_and_the_answer_right(half: str) -> None:
    for question, answer in rows(f"mathematics-{half}"):
        working, _, result = answer.rpartition("\nAnswer: ")
        assert Fraction(result) == solved(question), question
        for equation in working.split("; "):
            sides = [side for side in equation.split(" = ") if not re.fullmatch(r"\d*x", side)]
            values = {
                eval(side.replace("mod", "%"), {}) if "/" not in side else Fraction(eval_fraction(side))
                for side in sides
            }
            assert len(values) == 1, (question, equation)


def eval_fraction(text: str) -> Fraction:
    return eval(re.sub(r"\d+", lambda found: f"Fraction({found[0]})", text), {"Fraction": Fraction})


@pytest.mark.parametrize("half", ["train", "heldout"])
def test_constrained_answers_meet_their_constraints(half: str) -> None:
    for prompt, answer in rows(f"constraints-{half}"):
        given, says = re.fullmatch(r"Rewrite these words: (.+?)\. Write them (.+)\.", prompt).groups()
        given = given.split(", ")
        if "numbered list" in says:
            parts = [re.fullmatch(rf"{n}\. (.+)", line)[1] for n, line in enumerate(answer.split("\n"), 1)]
        elif "bullet" in says:
            parts = [line.removeprefix("- ") for line in answer.split("\n")]
        elif "semicolons" in says:
            parts = answer.split("; ")
        else:
            assert answer.startswith("Words: ") and answer.endswith(" END")
            parts = re.findall(r"\S+ \(\d+\)|\S+", answer)[1:-1]
        words = [re.sub(r" \(\d+\)$", "", part).strip('"').lower() for part in parts]
        assert set(words) <= set(given) and len(words) >= 2
        kept = [w for w in given if w in words]
        if "alphabetical" in says:
            assert words == sorted(words)
        elif "reverse" in says:
            assert words == kept[::-1]
        elif "shortest" in says:
            assert [len(w) for w in words] == sorted(len(w) for w in words)
        else:
            assert words == kept
        dropped = set(given) - set(words)
        if "six letters" in says:
            assert all(len(w) > 6 for w in words) and all(len(w) <= 6 for w in dropped)
        elif "letter a" in says:
            assert all("a" not in w for w in words) and all("a" in w for w in dropped)
        else:
            assert dropped == ({given[0]} if "without the first" in says else set())
        for part, word in zip(parts, words, strict=True):
            if "capital" in says:
                assert part == word.upper()
            elif "double quotes" in says:
                assert part == f'"{word}"'
            elif "number of letters" in says:
                assert part == f"{word} ({len(word)})"
            else:
                assert part == word


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_recipe_of_the_same_form(task: str) -> None:
    recipe = load_recipe(HERE / f"{task}.yaml")
    assert recipe.training.per_device_train_batch_size == 8
    assert recipe.proxy == load_recipe(HERE / f"{TASKS[0]}.yaml").proxy, "so all tasks share the generated text"
