"""Prompts to keep: rendered by the chat template, divided, and left out where a template cannot express them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from folora_q.data.kept_prompts import MAX_OF_FILE, WINDOW, KeptSource, kept_sources
from folora_q.data.rendering import Renderer
from folora_q.errors import UserError
from folora_q.recipe.capabilities import CAPABILITIES, MIN_HELD_OUT
from folora_q.recipe.keep import KeepSection
from tests.conftest import tiny_tokenizer
from tests.data.chats import TEMPLATES, tokenizer_for


def sources(template: str, *names: str, **settings: object) -> tuple[dict[str, KeptSource], list[str]]:
    notes: list[str] = []
    section = KeepSection.model_validate({"capabilities": list(names), **settings})
    found = kept_sources(section, Renderer(tokenizer_for(TEMPLATES[template])), notes.append)
    return {source.name: source for source in found}, notes


@pytest.mark.parametrize("template", ["qwen3", "gptoss"])
def test_a_template_with_tools_and_thoughts_keeps_everything(template: str) -> None:
    found, notes = sources(template, *CAPABILITIES)
    assert list(found) == list(CAPABILITIES) and not notes
    for source in found.values():
        penalty, held_out = ([prompt.text for prompt in half] for half in source.prompts)
        assert len(held_out) >= MIN_HELD_OUT and not set(penalty) & set(held_out)
        assert source.max_new_tokens == CAPABILITIES[source.capability].max_new_tokens
        assert not source.to_measure.prompts.penalty and source.to_measure.prompts.held_out == source.prompts.held_out


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        ("gemma", {"tools": "no tools", "thinking": "no thoughts"}),
        ("qwen2_5", {"thinking": "no thoughts"}),
        ("deepseek_r1_distill", {"tools": "no tools"}),
        ("lfm2", {"tools": "no tool calls", "thinking": "no thoughts"}),
    ],
)
def test_what_a_template_cannot_express_is_left_out_with_a_line(template: str, left_out: dict[str, str]) -> None:
    found, notes = sources(template, "tools", "thinking", "code")
    assert list(found) == [name for name in ("tools", "thinking", "code") if name not in left_out]
    assert len(notes) == len(left_out)
    for (name, reason), note in zip(left_out.items(), notes, strict=True):
        assert note.startswith(f"keep: {name} is left out: ") and reason in note


def test_prompts_are_what_the_template_renders_with_tools_and_switches() -> None:
    """The model's own apply_chat_template is the reference."""
    found, _ = sources("qwen3", "tools", "thinking", "code")
    tokenizer = tokenizer_for(TEMPLATES["qwen3"])

    def rendered(source: KeptSource, **variables: object) -> str:
        ask = source.prompts.held_out[0].ask
        settings = {"tools": ask.tools, "tokenize": False, "add_generation_prompt": True, **variables}
        return tokenizer.apply_chat_template(ask.messages, **settings)

    assert found["tools"].prompts.held_out[0].text == rendered(found["tools"], enable_thinking=False)
    assert found["thinking"].prompts.held_out[0].text == rendered(found["thinking"], enable_thinking=True)
    assert found["code"].prompts.held_out[0].text == rendered(found["code"], enable_thinking=False)
    prompt = found["tools"].prompts.held_out[0]
    assert prompt.ids == tokenizer(prompt.text, add_special_tokens=False)["input_ids"]


def test_without_a_template_only_files_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {i}"}) + "\n" for i in range(40)))
    notes: list[str] = []
    section = KeepSection(capabilities=["code"], files=[str(path)])
    [found] = kept_sources(section, Renderer(tiny_tokenizer(chat=False)), notes.append)
    assert notes == ["keep: code is left out: the model has no chat template"]
    assert found.name == "mine" and found.prompts.held_out[0].text is None and found.prompts.held_out[0].ids


def test_prompts_that_are_too_long_for_the_model_are_left_out() -> None:
    notes: list[str] = []
    renderer = Renderer(tokenizer_for(TEMPLATES["qwen3"]))
    assert not kept_sources(KeepSection(capabilities=["tools"]), renderer, notes.append, most=512)
    assert "only 0 of its prompts" in notes[0]


def test_a_file_of_chats_is_asked_up_to_the_assistants_last_turn(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "be curt"}, {"role": "user", "content": "hi"}]
    rows = [
        {"messages": [*turns[:1], {**turns[1], "content": f"hi {i}"}, {"role": "assistant", "content": "secret"}]}
        for i in range(200)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, _ = sources("qwen3", files=[str(path)])
    assert len(found["chats"].prompts.held_out) == len(found["chats"].prompts.penalty) == MAX_OF_FILE
    texts = [prompt.text for half in found["chats"].prompts for prompt in half]
    assert all("be curt" in text and "secret" not in text for text in texts) and len(set(texts)) == len(texts)


def test_a_text_is_cut_into_windows_whose_second_half_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "manual.txt"
    path.write_text("".join(f"Lamp {i} is green. " for i in range(100, 700)))
    found, _ = sources("qwen3", files=[str(path)])
    penalty, held_out = found["manual"].texts
    assert all(len(window) <= WINDOW for window in [*penalty, *held_out]) and len(held_out) >= MIN_HELD_OUT
    tokenizer = tokenizer_for(TEMPLATES["qwen3"])
    numbers = [
        [word for word in tokenizer.decode(sum(half, [])).split() if word.isdecimal() and len(word) == 3]
        for half in (penalty, held_out)
    ]
    assert max(numbers[0]) < min(numbers[1])  # whole numbers only: windows cut some


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "hi"}\n', "has 1 prompts, and every second one is held out"),
        ('{"question": "hi"}\n', "line 1: it has no prompt and no text"),
        ('{"prompt": "hi"}\n{"text": "ho"}\n', "line 2: .* holds both prompts and texts"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "`messages` has no turn before the assistant's"),
        ("no JSON\n", "line 1: it is not JSON"),
        ('{"text": "short"}\n', "a half of .* gives 0 windows"),
        (('{"text": "short"}\n' + json.dumps({"text": "long " * 99}) + "\n") * 20, "a half of .* gives 0 windows"),
    ],
)
def test_a_file_that_cannot_be_kept_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        sources("qwen3", files=[str(path)])


def test_a_file_never_has_the_name_of_a_capability(tmp_path: Path) -> None:
    path = tmp_path / "tools.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {i}"}) + "\n" for i in range(40)))
    found, _ = sources("qwen3", "tools", files=[str(path)])
    assert list(found) == ["tools", str(path)]
