"""The Modelfile follows Ollama's grammar, and its template renders what the model's chat template renders."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from transformers import AutoTokenizer

from folora_q.errors import UserError
from folora_q.export.go_template import BATTERY, UnsupportedTemplateError, derive_go_template
from folora_q.export.modelfile import FIRST_LINE, write_modelfile
from folora_q.models.trust import NOTHING
from tests.conftest import CHAT_TEMPLATE, save_tiny_model, tiny_tokenizer
from tests.export.go import parse_modelfile, render_go

# As of models: ChatML with a default system message (Qwen2.5), Llama 3, Phi-3, and one whose questions end with "A:".
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}" + CHAT_TEMPLATE
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ANSWERING = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Q: {{ message['content'] }}\nA:"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}\n\n{% else %} {{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
)
THINKING = CHAT_TEMPLATE + "{% if enable_thinking is defined %}<think></think>{% endif %}{% if tools %}tools{% endif %}"


@pytest.mark.parametrize(
    ("template", "adds_bos", "limits"),
    [
        (CHAT_TEMPLATE, None, []),
        (DEFAULT, None, []),
        (LLAMA3, True, ["removing spaces around messages"]),
        (LLAMA3, False, ["removing spaces around messages"]),
        (PHI3, None, []),
        (ANSWERING, None, []),
        (THINKING, None, ["tools", "the switch for thinking"]),
    ],
)
def test_both_templates_render_the_same(template: str, adds_bos: bool | None, limits: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    found = derive_go_template(tokenizer, adds_bos)
    assert found.limits == limits
    start = "<|im_start|>" if template == LLAMA3 and adds_bos else ""
    other = [
        {"role": "user", "content": "Something else"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "?"},
    ]
    for messages in (*BATTERY, other):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert start + render_go(found.text, messages) == expected


def test_pieces_are_those_that_a_person_would_write() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DEFAULT
    assert derive_go_template(tokenizer, None).text == (
        "{{ if not .System }}<|im_start|>system\nYou are kind.<|im_end|>\n{{ end }}{{ range .Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "is missing"),
        ("{{ strftime_now('%d') }}" + CHAT_TEMPLATE, "contains today's date"),
        ("{{ bos_token }}" + CHAT_TEMPLATE, "writes the start token, which llama.cpp may add too"),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE,
            "refuses a conv",
        ),
        (
            "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}\n{% endif %}{% endfor %}",
            "the role system",
        ),
        (CHAT_TEMPLATE.replace("message['content']", "message['content'] | upper"), "does not render every message"),
        ("{{ messages | length }} turns: " + CHAT_TEMPLATE, "does more than put fixed text around each message"),
        (CHAT_TEMPLATE.replace("\n", "{{ '{{' }}"), "has text that a Modelfile cannot hold"),
    ],
)
def test_what_has_no_equivalent_is_said(template: str | None, reason: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UnsupportedTemplateError, match=reason):
        derive_go_template(tokenizer, None)


def save_gguf(path: Path, add_bos: bool | None = None, kind: str = "gpt2") -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_modelfile_names_the_file_the_template_and_the_ends(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "merged")
    (folder / "generation_config.json").write_text(
        json.dumps(
            {"eos_token_id": [0, 2], "do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}
        )
    )
    written = write_modelfile(folder, save_gguf(tmp_path / "merged-q8_0.gguf"), NOTHING)
    assert (written.path, written.template, written.kept) == (tmp_path / "Modelfile", True, None)
    text = written.path.read_text("utf-8")
    assert text.startswith(FIRST_LINE) and "ollama create my-model -f Modelfile" in text
    assert parse_modelfile(text) == [
        ("FROM", "./merged-q8_0.gguf"),
        ("TEMPLATE", derive_go_template(AutoTokenizer.from_pretrained(folder), None).text),
        ("stop", "<|endoftext|>"),
        ("stop", "<|im_end|>"),
        ("temperature", "0.7"),
        ("top_k", "20"),
        ("repeat_penalty", "1.1"),
    ]
    assert "Sampling as in the model's generation_config.json" in text
    (folder / "generation_config.json").unlink()
    write_modelfile(folder, tmp_path / "merged-q8_0.gguf", NOTHING)
    assert parse_modelfile(written.path.read_text("utf-8"))[-2:] == [("stop", "<|im_end|>"), ("temperature", "0")]


def test_without_an_equivalent_template_it_says_what_ollama_does(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "merged", chat=False)
    written = write_modelfile(folder, save_gguf(tmp_path / "a model.gguf"), NOTHING)
    text = written.path.read_text("utf-8")
    assert (
        not written.template
        and "since the model's chat template is missing" in text
        and "ollama show --template" in text
    )
    assert [name for name, _ in parse_modelfile(text)] == ["FROM", "stop", "temperature"]
    assert parse_modelfile(text)[0] == ("FROM", "./a model.gguf")


@pytest.mark.parametrize(
    ("add_bos", "kind", "has"), [(None, "gpt2", False), (None, "llama", True), (False, "gpt2", True)]
)
def test_whether_the_start_token_is_added_is_read_from_the_file(
    tmp_path: Path, add_bos: bool | None, kind: str, has: bool
) -> None:
    folder = save_tiny_model(tmp_path / "merged")
    (folder / "chat_template.jinja").write_text(LLAMA3, encoding="utf-8")
    assert write_modelfile(folder, save_gguf(tmp_path / "m.gguf", add_bos, kind), NOTHING).template == has


def test_another_persons_modelfile_stays(tmp_path: Path) -> None:
    folder, file = save_tiny_model(tmp_path / "merged"), save_gguf(tmp_path / "merged-f16.gguf")
    (tmp_path / "Modelfile").write_text("FROM llama3.2\n", encoding="utf-8")
    written = write_modelfile(folder, file, NOTHING)
    assert (written.path, written.kept) == (tmp_path / "merged-f16.Modelfile", tmp_path / "Modelfile")
    assert (tmp_path / "Modelfile").read_text("utf-8") == "FROM llama3.2\n"
    assert "-f merged-f16.Modelfile" in written.path.read_text("utf-8")
    (folder / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="generation_config.json cannot be read"):
        write_modelfile(folder, file, NOTHING)
