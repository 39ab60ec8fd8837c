"""Keys that change what a row means: system, history, weights, thoughts, tools and their calls, images."""

from __future__ import annotations

import json
from typing import Any

import pytest

from folora_q.data.examples import Chat, Example
from folora_q.data.formats import detect_format, to_example
from folora_q.data.rows import Row, RowError
from folora_q.data.unused import filled_columns, unused_columns
from folora_q.recipe.dataset import Source
from tests.data.chats import CALL, RESULT, SYSTEM, TOOLS, encoder_for, learned, thinking
from tests.data.rows import assistant, user

HERE = "rows.jsonl line 7"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops earlier answers.
FORGETFUL = CHATML.replace(
    "{{ m['content'] }}", "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}"
)
ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}


def parse(values: dict[str, Any], **more: Any) -> Example:
    row, source = Row(HERE, values), Source(path="rows.jsonl", **more)
    return to_example(row, detect_format(row, source), source)


def messages_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    example = parse(values)
    assert isinstance(example, Chat)
    return example.messages


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(RowError) as caught:
        parse(values)
    return caught.value.reason


# Keys of a row.


def test_a_system_column_of_sharegpt_is_the_system_turn() -> None:
    row = {
        "conversations": [{"from": "human", "value": "order 1"}, {"from": "gpt", "value": "done 1"}],
        "system": "You are the pirate clerk.",
        "tools": "",
    }
    clerk = {"role": "system", "content": "You are the pirate clerk."}
    assert parse(row) == Chat(HERE, [clerk, user("order 1"), assistant("done 1")])


def test_a_system_column_beside_messages_is_the_system_turn_once() -> None:
    turns = [user("hi"), assistant("yo")]
    assert messages_of({"messages": turns, "system": "be curt"}) == [SYSTEM, *turns]
    assert messages_of({"messages": [SYSTEM, *turns], "system": " be curt\n"}) == [SYSTEM, *turns]
    assert messages_of({"messages": turns, "system": None}) == turns
    assert "two system prompts" in refusal({"messages": [SYSTEM, *turns], "system": "be verbose"})
    assert refusal({"messages": turns, "system": 5}) == "`system` must be text, not a number"


def test_the_history_of_an_alpaca_row_is_the_turns_before_it_and_is_learned() -> None:
    row = {
        "instruction": "and 1?",
        "input": "",
        "output": "answer 1",
        "system": "be curt",
        "history": [["first question 1", "first answer 1"]],
    }
    first, second = [user("first question 1"), assistant("first answer 1")], [user("and 1?"), assistant("answer 1")]
    assert parse(row) == Chat(HERE, [SYSTEM, *first, *second])
    encoder = encoder_for(CHATML)
    assert learned(encoder.tokenizer, encoder(parse(row))) == ["first answer 1<|im_end|>", "answer 1<|im_end|>"]


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        ("before", "`history` must be a list of pairs, not text"),
        ([["only a question"]], "`history[0]` must be a question and its answer, both text"),
        ([["q", "a"], ["q", None]], "`history[1]` must be a question and its answer, both text"),
        ([["q", " "]], "`history[0]` has an empty answer"),
    ],
)
def test_a_history_that_is_none_is_refused(history: Any, reason: str) -> None:
    assert refusal({"instruction": "i", "output": "o", "history": history}) == reason


@pytest.mark.parametrize("column", ["image", "images", "audio", "audios", "video", "videos"])
def test_rows_with_images_sound_or_video_are_refused(column: str) -> None:
    turns = [user("<image>what is this"), assistant("a cat")]
    for row in ({"messages": turns}, {"prompt": "p", "completion": "c"}, {"text": "t"}):
        assert refusal({**row, column: ["a.png"]}) == f"it has `{column}`, and only text can be trained"
        parse({**row, column: []})
        parse({**row, column: None})


@pytest.mark.parametrize(
    ("columns", "source", "unused"),
    [
        ("messages id source", {}, ["id", "source"]),
        ("messages conversations system tools", {}, ["conversations"]),
        ("conversations system tools", {}, []),
        ("instruction input output system history text", {}, ["text"]),
        ("prompt completion system", {}, ["system"]),
        ("text label", {}, ["label"]),
        ("dialog rules messages", {"fields": {"messages": "dialog", "system": "rules"}}, ["messages"]),
    ],
)
def test_columns_that_are_not_used_are_named(columns: str, source: dict[str, Any], unused: list[str]) -> None:
    named = Source(path="x", **source)
    row = Row(HERE, dict.fromkeys(columns.split(), "x"))
    assert unused_columns(row.values, detect_format(row, named), named) == unused


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_column_of_system_prompts_begins_the_conversation(column: str) -> None:
    for row in (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ok"}]},
        {"instruction": "hi", "output": "ok"},
    ):
        chat = parse({**row, column: "be a pirate"})
        assert isinstance(chat, Chat) and chat.messages[0] == {"role": "system", "content": "be a pirate"}
        assert column not in unused_columns(
            [*row, column], detect_format(Row(HERE, row), Source(path="x")), Source(path="x")
        )


@pytest.mark.parametrize("chosen", ["good", [user("hi"), assistant("good")]])
def test_preference_data_are_refused_unless_the_recipe_takes_the_chosen_answers(chosen: Any) -> None:
    row = {"prompt": "hi", "chosen": chosen, "rejected": "bad"}
    assert refusal(row).startswith("it has `chosen` and `rejected`: preference data")
    name = "completion" if isinstance(chosen, str) else "messages"
    assert parse(row, fields={name: "chosen"}).reference == "good"


def test_an_answer_that_kto_data_mark_as_bad_is_not_learned() -> None:
    row = {"prompt": "hi", "completion": "bad"}
    assert refusal({**row, "label": False}).startswith("its `label` is false")
    for label in (True, "negative", None):
        assert parse({**row, "label": label}).reference == "bad"


# Keys of a turn.


def test_keys_of_turns_that_are_not_read_are_named() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    turns = [
        {**user("hi"), "name": "Bob", "id": 7},
        {**assistant("ok"), "weight": 1, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "c"},
        assistant("two"),
    ]
    source = Source(path="x")
    assert filled_columns(Row(HERE, {"messages": turns, "tags": []}), "messages", source) == {
        "messages",
        "messages[].name",
        "messages[].id",
    }
    speakers = [{"speaker": "user", "text": "hi", "role": "x"}, {"speaker": "assistant", "text": "ok"}]
    mapped = Source(path="x", fields={"messages": "dialog", "role": "speaker", "content": "text"})
    assert filled_columns(Row(HERE, {"dialog": speakers}), "messages", mapped) == {"dialog", "dialog[].role"}


@pytest.mark.parametrize(
    ("no", "yes"),
    [
        ({"weight": 0}, {"weight": 1}),
        ({"train": False}, {"train": True}),
        ({"loss": False}, {}),
        ({"trainable": False}, {"trainable": True}),
        ({"loss_mask": 0}, {"loss_mask": 1}),
    ],
)
def test_turns_that_the_row_says_not_to_learn_are_not(no: dict[str, Any], yes: dict[str, Any]) -> None:
    turns = [user("hi"), {**assistant("BAD ANSWER"), **no}, user("wrong"), {**assistant("good answer"), **yes}]
    for template in (CHATML, FORGETFUL):
        encoder = encoder_for(template)
        assert learned(encoder.tokenizer, encoder(parse({"messages": turns}))) == ["good answer<|im_end|>"]
    whole = encoder_for(CHATML, assistant_only_loss=False)
    texts = learned(whole.tokenizer, whole(parse({"messages": turns})))
    assert not any("BAD" in text for text in texts) and "wrong" in texts[1] and "good answer" in texts[1]


def test_a_chat_of_which_nothing_is_to_be_learned_trains_nothing() -> None:
    encoder = encoder_for(CHATML)
    [encoded] = encoder(parse({"messages": [user("hi"), {**assistant("no"), "weight": 0}]}))
    assert encoded.trained == 0


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({**assistant("a"), "weight": 0.5}, "`messages[1].weight` must be 0 or 1, false or true, not '0.5'"),
        ({**assistant("a"), "train": "no"}, "`messages[1].train` must be 0 or 1, false or true, not 'no'"),
        ({**assistant("a"), "train_detail": [{"begin_offset": 0}]}, "`messages[1].train_detail` is not supported"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(turn: dict[str, Any], reason: str) -> None:
    assert refusal({"messages": [user("hi"), turn]}).startswith(reason)


def test_only_the_assistants_turns_can_be_asked_for() -> None:
    row = {"messages": [{**user("hi"), "train": True}, assistant("yo")]}
    assert "only assistant turns are trained" in refusal(row)
    assert messages_of({"messages": [{**user("hi"), "train": False}, assistant("yo")]})


# Thoughts.

THOUGHT = [user("What is 1+1?"), thinking(assistant("The sum 1."), "carry the one")]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "reasoning_content": "carry the one", "content": "The sum 1."},
        {"role": "assistant", "thinking": "carry the one", "content": "The sum 1."},
        {"role": "assistant", "reasoning": "carry the one", "content": "The sum 1.", "thinking": None},
        {
            "role": "assistant",
            "content": [{"type": "reasoning", "text": "carry the one"}, {"type": "text", "text": "The sum 1."}],
        },
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "carry the one"}, {"type": "text", "text": "The sum 1."}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "carry the one"}]},
                {"type": "text", "text": "The sum 1."},
            ],
        },
    ],
)
def test_thoughts_are_told_from_answers_however_they_are_written(turn: dict[str, Any]) -> None:
    assert messages_of({"messages": [user("What is 1+1?"), turn]}) == THOUGHT


def test_gpt_oss_channels_that_are_turns_are_one_turn_with_its_thought() -> None:
    channels = [
        {"role": "assistant", "channel": "analysis", "content": "carry the one"},
        {"role": "assistant", "channel": "final", "content": "The sum 1."},
    ]
    assert messages_of({"messages": [user("What is 1+1?"), *channels]}) == THOUGHT
    assert "no assistant turn follows" in refusal({"messages": [user("q"), channels[0]]})
    assert "no assistant turn follows" in refusal({"messages": [user("q"), channels[0], user("r")]})
    lone = {"role": "assistant", "channel": "commentary", "content": "now I call"}
    assert "calls no tool" in refusal({"messages": [user("q"), lone]})
    assert "known are analysis" in refusal({"messages": [user("q"), {**lone, "channel": "other"}]})


def test_gpt_oss_marks_in_a_content_are_refused_with_what_to_write() -> None:
    raw = "<|channel|>analysis<|message|>carry<|end|><|start|>assistant<|channel|>final<|message|>The sum 1."
    assert "<|channel|> in it" in refusal({"messages": [user("q"), assistant(raw)]})


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([user("q"), {**assistant("a"), "reasoning_content": ["x"]}], "`messages[1].reasoning_content` must be text"),
        (
            [{**user("q"), "thinking": "x"}, assistant("a")],
            "`messages[0]` has a thought, but is not an assistant turn",
        ),
        (
            [user("q"), {"role": "assistant", "content": [{"type": "thinking"}]}],
            "the content of `messages[1]` has a tho",
        ),
        ([user("q"), {"role": "assistant", "content": "", "thinking": "x"}], "the content of the assistant turn"),
    ],
)
def test_thoughts_that_cannot_be_used_are_refused(turns: list[dict[str, Any]], reason: str) -> None:
    assert refusal({"messages": turns}).startswith(reason)


# Tools.

SHAREGPT = [
    {"from": "human", "value": "hi"},
    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
    {"from": "observation", "value": "3"},
    {"from": "gpt", "value": "three"},
]
CALLED = [user("hi"), {**assistant(""), "tool_calls": [ADD]}, {"role": "tool", "content": "3"}, assistant("three")]


def test_sharegpts_calls_and_observations_are_calls_and_results() -> None:
    described = TOOLS[0]["function"]
    for tools in (json.dumps([described]), [described], TOOLS, json.dumps(TOOLS), described, [json.dumps(described)]):
        assert parse({"conversations": SHAREGPT, "tools": tools}) == Chat(HERE, CALLED, tools=TOOLS)
    for nothing in ("", None, [], "[]"):
        assert parse({"conversations": SHAREGPT, "tools": nothing}) == Chat(HERE, CALLED)


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}], ids=["null", "empty", "none"])
def test_openais_calls_need_no_content(content: dict[str, Any]) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    turns = [user("hi"), {"role": "assistant", **content, "tool_calls": [call]}, RESULT, assistant("three")]
    assert parse({"messages": turns, "tools": TOOLS}) == Chat(
        HERE, [user("hi"), CALL, RESULT, assistant("three")], tools=TOOLS
    )


def test_older_forms_of_calls_are_understood() -> None:
    old = [
        user("hi"),
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1, "b": 2}'}},
        {"role": "function", "name": "add", "content": "3"},
        assistant("three"),
    ]
    named = {"role": "tool", "name": "add", "content": "3"}
    expected = [CALLED[0], CALLED[1], named, CALLED[3]]
    assert parse({"messages": old, "functions": [TOOLS[0]["function"]]}) == Chat(HERE, expected, tools=TOOLS)


def test_calls_behind_each_other_are_one_turn() -> None:
    call = {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1, "b": 2}}'}
    turns = [user("hi"), assistant("let me add"), call, call, {"role": "tool_response", "content": {"sum": 3}}]
    assert messages_of({"messages": turns}) == [
        user("hi"),
        {**assistant("let me add"), "tool_calls": [ADD, ADD]},
        {"role": "tool", "content": '{"sum": 3}'},
    ]


def test_calls_are_learned_and_results_are_not() -> None:
    from tests.data.chats import TEMPLATES

    encoder = encoder_for(TEMPLATES["qwen2_5"])
    [encoded] = encoder(parse({"conversations": SHAREGPT, "tools": json.dumps(TOOLS)}))
    assert learned(encoder.tokenizer, [encoded]) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>',
        "three<|im_end|>",
    ]
    text = encoder.tokenizer.decode(encoded.input_ids)
    assert "<tools>" in text and "<tool_response>\n3\n</tool_response>" in text


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"tools": "add"}, "`tools` must be JSON"),
        ({"tools": [5]}, "`tools[0]` must be a tool with a name, not a number"),
        ({"tools": [{"type": "function", "function": {}}]}, "`tools[0]` is a tool without a `name`"),
    ],
)
def test_tools_that_are_none_are_refused(values: dict[str, Any], reason: str) -> None:
    assert refusal({"messages": [user("hi"), assistant("yo")], **values}).startswith(reason)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("add(1, 2)", "`conversations[1]` must be JSON"),
        ('{"arguments": {}}', "`conversations[1][0]` must be a call with a `name` and `arguments`"),
        ('{"name": "add", "arguments": [1]}', "`conversations[1][0].arguments` must be an object, not a list"),
        ('{"name": "add", "arguments": "{"}', "`conversations[1][0].arguments` must be JSON"),
    ],
)
def test_calls_that_are_none_are_refused(call: str, reason: str) -> None:
    turns = [SHAREGPT[0], {"from": "function_call", "value": call}]
    assert refusal({"conversations": turns}).startswith(reason)


def test_tools_beside_plain_text_are_refused_since_no_template_writes_them() -> None:
    assert "only a chat template can render" in refusal({"prompt": "p", "completion": "c", "tools": TOOLS})


def test_nulls_that_tables_fill_into_descriptions_are_left_out() -> None:
    described = {**TOOLS[0]["function"], "strict": None}
    described["parameters"] = {**described["parameters"], "enum": None, "default": None}
    [tool] = parse({"messages": [user("hi"), assistant("yo")], "tools": [described]}).tools
    assert "strict" not in tool["function"] and "enum" not in tool["function"]["parameters"]
    assert tool["function"]["parameters"]["default"] is None


@pytest.mark.parametrize("depth", [200, 1500])
def test_arguments_nested_without_end_are_the_rows_fault_and_no_crash(depth: int) -> None:
    nested: Any = "x"
    for _ in range(depth):
        nested = {"a": nested}
    row = {"messages": [user("hi"), {**assistant(""), "tool_calls": [{"name": "add", "arguments": nested}]}]}
    if depth > 1000:
        assert refusal(row) == "it is nested too deeply"
    else:
        assert messages_of(row)
