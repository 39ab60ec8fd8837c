"""Five shapes, found from a row's columns; what they become, and what they refuse, naming the field."""

from __future__ import annotations

from typing import Any

import pytest

from folora_q.data.examples import Chat, Completion, Example, Text, content_of
from folora_q.data.formats import FORMATS, detect_format, to_example
from folora_q.data.rows import Row, RowError
from folora_q.recipe.dataset import Source
from tests.data.rows import assistant, user

HERE = "rows.jsonl line 7"
CHAT = [user("hi"), assistant("yo")]
SYSTEM = {"role": "system", "content": "be brief"}
LETTERS = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def parse(values: dict[str, Any], **more: Any) -> Example:
    row, source = Row(HERE, values), Source(path="rows.jsonl", **more)
    return to_example(row, detect_format(row, source), source)


def chat(*messages: dict[str, str], context: int = 0) -> Chat:
    return Chat(HERE, list(messages), context)


def turns(letters: str) -> list[dict[str, str]]:
    return [{"role": LETTERS[letter], "content": f"{letter}{index}"} for index, letter in enumerate(letters)]


@pytest.mark.parametrize(
    ("values", "example"),
    [
        ({"messages": [SYSTEM, *CHAT]}, chat(SYSTEM, *CHAT)),
        ({"conversations": CHAT}, chat(*CHAT)),
        (
            {
                "conversations": [
                    {"from": "system", "value": "be brief"},
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "yo", "weight": 1},
                ]
            },
            chat(SYSTEM, *CHAT),
        ),
        ({"instruction": "hi", "output": "yo"}, chat(*CHAT)),
        ({"instruction": "add", "input": "1 2", "output": " 3"}, chat(user("add\n\n1 2"), assistant(" 3"))),
        ({"instruction": "hi", "input": " \n", "output": "yo", "system": "be brief"}, chat(SYSTEM, *CHAT)),
        ({"prompt": " 2+2= ", "completion": " 4\n"}, Completion(HERE, " 2+2= ", " 4\n")),
        ({"prompt": [SYSTEM, user("hi")], "completion": [assistant("yo")]}, chat(SYSTEM, *CHAT, context=2)),
        ({"text": " a\nb "}, Text(HERE, " a\nb ")),
        # An OpenAI content in parts.
        (
            {
                "messages": [
                    {
                        "role": "developer",
                        "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}],
                    },
                    user("hi"),
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "text": "yo"}],
                        "tool_calls": [],
                        "refusal": None,
                    },
                ]
            },
            chat(SYSTEM, *CHAT),
        ),
        # Other columns may be there, of whatever kind.
        ({"id": 1, "text": "a", "meta": {"x": None}, "label": None}, Text(HERE, "a")),
    ],
)
def test_the_shape_is_found_from_the_columns(values: dict[str, Any], example: Example) -> None:
    assert parse(values) == example


@pytest.mark.parametrize(
    ("values", "example"),
    [
        ({"instruction": "hi", "input": None, "output": "yo", "system": None}, chat(*CHAT)),
        (
            {
                "messages": [
                    {"role": "user", "content": "hi", "from": None, "value": None, "tool_calls": None, "name": None},
                    {"role": None, "content": None, "from": "gpt", "value": "yo", "tool_calls": None, "name": None},
                ]
            },
            chat(*CHAT),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "hi", "image_url": None}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "yo", "image_url": None}]},
                ]
            },
            chat(*CHAT),
        ),
    ],
    ids=["columns", "keys of a turn", "keys of a part"],
)
def test_nulls_that_parquet_fills_in_are_ignored(values: dict[str, Any], example: Example) -> None:
    assert parse(values) == example


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        ("messages prompt completion text conversations instruction output", "messages"),
        ("messages prompt", "messages"),
        ("conversations prompt completion instruction output text", "sharegpt"),
        ("instruction input output text", "alpaca"),
        ("instruction output prompt completion text", "prompt_completion"),
        ("prompt text", "text"),
        ("text id instruction", "text"),
    ],
)
def test_of_several_shapes_the_one_that_says_more_is_taken(columns: str, shape: str) -> None:
    assert detect_format(Row(HERE, dict.fromkeys(columns.split())), Source(path="x")) == shape


def test_every_shape_has_columns_and_a_parser_and_can_be_named() -> None:
    named = Source.model_json_schema()["properties"]["shape"]["enum"]
    assert {*FORMATS, "auto"} == set(named)


@pytest.mark.parametrize(
    ("shape", "example"),
    [
        ("text", Text(HERE, "t")),
        ("prompt_completion", Completion(HERE, "p", "c")),
        ("alpaca", chat(user("i\n\nn"), assistant("o"))),
        ("messages", chat(*CHAT)),
    ],
)
def test_a_shape_that_is_named_is_taken(shape: str, example: Example) -> None:
    values = {"text": "t", "prompt": "p", "completion": "c", "instruction": "i", "input": "n", "output": "o"}
    assert parse({**values, "messages": CHAT}, shape=shape) == example


@pytest.mark.parametrize(
    ("values", "fields", "roles", "example"),
    [
        (
            {"question": "q", "answer": "a", "id": 1},
            {"prompt": "question", "completion": "answer"},
            {},
            Completion(HERE, "q", "a"),
        ),
        (
            {"instruction": "i", "context": "c", "response": "r", "category": "qa"},
            {"input": "context", "output": "response"},
            {},
            chat(user("i\n\nc"), assistant("r")),
        ),
        (
            {"input": "q", "output": "a"},
            {"instruction": "input", "output": "output"},
            {},
            chat(user("q"), assistant("a")),
        ),
        (
            {"output": "q", "input": "a"},
            {"instruction": "output", "output": "input"},
            {},
            chat(user("q"), assistant("a")),
        ),
        ({"text": "q", "label": "a"}, {"prompt": "text", "completion": "label"}, {}, Completion(HERE, "q", "a")),
        ({"text": "title", "body": "b"}, {"text": "body"}, {}, Text(HERE, "b")),
        (
            {"dialog": [{"speaker": "customer", "utterance": "hi"}, {"speaker": "bot", "utterance": "yo"}]},
            {"messages": "dialog", "role": "speaker", "content": "utterance"},
            {"customer": "user"},
            chat(*CHAT),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "x", "text": "hi"},
                    {"role": "gpt", "content": "x", "text": "yo"},
                ]
            },
            {"content": "text"},
            {},
            chat(*CHAT),
        ),
        ({"messages": [assistant("hi"), user("yo")]}, {}, {"assistant": "user", "user": "assistant"}, chat(*CHAT)),
        (
            {"sys": "be brief", "instruction": "hi", "output": "yo"},
            {"system": "sys"},
            {},
            chat(SYSTEM, *CHAT),
        ),
    ],
)
def test_columns_and_roles_may_have_other_names(
    values: dict[str, Any], fields: dict[str, str], roles: dict[str, str], example: Example
) -> None:
    assert parse(values, fields=fields, roles=roles) == example


def test_a_mapping_counts_more_than_a_column_that_nobody_mapped() -> None:
    values = {"messages": CHAT, "question": "q", "answer": "a"}
    assert parse(values, fields={"prompt": "question", "completion": "answer"}) == Completion(HERE, "q", "a")


@pytest.mark.parametrize("letters", ["ua", "sua", "uaua", "uau", "suau", "uata", "uatta", "uatua", "uat"])
def test_orders_of_turns_that_chat_templates_take(letters: str) -> None:
    assert parse({"messages": turns(letters)}) == chat(*turns(letters))


@pytest.mark.parametrize(
    ("letters", "message"),
    [
        ("au", "roles out of order: `messages[0]` is an assistant turn before any user turn"),
        ("sau", "roles out of order: `messages[1]` is an assistant turn before any user turn"),
        ("uua", "roles out of order: `messages[1]` is a second user turn in a row"),
        ("uauaa", "roles out of order: `messages[4]` is a second assistant turn in a row"),
        ("usa", "roles out of order: `messages[1]` is a system turn, not at the beginning"),
        ("ssua", "roles out of order: `messages[1]` is a system turn, not at the beginning"),
        ("tua", "roles out of order: `messages[0]` is a tool turn, but nothing called it"),
        ("uta", "roles out of order: `messages[1]` is a tool turn, but nothing called it"),
        ("stua", "roles out of order: `messages[1]` is a tool turn, but nothing called it"),
        ("u", "`messages` has no assistant turn, so there is nothing to train"),
        ("sut", "`messages` has no assistant turn, so there is nothing to train"),
    ],
)
def test_orders_of_turns_that_they_do_not(letters: str, message: str) -> None:
    with pytest.raises(RowError) as caught:
        parse({"messages": turns(letters)})
    assert caught.value.reason == message


def second(turn: Any) -> dict[str, Any]:
    return {"messages": [user("hi"), turn]}


@pytest.mark.parametrize(
    ("values", "more", "message"),
    [
        (second({"role": "assistant", "content": None}), {}, "`messages[1].content` is null"),
        (second({"role": "assistant"}), {}, "`messages[1]` has no `content`"),
        (second({"content": "yo"}), {}, "`messages[1]` has no `role`"),
        (second({"role": None, "content": "yo"}), {}, "`messages[1].role` is null"),
        (second({"from": None, "value": "yo"}), {}, "`messages[1].from` is null"),
        (second({"role": "assistant", "value": None}), {}, "`messages[1].value` is null"),
        (second({"role": "robot", "content": "yo"}), {}, "`messages[1]` has the role 'robot', which is unknown"),
        (second({"role": ["user"], "content": "yo"}), {}, "`messages[1]` has the role \"['user']\", which is unknown"),
        (second({"role": "x" * 99, "content": "y"}), {}, f"`messages[1]` has the role '{'x' * 40}', which is unknown"),
        (second(assistant("")), {}, "the content of the assistant turn `messages[1]` is empty"),
        (second(assistant(" \n")), {}, "the content of the assistant turn `messages[1]` is"),
        (second({"role": "assistant", "content": []}), {}, "the content of the assistant turn `messages[1]`"),
        (second({"role": "assistant", "content": 5}), {}, "the content of `messages[1]` must be text, not a number"),
        (second({"role": "assistant", "content": {}}), {}, "the content of `messages[1]` must be text, not an object"),
        (
            second({"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
            {},
            "the content of `messages[1]` has image in it; only text can be trained",
        ),
        (
            second({"role": "assistant", "content": ["yo"]}),
            {},
            "the content of `messages[1]` has parts other than text",
        ),
        (
            second({**assistant("yo"), "tool_calls": [{"function": {"arguments": "{}"}}]}),
            {},
            "`messages[1].tool_calls[0]` must be a call with a `name` and `arguments`",
        ),
        (second("yo"), {}, "`messages[1]` must have a role and a content, but is text"),
        (second(None), {}, "`messages[1]` must have a role and a content, but is null"),
        ({"messages": []}, {}, "`messages` must be a list of turns, not an empty list"),
        ({"messages": None}, {}, "`messages` must be a list of turns, not null"),
        ({"messages": "hi"}, {}, "`messages` must be a list of turns, not text"),
        ({"conversations": {"from": "human"}}, {}, "`conversations` must be a list of turns, not an object"),
        ({"conversations": [user("hi"), {"from": "gpt"}]}, {}, "`conversations[1]` has no `content`"),
        ({"dialog": [user("hi")]}, {"fields": {"messages": "dialog"}}, "`dialog` has no assistant turn"),
        ({"messages": CHAT}, {"fields": {"role": "speaker"}}, "`messages[0]` has no `speaker`"),
        (
            {"messages": CHAT},
            {"fields": {"messages": "dialog"}},
            "the column `dialog` is missing; the columns are messages",
        ),
        ({"instruction": None, "output": "o"}, {}, "`instruction` must be text, not null"),
        ({"instruction": "", "output": "o"}, {}, "`instruction` is empty"),
        ({"instruction": "i", "output": " "}, {}, "`output` is empty"),
        ({"instruction": "i", "output": 3.5}, {}, "`output` must be text, not a number"),
        ({"instruction": "i", "input": ["x"], "output": "o"}, {}, "`input` must be text, not a list"),
        ({"instruction": "i", "output": "o", "system": True}, {}, "`system` must be text, not true or false"),
        ({"prompt": "p", "completion": None}, {}, "`completion` must be text, not null"),
        ({"prompt": " ", "completion": "c"}, {}, "`prompt` is empty"),
        ({"prompt": [user("p")], "completion": "c"}, {}, "`completion` must be a list of turns, not text"),
        ({"prompt": "p", "completion": CHAT}, {}, "`prompt` must be a list of turns, not text"),
        ({"prompt": [], "completion": CHAT}, {}, "`prompt` must be a list of turns, not an empty list"),
        (
            {"prompt": CHAT, "completion": [user("more")]},
            {},
            "the assistant says nothing in `completion`, so there is nothing to learn",
        ),
        (
            {"prompt": CHAT, "completion": [assistant("more")]},
            {},
            "roles out of order: `prompt + completion[2]` is a second assistant turn in a row",
        ),
        (
            {"q": "p", "a": 5},
            {"fields": {"prompt": "q", "completion": "a"}},
            "`a` must be text, not a number",
        ),
        ({"text": None}, {}, "`text` must be text, not null"),
        ({"text": ["a"]}, {}, "`text` must be text, not a list"),
        ({"text": "\n"}, {}, "`text` is empty"),
        (
            {"prompt": "p", "completion": "c"},
            {"fields": {"prompt": "question"}},
            "the column `question` is missing; the columns are completion, prompt",
        ),
        ({"text": "t"}, {"shape": "alpaca"}, "the column `instruction` is missing; the columns are text"),
        (
            {"input": "q", "output": "a"},
            {"shape": "text", "fields": {"prompt": "input"}},
            "the column `text` is missing; the columns are input, output",
        ),
        ({}, {"shape": "text"}, "the column `text` is missing; the columns are none"),
    ],
)
def test_what_cannot_be_used_is_refused_by_place_and_field(
    values: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(RowError) as caught:
        parse(values, **more)
    assert caught.value.reason.startswith(message)
    assert caught.value.message.startswith(f"{HERE}: {message}") and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("values", "there"),
    [
        ({"question": "q", "answer": "a"}, "answer, question"),
        ({"prompt": "p"}, "prompt"),
        ({"instruction": "i", "response": "r"}, "instruction, response"),
        ({}, "none"),
        ({f"c{number}": 1 for number in range(20)}, "c0, c1, c10, c11, c12, c13, c14, c15"),
    ],
)
def test_columns_of_no_known_shape_are_told_with_what_to_do(values: dict[str, Any], there: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(values)
    assert caught.value.reason == f"its columns ({there}) match no known format"
    assert caught.value.hint is not None and "fields: {" in caught.value.hint


def test_of_a_name_that_is_a_document_no_more_than_its_beginning_is_told() -> None:
    # A table without a header has its first row's texts for names.
    for more in ({}, {"shape": "text"}):
        with pytest.raises(RowError) as caught:
            parse({"x" * 50_000: "answer"}, **more)
        assert len(caught.value.message) < 1000


def test_an_unknown_role_is_told_with_the_known_ones_and_how_to_name_it() -> None:
    with pytest.raises(RowError) as caught:
        parse({"messages": [{"role": "customer", "content": "hi"}]}, roles={"agent": "assistant"})
    assert caught.value.hint is not None
    assert "human" in caught.value.hint and "agent" in caught.value.hint and "roles: {" in caught.value.hint


def test_the_reference_is_the_last_thing_that_the_assistant_says() -> None:
    example = parse({"messages": turns("suauau")})
    assert isinstance(example, Chat)
    assert (example.prompt, example.reference) == (turns("suauau")[:4], "a4")
    completion = parse({"prompt": "p", "completion": "c"})
    assert isinstance(completion, Completion) and completion.reference == "c"


def test_examples_are_equal_in_content_when_they_teach_the_same() -> None:
    different = [
        Completion("a", "x", "yz"),
        Completion("a", "xy", "z"),
        Text("a", "x"),
        Text("a", "xyz"),
        Chat("a", CHAT),
        Chat("a", CHAT, context=1),
        Chat("a", [user("yo"), assistant("hi")]),
    ]
    assert len({content_of(example) for example in different}) == len(different)
    assert content_of(Chat("a", CHAT)) == content_of(Chat("b", [dict(turn) for turn in CHAT]))
