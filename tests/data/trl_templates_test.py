"""Every chat template that TRL ships, with every structure of a row: what is trained is what the template renders.

Held against transformers' own `apply_chat_template`, called here on its own, and against what a person would read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.examples import Chat
from folora_q.data.rows import RowError
from folora_q.data.templates import read_template
from folora_q.errors import UserError
from tests.data.chats import CALL, ROWS, TEMPLATES, TOOLS, Messages, encoder_for, learned, stretches
from tests.data.rows import user

# Refused as a whole, since no prompt of theirs begins an answer, or nothing ends one.
REFUSED = {
    "deepseek_r1_distill": "its generation prompt is not the beginning of the turn.*<think>",
    "deepseekv3": "its generation prompt is not the beginning of the turn.*<think>",
    "glm4moe": "ends the assistant's turn with no token of its own",
}


@dataclass(frozen=True)
class Reading:
    """What a person reads as learned in one template, written by hand.

    Attributes:
        end: of a turn.
        thought: an answer with its thought; None where the template renders none.
        call: of add(a=1, b=2) with its end; None where it renders none, or no results.
        system: whether it takes a system turn.
        answer: an answer without a thought.
        after_result: an answer with a thought behind a tool's result, where it is another.
        call_thought: a call with its thought.
    """

    end: str
    thought: str | None = None
    call: str | None = None
    system: bool = True
    answer: str = "{answer}"
    after_result: str | None = None
    call_thought: str | None = None


IM = "<|im_end|>"
JSON_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
XML_CALL = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n"
    "</tool_call>"
)
LLAMA_CALL = '{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot_id|>'
GEMMA_CALL = "<|tool_call>call:add{a:1,b:2}<tool_call|>"
GEMMA_THOUGHT = "<|channel>thought\n{thought}\n<channel|>"
LFM_CALL = "<|tool_call_start|>[add(a=1, b=2)]<|tool_call_end|><|im_end|>"
LFM_THINKING = Reading(IM, "<think>{thought}</think>{answer}", LFM_CALL, call_thought="<think>{thought}</think>")
MUSE_CALL = (
    ' to=add<|message|><atem:function_calls>\n<atem:invoke name="add">\n<atem:parameter name="a">1</atem:parameter>\n'
    '<atem:parameter name="b">2</atem:parameter>\n</atem:invoke>\n</atem:function_calls><|eot|>'
)
THINK_OPEN = "{thought}\n</think>\n\n"  # <think> and its line end are in the prompt
NEMOTRON_CALL = "\n" + XML_CALL + "\n" + IM
READINGS = {
    "cohere": Reading("<|END_OF_TURN_TOKEN|>"),
    "cohere2": Reading("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "diffusion_gemma": Reading(
        "<turn|>",
        GEMMA_THOUGHT + "{answer}",
        GEMMA_CALL + "<|tool_response>",
        after_result="<|turn>model\n" + GEMMA_THOUGHT + "{answer}",
        call_thought=GEMMA_THOUGHT,
    ),
    "gemma": Reading("<end_of_turn>", system=False),
    "gemma3": Reading("<end_of_turn>"),
    "gemma4": Reading("<turn|>", None, GEMMA_CALL + "<|tool_response>"),
    "gemma4_v2": Reading("<turn|>", None, GEMMA_CALL + "<turn|>"),
    "gemma4_v3": Reading("<turn|>", None, GEMMA_CALL + "<|tool_response>"),
    "gemma4_v4": Reading("<turn|>", None, GEMMA_CALL + "<|tool_response>"),
    "gemma4_v5": Reading(
        "<turn|>", GEMMA_THOUGHT + "{answer}", GEMMA_CALL + "<|tool_response>", call_thought=GEMMA_THOUGHT
    ),
    "gptoss": Reading(
        "<|return|>",
        "<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>{answer}",
        ' to=functions.add<|channel|>commentary json<|message|>{"a": 1, "b": 2}<|call|>',
        call_thought="<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant",
    ),
    "idefics3": Reading("<end_of_utterance>", answer=" {answer}"),
    "lfm2": Reading(IM),
    "lfm2_2_5": LFM_THINKING,
    "lfm2_2_5_v2": LFM_THINKING,
    "lfm2_2_5_vl": LFM_THINKING,
    "lfm2_v2": Reading(IM, None, LFM_CALL),
    "llama3": Reading("<|eot_id|>"),
    "llama3_1": Reading("<|eot_id|>", None, LLAMA_CALL),
    "llama3_2": Reading("<|eot_id|>", None, LLAMA_CALL),
    "llava_next": Reading("</s>", answer=" {answer}"),
    "muse_glimmer": Reading(
        "<|eot|>",
        " to=self<|message|>{thought}<|eom|><|start|>assistant to=user<|message|>{answer}",
        MUSE_CALL,
        call_thought=" to=self<|message|>{thought}<|eom|><|start|>assistant",
    ),
    "nemotron_3_5_lightning": Reading(IM, "{thought}</think>{answer}", NEMOTRON_CALL, call_thought="{thought}</think>"),
    "nemotron_3_nano": Reading(IM, "{thought}\n</think>\n{answer}", NEMOTRON_CALL, call_thought="{thought}\n</think>"),
    "nemotron_3_super": Reading(IM, "{thought}\n</think>\n{answer}", NEMOTRON_CALL, call_thought="{thought}\n</think>"),
    "nemotron_3_ultra": Reading(IM, "{thought}</think>{answer}", NEMOTRON_CALL, call_thought="{thought}</think>"),
    "phi3": Reading("<|end|>\n</s>"),
    "phi3_5": Reading("<|end|>\n</s>"),
    "qwen2_5": Reading(IM, None, JSON_CALL),
    "qwen2_5_vl": Reading(IM),
    "qwen3": Reading(
        IM, "<think>\n{thought}\n</think>\n\n{answer}", JSON_CALL, call_thought="<think>\n{thought}\n</think>\n\n"
    ),
    "qwen3_5_nothink": Reading(IM, THINK_OPEN + "{answer}", XML_CALL + IM, call_thought=THINK_OPEN),
    "qwen3_5_think": Reading(IM, THINK_OPEN + "{answer}", XML_CALL + IM, call_thought=THINK_OPEN),
    "qwen3_6": Reading(IM, THINK_OPEN + "{answer}", XML_CALL + IM, call_thought=THINK_OPEN),
    "qwen3_8": Reading(IM, THINK_OPEN + "{answer}", XML_CALL + IM, call_thought=THINK_OPEN),
    "qwen3_instruct_2507": Reading(IM, None, JSON_CALL),
    "qwen3_vl": Reading(IM, None, JSON_CALL),
    "smolvlm": Reading("<end_of_utterance>", answer=" {answer}"),
}
CASES = [(name, row) for name in TEMPLATES if name not in REFUSED for row in ROWS]


def expected(reading: Reading, row: str) -> list[str] | None:
    """What is learned, turn by turn; None where the row is refused."""
    answer = lambda text: reading.answer.format(answer=text) + reading.end  # noqa: E731

    def thought(text: str, answer: str) -> str:
        return reading.thought.format(thought=text, answer=answer) + reading.end

    if row == "system" and not reading.system:
        return None
    if "thought" in row and reading.thought is None and row != "inline thought":
        return None
    if "call" in row and reading.call is None:
        return None
    match row:
        case "one turn" | "system":
            return [answer("hello")]
        case "two turns":
            return [answer("hello"), answer("bye")]
        case "thought":
            return [thought("carry", "hello")]
        case "two thoughts":
            return [thought("carry", "hello"), thought("again", "bye")]
        case "thought, then none":
            return [thought("carry", "hello"), answer("bye")]
        case "inline thought" if reading.thought is None:  # it is a part of the content, which is rendered as it is
            return [answer("<think>\ncarry\n</think>\n\nhello")]
        case "inline thought":
            return [thought("carry", "hello")]
        case "call":
            return [reading.call, answer("three")]
        case "thoughts and call":
            last = reading.after_result or reading.thought
            first = reading.call_thought.format(thought="carry") + reading.call
            return [first, last.format(thought="done", answer="three") + reading.end]
    raise AssertionError(row)


def test_the_table_names_every_template() -> None:
    assert {*READINGS, *REFUSED} == set(TEMPLATES) and len(TEMPLATES) > 35


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_cannot_be_trained_as_they_are_asked_with_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UserError, match=REFUSED[name]) as caught:
        encoder_for(TEMPLATES[name])
    assert "data.chat_template" in caught.value.hint
    assert ("deepseek_r1" in caught.value.hint) == name.startswith("deepseek")


def test_our_deepseek_r1_renders_thoughts_and_is_asked_with_what_it_trains() -> None:
    encoder = encoder_for(read_template("deepseek_r1"))
    for row, wanted in {
        "one turn": ["hello"],
        "two turns": ["hello", "bye"],
        "thought": ["carry\n</think>\n\nhello"],
        "inline thought": ["carry\n</think>\n\nhello"],
        "thought, then none": ["carry\n</think>\n\nhello", "bye"],
    }.items():
        found = learned(encoder.tokenizer, encoder(Chat("here", ROWS[row][0])))
        assert found == [text + "<｜end▁of▁sentence｜>" for text in wanted]
    with pytest.raises(RowError, match="takes no tools"):
        encoder(Chat("here", ROWS["call"][0], tools=ROWS["call"][1]))


@pytest.mark.parametrize("merges", [False, True], ids=["bytes", "merges"])
@pytest.mark.parametrize(("name", "row"), CASES)
def test_what_is_learned_is_what_a_person_reads(name: str, row: str, merges: bool) -> None:
    encoder = encoder_for(TEMPLATES[name], merges)
    messages, tools = ROWS[row]
    wanted = expected(READINGS[name], row)
    if wanted is None:
        with pytest.raises(RowError, match=r"does not render|cannot be rendered"):
            encoder(Chat("here", messages, tools=tools))
        return
    assert learned(encoder.tokenizer, encoder(Chat("here", messages, tools=tools))) == wanted


@pytest.mark.parametrize("merges", [False, True], ids=["bytes", "merges"])
@pytest.mark.parametrize(("name", "row"), CASES)
def test_what_is_learned_follows_what_the_model_is_asked_with_token_by_token(name: str, row: str, merges: bool) -> None:
    encoder = encoder_for(TEMPLATES[name], merges)
    messages, tools = ROWS[row]
    if expected(READINGS[name], row) is None:
        return
    if READINGS[name].thought is not None:
        messages = [apart(turn) for turn in messages]
    tokenizer, turns = encoder.tokenizer, [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    found = 0
    for encoded in encoder(Chat("here", ROWS[row][0], tools=tools)):
        for start, end in stretches(encoded):
            index = turns[found]
            found += 1
            before = tokenizer.decode(encoded.input_ids[:start])
            said = tokenizer.decode(encoded.input_ids[start:end])
            whole = rendered(tokenizer, messages[: index + 1], tools)
            prompts = prompts_of(tokenizer, messages[:index], tools)
            asked = max((prompt for prompt in prompts if before.startswith(prompt)), key=len)
            # Between the prompt and what is learned there is nothing but the place of a thought that the row lacks.
            between = before[len(asked) :]
            assert whole.endswith(between + said)
            assert not between or "reasoning_content" not in messages[index]
            assert not any(letter in between for letter in ("hello", "bye", "three", "add", "carry"))
            if (name, row) != ("gptoss", "thoughts and call") or index == turns[0]:
                assert whole == before + said
            assert encoded.input_ids[:start] == tokenizer(before, add_special_tokens=False)["input_ids"]
    assert found == len(turns)


def rendered(tokenizer: Tokenizer, messages: Messages, tools: Any, **more: Any) -> str:
    """By transformers alone; templates of vision models want contents in parts."""
    if "message['content'][0]" in tokenizer.chat_template or "content'] | selectattr" in tokenizer.chat_template:
        messages = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **more)


def apart(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn with the thought of the rows here out of its content."""
    head, closed, tail = turn["content"].partition("\n</think>\n\n")
    return {**turn, "content": tail, "reasoning_content": head.removeprefix("<think>\n")} if closed else turn


def prompts_of(tokenizer: Tokenizer, messages: Messages, tools: Any) -> list[str]:
    """All that a program may ask with: the default prompt, and those that say whether to think."""
    settings = [{}, {"enable_thinking": False}, {"enable_thinking": True}]
    return [rendered(tokenizer, messages, tools, add_generation_prompt=True, **more) for more in settings]


@pytest.mark.parametrize(("name", "ends"), [("gptoss", ["<|return|>", "<|call|>"]), ("qwen3", ["<|im_end|>"])])
def test_generation_stops_at_the_end_of_a_call_too(name: str, ends: list[str]) -> None:
    encoder = encoder_for(TEMPLATES[name])
    chats = [Chat("here", messages, tools=tools) for messages, tools in ROWS.values()]
    tokens = [encoder.tokenizer.decode([token]) for token in encoder.ends_of_turn(chats)]
    assert tokens == ends and tokens[:1] == [encoder.tokenizer.decode([encoder.end_of_turn])]
    assert len(encoder.ends_of_turn(chats[:1])) == 1


@pytest.mark.parametrize("name", [name for name in READINGS if READINGS[name].call])
def test_of_several_calls_none_is_lost(name: str) -> None:
    """Some templates write the first alone, or refuse."""
    encoder = encoder_for(TEMPLATES[name])
    calls = [{**CALL["tool_calls"][0], "function": {"name": "add", "arguments": {"a": a, "b": 5}}} for a in (31, 42)]
    chat = Chat("here", [user("hi"), {**CALL, "tool_calls": calls}], tools=TOOLS)
    try:
        [encoded] = encoder(chat)
    except RowError as error:
        assert name in ("gptoss", "llama3_1", "llama3_2"), error.reason
        return
    [text] = learned(encoder.tokenizer, [encoded])
    assert text.count("31") == text.count("42") == 1 and text.index("31") < text.index("42")
