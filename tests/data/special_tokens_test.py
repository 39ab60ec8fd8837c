"""Special tokens stand once, whatever a tokenizer adds by itself: in every shape of row, trained, asked and talked."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.chat.reply import Chatter
from folora_q.data.encode import Encoder
from folora_q.data.examples import Chat, Completion, Example, Text
from folora_q.data.rendering import Renderer
from folora_q.evaluation.loss import text_windows
from folora_q.evaluation.task import Questions
from tests.data.chats import learned, tokenizer_for
from tests.data.rows import assistant, user

CHATML = (
    "{{ start }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "brings its beginning": CHATML.replace("{{ start }}", "{{ bos_token }}"),
    "brings none": CHATML.replace("{{ start }}", ""),
}
# What a tokenizer puts around every text.
ADDS = {"nothing": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>"}
QUESTION = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(params=ADDS)
def adds(request: pytest.FixtureRequest) -> str:
    return request.param


def tokenizer_that(adds: str, template: str = "brings its beginning") -> Tokenizer:
    tokenizer = tokenizer_for(TEMPLATES[template])
    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=ADDS[adds], special_tokens=specials)
    return tokenizer


def start_of(adds: str) -> str:
    return "<s>" if adds in ("bos", "both") else ""


@pytest.mark.parametrize("example", [Text("here", "abc"), Text("here", "abc</s>")])
def test_a_text_is_trained_with_one_beginning_and_one_end(adds: str, example: Example) -> None:
    tokenizer = tokenizer_that(adds)
    [encoded] = Encoder(tokenizer)(example)
    assert tokenizer.decode(encoded.input_ids) == start_of(adds) + "abc</s>"
    assert encoded.labels == encoded.input_ids


def test_a_completion_is_trained_with_one_beginning_and_one_end(adds: str) -> None:
    tokenizer = tokenizer_that(adds)
    for example in (Completion("here", "2+2=", "4"), Completion("here", "2+2=", "4</s>")):
        [encoded] = Encoder(tokenizer)(example)
        assert tokenizer.decode(encoded.input_ids) == start_of(adds) + "2+2=4</s>"
        assert learned(tokenizer, [encoded]) == ["4</s>"]
    [encoded] = Encoder(tokenizer)(Completion("here", "<s>2+2=", "4"))
    assert tokenizer.decode(encoded.input_ids) == "<s>2+2=4</s>"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("whole", [False, True])
def test_a_chat_is_trained_with_what_its_template_brings(adds: str, template: str, whole: bool) -> None:
    tokenizer = tokenizer_that(adds, template)
    encoder = Encoder(tokenizer, assistant_only_loss=not whole)
    encoder.prepare_chats()
    [encoded] = encoder(Chat("here", [user("hi"), assistant("yo")]))
    start = "<s>" if template == "brings its beginning" else ""
    assert tokenizer.decode(encoded.input_ids) == start + QUESTION + "yo<|im_end|>\n"
    if not whole:
        assert learned(tokenizer, [encoded]) == ["yo<|im_end|>"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_evaluation_asks_with_the_beginning_that_was_trained_and_without_an_end(
    adds: str, template: str, tmp_path: Path
) -> None:
    tokenizer = tokenizer_that(adds, template)
    reader = Questions(Renderer(tokenizer))
    chat, completion = Chat("here", [user("hi"), assistant("yo")]), Completion("here", "2+2=", "4")
    start = "<s>" if template == "brings its beginning" else ""
    (tmp_path / "prompts.txt").write_text("hi\n")
    asked = [*reader.of_task([chat, completion]), *reader.general(tmp_path / "prompts.txt")]
    texts = [tokenizer.decode(question.ids) for question in asked]
    assert texts == [start + QUESTION, start_of(adds) + "2+2=", start + QUESTION]
    encoder = Encoder(tokenizer)
    encoder.prepare_chats()
    for question, example in zip(asked, (chat, completion), strict=False):
        [encoded] = encoder(example)
        assert encoded.input_ids[: len(question.ids)] == question.ids


def test_general_text_is_measured_with_one_beginning_and_no_end(adds: str, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("a" * 40)
    tokenizer = tokenizer_that(adds)
    [window] = text_windows(tmp_path / "prose.txt", tokenizer, 64)
    assert tokenizer.decode(window) == start_of(adds) + "a" * 40


@pytest.mark.parametrize("template", [*TEMPLATES, None])
def test_a_talk_begins_as_training_did(adds: str, template: str | None) -> None:
    tokenizer = tokenizer_that(adds, template or "brings none")
    if template is None:
        tokenizer.chat_template = None
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    chatter = Chatter(model, tokenizer, "model", "a test", [])
    start = "<s>" if template == "brings its beginning" else ""
    expected = start_of(adds) + "hi" if template is None else start + QUESTION
    assert tokenizer.decode(chatter._prompt([user("hi")])) == expected
