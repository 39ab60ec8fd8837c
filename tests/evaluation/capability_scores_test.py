"""Capabilities: each has facts, prompts, a scorer and a line in the docs, and scores good answers above bad ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

import folora_q
from folora_q.data.call_syntax import call_syntax, fits
from folora_q.data.capability_prompts import FOLDER, GENERATORS, Ask, packaged_tools, prompts_of
from folora_q.data.rendering import Renderer
from folora_q.data.thoughts import Said
from folora_q.evaluation.capability_scores import CHECKS, SCORERS, UNMARKED_CALL, KeptAnswer
from folora_q.evaluation.languages import WORDS, language_of
from folora_q.recipe.capabilities import CAPABILITIES, MIN_HELD_OUT, CapabilityName
from folora_q.recipe.keep import KeepSection
from tests.data.chats import TEMPLATES, tokenizer_for

DOCS = Path(folora_q.__file__).parent.parent / "docs" / "keep.md"
# By capability: a good and a bad answer to each of two prompts that it has.
ANSWERS: dict[CapabilityName, list[tuple[int, str, str]]] = {
    "refusals": [
        (0, "I'm sorry, but I can't help with that.", "Sure! First, take a bottle."),
        (3, "I won't write that program.", "Here is a program that I can write for you."),
    ],
    "code": [
        (
            0,
            "Sure:\n```python\ndef add_all(numbers):\n    return sum(numbers)\n```\nDone.",
            "```python\ndef add_all(\n```",
        ),
        (2, "def is_even(n):\n    return n % 2 == 0", "```python\ndef odd(n):\n    return n % 2\n```"),
    ],
    "arithmetic": [(0, "126", "125"), (2, "The answer is 219.", "")],
    "languages": [
        (0, "Das Wetter ist kurzfristig, das Klima ist der Durchschnitt von vielen Jahren.", "The weather is short."),
        (12, "El mar es salado por las sales de los ríos.", "海水含有盐分。"),
    ],
    "instructions": [
        (0, "bees make honey. they live in hives.", "Bees make honey."),
        (18, '{"topic": "bees", "fact": "They dance."}', '{"topic": "bees"}'),
    ],
    "thinking": [],  # below: they depend on the template
    "tools": [],
}


def scored(name: CapabilityName, ask: Ask, answer: str, thought: str = "") -> float:
    return SCORERS[name](KeptAnswer(ask, Said(answer, thought), answer))


@pytest.mark.parametrize("name", get_args(CapabilityName))
def test_a_capability_has_everything(name: CapabilityName) -> None:
    facts = CAPABILITIES[name]
    assert name in SCORERS and name in ANSWERS
    assert (FOLDER / f"{name}.jsonl").is_file() != (name in GENERATORS)
    prompts = [str(ask.messages) for ask in prompts_of(name)]
    assert len(prompts) == len(set(prompts)) >= 2 * MIN_HELD_OUT
    [row] = re.findall(rf"^\| `{name}` \| (\d+) .*\|$", DOCS.read_text("utf-8"), re.MULTILINE)
    assert int(row) == len(prompts)
    described = KeepSection.model_fields["capabilities"].description
    assert f"{name}: {facts.prompts} ({facts.metric})" in described
    assert all(ask.tools for ask in prompts_of(name)) == (facts.requires == "tools")


@pytest.mark.parametrize(("name", "answers"), ANSWERS.items())
def test_good_answers_score_one_and_bad_and_empty_ones_zero(
    name: CapabilityName, answers: list[tuple[int, str, str]]
) -> None:
    for number, good, bad in answers:
        ask = prompts_of(name)[number]
        assert [scored(name, ask, answer) for answer in (good, bad, "")] == [1, 0, 0], (ask, good)


def test_the_results_of_generated_calculations_are_right() -> None:
    for ask in prompts_of("arithmetic"):
        found = re.fullmatch(r"What is (\d+) ([+\-×÷]) (\d+)\?.*", ask.messages[0]["content"])
        first, sign, second = int(found[1]), found[2], int(found[3])
        result = {"+": first + second, "-": first - second, "×": first * second, "÷": first / second}[sign]
        assert ask.expected["number"] == result and result == int(result) >= 0


@pytest.mark.parametrize(
    ("expected", "good", "bad"),
    [
        ({"check": "lower_case"}, "bees fly.", "Bees fly."),
        ({"check": "upper_case"}, "BEES FLY.", "Bees FLY."),
        ({"check": "bullets", "count": 3}, "* a\n* b\n* c", "* a\n* b"),
        ({"check": "sentences", "count": 1}, "Bees fly over 3.5 km", "Bees fly. Ants walk."),
        ({"check": "without", "text": ","}, "Bees fly.", "Bees, wasps."),
        ({"check": "ends", "text": "That is all."}, "Bees fly. That is all.", "That is all. Really."),
        ({"check": "begins", "text": "Let me see."}, "Let me see. Bees fly.", "Bees. Let me see."),
        ({"check": "at_most_words", "count": 15}, "Bees fly.", "bee " * 16),
        ({"check": "contains", "text": "surprising"}, "Surprising bees.", "Bees."),
        ({"check": "json", "keys": ["topic", "fact"]}, '```json\n{"topic": 1, "fact": 2}\n```', "[1]"),
        ({"check": "quoted"}, '"Bees fly."', "Bees fly."),
        ({"check": "paragraphs", "count": 2}, "Bees.\n\nWasps.", "Bees.\nWasps."),
    ],
    ids=lambda value: value["check"] if isinstance(value, dict) else "",
)
def test_constraints(expected: dict[str, Any], good: str, bad: str) -> None:
    ask = Ask([{"role": "user", "content": "?"}], None, expected)
    assert [scored("instructions", ask, answer) for answer in (good, bad)] == [1, 0]


def test_every_check_has_a_prompt() -> None:
    assert {ask.expected["check"] for ask in prompts_of("instructions")} == set(CHECKS)


def test_code_of_any_kind_is_parsed_and_not_run(tmp_path: Path) -> None:
    ask = prompts_of("code")[0]
    target = tmp_path / "written"
    source = f"open({str(target)!r}, 'w')\ndef add_all(numbers):\n    return sum(numbers)"
    assert scored("code", ask, source) == 1 and not target.exists()
    for hostile in ("(" * 5000, "def add_all(): return '\\d' \0", "x = " + "-" * 20000 + "1", "\ud800"):
        assert scored("code", ask, hostile) == 0


@pytest.mark.parametrize("language", [*WORDS, "ru", "zh"])
def test_languages_are_told_apart(language: str) -> None:
    texts = {
        "en": "The sky is blue because the light of the sun is scattered by the air.",
        "de": "Der Himmel ist blau, weil das Licht der Sonne von der Luft gestreut wird.",
        "fr": "Le ciel est bleu parce que la lumière du soleil est diffusée par l'air.",
        "es": "El cielo es azul porque la luz del sol se dispersa en el aire.",
        "it": "Il cielo è blu perché la luce del sole è diffusa dall'aria.",
        "pt": "O céu é azul porque a luz do sol se espalha no ar e não na terra.",
        "nl": "De lucht is blauw omdat het licht van de zon door de lucht wordt verstrooid.",
        "ru": "Небо голубое, потому что свет рассеивается. Это эффект Rayleigh.",
        "zh": "天空是蓝色的，因为空气散射阳光（Rayleigh）。",
    }
    assert language_of(texts[language]) == language
    assert language_of("空は青いです。") == "other" and language_of("12, 13!") is None


CALLS = [
    ("get_weather", {"place": "Rome, old town", "day": "today"}),
    ("set_timer", {"minutes": 12, "label": "pasta"}),
    ("send_message", {"recipient": "Bo", "text": 'it\'s {late}: "now", ok'}),
]
WITH_CALLS = [name for name, text in TEMPLATES.items() if call_syntax(Renderer(tokenizer_for(text))) is not None]


def test_most_templates_with_tools_write_calls_that_are_understood() -> None:
    assert len(WITH_CALLS) >= 20 and {"qwen2_5", "qwen3", "llama3_1", "gptoss", "glm4moe", "gemma4"} <= set(WITH_CALLS)


@pytest.mark.parametrize("template", WITH_CALLS)
def test_what_a_template_writes_as_a_call_is_one(template: str) -> None:
    """The template itself is the reference: it renders a call, which must be found in its text."""
    renderer = Renderer(tokenizer_for(TEMPLATES[template]))
    syntax, tools = call_syntax(renderer), list(packaged_tools().values())
    for name, arguments in CALLS:
        call = {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        said = renderer.unchecked([{"role": "user", "content": "please"}], turn, tools).said
        ask = Ask([], tools)
        assert SCORERS["tools"](KeptAnswer(ask, Said(said), said, syntax)) == 1
        other = Ask([], [tool for tool in tools if tool["function"]["name"] != name])
        assert SCORERS["tools"](KeptAnswer(other, Said(said), said, syntax)) == 0
    plain = renderer.unchecked([{"role": "user", "content": "hi"}], {"role": "assistant", "content": "It is 3."}, tools)
    assert SCORERS["tools"](KeptAnswer(Ask([], tools), Said(plain.said), plain.said, syntax)) == 0


def test_a_call_without_its_marks_is_half_of_one() -> None:
    syntax = call_syntax(Renderer(tokenizer_for(TEMPLATES["qwen2_5"])))
    ask = prompts_of("tools")[0]
    good = '{"name": "get_weather", "arguments": {"place": "Lisbon"}}'
    said = {
        f"<tool_call>\n{good}\n</tool_call>": 1,
        f"```json\n{good}\n```": UNMARKED_CALL,
        '<tool_call>\n{"name": "get_weather", "arguments": {"town": "Lisbon"}}\n</tool_call>': 0,
        '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Lis': 0,
        '<tool_call>\n{"name": "open_door", "arguments": {}}\n</tool_call>': 0,
        "": 0,
    }
    assert {text: SCORERS["tools"](KeptAnswer(ask, Said(text), text, syntax)) for text in said} == said


def test_a_call_fits_with_its_required_arguments_only() -> None:
    syntax = call_syntax(Renderer(tokenizer_for(TEMPLATES["llama3_1"])))
    [call] = syntax.calls('{"name": "set_timer", "parameters": {"minutes": 3}}')
    assert call.marked and fits(call, [packaged_tools()["set_timer"]])
    [call] = syntax.calls('{"name": "set_timer", "parameters": {"label": "tea"}}')
    assert not fits(call, [packaged_tools()["set_timer"]])


def test_a_thought_must_be_closed_and_not_empty() -> None:
    ask = prompts_of("thinking")[0]
    assert [scored("thinking", ask, "13", thought) for thought in ("17 + 5 - 9", " ", "")] == [1, 0, 0]
