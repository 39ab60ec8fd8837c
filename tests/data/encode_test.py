"""Which tokens are learned: held against TRL, against transformers, and by what a person would expect to read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer
from trl import SFTConfig, SFTTrainer

from folora_q.data.encode import Encoder
from folora_q.data.examples import Chat, Completion, Text
from folora_q.data.pieces import Encoded
from folora_q.data.rows import RowError
from folora_q.data.templates import read_template
from folora_q.data.tokens import IGNORED
from folora_q.errors import UserError
from tests.data.chats import CALL, ROWS, TOOLS, encoder_for, tokenizer_for
from tests.data.rows import assistant, user

SYSTEM = {"role": "system", "content": "be brief"}
TURNS = [user("1+1?"), assistant("two"), user("and 2+2?"), assistant("four")]
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Rewrites all but the last answer, as templates of reasoning models do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}..."
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Asks for thoughts that the rendered answer does not have.
THOUGHTFUL = FORGETFUL.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
# Names of templates, the tokens that they need, and what ends an assistant's turn.
NAMED = {
    "chatml": (["<|im_start|>", "<|im_end|>"], "<|im_end|>\n"),
    "qwen2_5": (["<|im_start|>", "<|im_end|>"], "<|im_end|>\n"),
    "llama3": (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "gemma": (["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>\n"),
    "mistral": (["[INST]", "[/INST]"], "<|im_end|>"),
    "alpaca": ([], "<|im_end|>\n\n"),
    "vicuna": ([], "<|im_end|>"),
}


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return AutoTokenizer.from_pretrained(tiny_folder)


def encoder_of(tokenizer: Tokenizer, template: str | None = None, **settings: bool) -> Encoder:
    if template is not None:
        tokenizer.chat_template = template
    encoder = Encoder(tokenizer, **settings)
    encoder.prepare_chats()
    return encoder


def learned(tokenizer: Tokenizer, encoded: Encoded) -> list[str]:
    """The stretches of text that are learned."""
    pieces: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORED:
            pieces[-1].append(label)
        elif pieces[-1]:
            pieces.append([])
    return [tokenizer.decode(piece) for piece in pieces if piece]


def text_of(tokenizer: Tokenizer, encoded: Encoded) -> str:
    return tokenizer.decode(encoded.input_ids)


@pytest.mark.parametrize(("template", "marking"), [(None, "rendering"), (CHATML_MARKED, "own marks")])
def test_every_answer_of_a_chat_is_learned_with_its_end(
    tokenizer: Tokenizer, template: str | None, marking: str
) -> None:
    encoder = encoder_of(tokenizer, template)
    assert marking in encoder.marking
    [encoded] = encoder(Chat("here", [SYSTEM, *TURNS]))
    end = "<|im_end|>\n" if template is None else "<|im_end|>"
    assert learned(tokenizer, encoded) == ["two" + end, "four" + end]
    assert text_of(tokenizer, encoded) == tokenizer.apply_chat_template([SYSTEM, *TURNS], tokenize=False)
    assert encoder.end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_what_is_learned_follows_the_prompt_that_the_model_will_be_given(tokenizer: Tokenizer) -> None:
    encoder = encoder_of(tokenizer)
    chat = Chat("here", TURNS[:2])
    [encoded] = encoder(chat)
    asked = tokenizer.apply_chat_template(chat.prompt, add_generation_prompt=True)["input_ids"]
    assert encoded.input_ids[: len(asked)] == asked
    assert encoded.labels == [IGNORED] * len(asked) + encoded.input_ids[len(asked) :]
    assert encoded.trained == len(encoded.input_ids) - len(asked)


@pytest.mark.parametrize("name", NAMED)
def test_named_templates_learn_the_answers_alone(tokenizer: Tokenizer, name: str) -> None:
    """Ours and TRL's; the probe's end-of-text token is <|im_end|>."""
    tokens, end = NAMED[name]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    encoder = encoder_of(tokenizer, read_template(name))
    pieces = [piece for encoded in encoder(Chat("here", TURNS)) for piece in learned(tokenizer, encoded)]
    assert [piece.strip() for piece in pieces] == [answer + end.strip() for answer in ("two", "four")]
    assert tokenizer.decode([encoder.end_of_turn]) == end.strip()


def test_several_turns_are_learned_as_the_saved_template_renders_each_when_it_is_asked_for(
    tokenizer: Tokenizer,
) -> None:
    """The row of models-and-data.md B3: Qwen3's template puts an empty thought into the last answer alone."""
    encoder = encoder_of(tokenizer, read_template("qwen3"))
    turns = [user("hi"), assistant("hello"), user("more"), assistant("bye")]
    first, second = encoder(Chat("here", turns))
    assert text_of(tokenizer, first) == tokenizer.apply_chat_template(turns[:2], tokenize=False)
    assert text_of(tokenizer, second) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert "assistant\nhello<|im_end|>" in text_of(tokenizer, second)
    assert learned(tokenizer, first) == ["hello<|im_end|>\n"]
    assert learned(tokenizer, second) == ["bye<|im_end|>\n"]


def test_a_prompts_last_token_is_never_one_with_the_first_of_the_answer() -> None:
    """A model is asked with the tokens of the prompt alone, where a line end stands for itself."""
    chat = [user("hi"), assistant("\nyes"), user("more"), assistant("well")]
    for template in (CHATML_MARKED, re.sub(r"{% (end)?generation %}", "", CHATML_MARKED)):
        encoder = encoder_for(template, merges=True)
        tokenizer = encoder.tokenizer
        first, second = encoder(Chat("here", chat))
        asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
        assert first.input_ids[: len(asked)] == asked
        assert [piece.rstrip() for piece in learned(tokenizer, first)] == ["\nyes<|im_end|>"]
        assert [piece.rstrip() for piece in learned(tokenizer, second)] == ["well<|im_end|>"]
        joined = tokenizer.apply_chat_template(chat)["input_ids"]
        assert joined[: len(asked)] != asked, "the merge that this is about"
        assert second.input_ids == joined


def test_a_template_that_rewrites_earlier_turns_is_read_turn_by_turn(tokenizer: Tokenizer) -> None:
    first, second = encoder_of(tokenizer, FORGETFUL)(Chat("here", TURNS))
    assert learned(tokenizer, first) == ["two<|im_end|>\n"]
    assert learned(tokenizer, second) == ["four<|im_end|>\n"]
    assert "two" not in text_of(tokenizer, second)


def test_a_template_that_cannot_mark_is_refused_and_may_be_learned_whole(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="cannot mark what the assistant says") as caught:
        encoder_of(tokenizer, THOUGHTFUL)
    assert "training.assistant_only_loss: false" in caught.value.hint
    encoder = encoder_of(tokenizer, THOUGHTFUL, assistant_only_loss=False)
    [encoded] = encoder(Chat("here", TURNS[:2]))
    assert encoded.labels == encoded.input_ids


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize(("name", "end"), [("mistral", "</s>"), ("vicuna", "</s>"), ("chatml", "<|im_end|>")])
def test_tokenizers_that_mark_the_beginning_of_a_text_say_what_the_template_renders(
    name: str, end: str, scheme: str
) -> None:
    """As sentencepiece's do, where an answer that is made tokens alone would begin with a space."""
    template = read_template(name)
    tokenizer = tokenizer_for(template)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    letters = ["<s>", "</s>", "▁", "\n", "<unk>", "▁two", *map(chr, range(33, 127))]
    pairs = [("▁", "t"), ("w", "o"), ("▁t", "wo")]
    vocabulary = {token: index for index, token in enumerate([*letters, *(a + b for a, b in pairs[:2])])}
    backend.model = models.BPE(vocabulary, pairs, unk_token="<unk>")
    encoder = Encoder(tokenizer)
    encoder.prepare_chats()
    sequences = encoder(Chat("here", TURNS))
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert text_of(tokenizer, sequences[-1]).strip() == tokenizer.decode(encoder.renderer.ids(whole)).strip()
    pieces = [piece.strip() for encoded in sequences for piece in learned(tokenizer, encoded)]
    assert pieces == ["two" + end, "four" + end]


def test_an_opening_in_an_earlier_turn_is_not_taken_for_that_of_the_last(tokenizer: Tokenizer) -> None:
    """The template opens a thought in its prompt, and renders it in earlier turns but not in the last."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}<think>"
        "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    encoder = encoder_of(tokenizer, template, assistant_only_loss=False)
    encoder.assistant_only_loss = True
    with pytest.raises(RowError, match="cannot mark what the assistant says"):
        encoder(Chat("here", TURNS))


@pytest.mark.parametrize("whole", [False, True])
def test_rows_without_a_thought_may_be_refused(tokenizer: Tokenizer, whole: bool) -> None:
    tokenizer.chat_template = read_template("qwen3")
    encoder = Encoder(tokenizer, without_thought="raise", assistant_only_loss=not whole)
    encoder.prepare_chats()
    thought = {**assistant("two"), "reasoning_content": "carry"}
    assert encoder(Chat("here", [user("1+1?"), thought]))
    with pytest.raises(RowError, match=r"turn 2 has none \(data.without_thought: raise\)"):
        encoder(Chat("here", [user("1+1?"), assistant("two")]))


def test_learned_whole_a_chat_has_no_empty_thought_in_the_loss_and_loses_no_thought(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = read_template("qwen3")
    encoder = Encoder(tokenizer, assistant_only_loss=False)
    encoder.prepare_chats()
    [encoded] = encoder(Chat("here", TURNS[:2]))
    assert learned(tokenizer, encoded) == [
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
        "two<|im_end|>\n",
    ]
    thoughts = [TURNS[0], {**TURNS[1], "reasoning_content": "carry"}, *TURNS[2:]]
    with pytest.raises(RowError, match="does not render the thought of turn 2") as caught:
        encoder(Chat("here", thoughts))
    assert "training.assistant_only_loss: true" in caught.value.hint


@pytest.mark.parametrize("whole", [False, True])
def test_tools_and_calls_that_a_template_leaves_out_are_no_silent_loss(tokenizer: Tokenizer, whole: bool) -> None:
    encoder = encoder_of(tokenizer, assistant_only_loss=not whole)
    for messages, tools in (ROWS["call"], (TURNS, TOOLS), ([TURNS[0], CALL], None)):
        with pytest.raises(RowError, match=r"does not render the (call of|tool) add"):
            encoder(Chat("here", messages, tools=tools))
    encoder = encoder_of(tokenizer, read_template("qwen2_5"), assistant_only_loss=not whole)
    text = "".join(learned(tokenizer, encoder(Chat("here", ROWS["call"][0], tools=TOOLS))[0]))
    assert "<tool_call>" in text and ("<tools>" in text) == whole


@pytest.mark.parametrize("template", [None, CHATML_MARKED, FORGETFUL])
def test_context_is_never_learned(tokenizer: Tokenizer, template: str | None) -> None:
    encoder = encoder_of(tokenizer, template)
    [encoded] = encoder(Chat("here", TURNS, context=3))
    assert [piece.strip() for piece in learned(tokenizer, encoded)] == ["four<|im_end|>"]
    whole = encoder_of(tokenizer, template, assistant_only_loss=False)
    [encoded] = whole(Chat("here", TURNS, context=3))
    assert [piece.strip() for piece in learned(tokenizer, encoded)] == ["four<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
            "ends the assistant's turn with no token of its own",
        ),
        (
            CHATML_MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
            "ends the assistant's turn with no token of its own",
        ),
        ("{% for m in messages %}", "is not valid Jinja"),
        ("{{ raise_exception('never') }}", "fails on a question and an answer: never"),
        ("{{ messages[0].content.__class__.__mro__ }}", "fails on a question and an answer"),
    ],
)
def test_unusable_templates_are_refused_with_a_sentence(tokenizer: Tokenizer, template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder_of(tokenizer, template)


def test_no_template_and_no_fast_tokenizer_are_the_users_to_change(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template") as caught:
        encoder_of(tokenizer)
    assert "data.chat_template" in caught.value.hint

    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="slow tokenizer"):
        Encoder(Slow())


def test_a_chat_that_the_template_refuses_is_named(tokenizer: Tokenizer) -> None:
    picky = (
        "{% if messages|length > 2 %}{{ raise_exception('one question only') }}{% endif %}" + tokenizer.chat_template
    )
    encoder = encoder_of(tokenizer, picky)
    assert len(encoder(Chat("a line 1", TURNS[:2]))) == 1
    with pytest.raises(RowError, match="a line 2: it cannot be rendered: one question only"):
        encoder(Chat("a line 2", TURNS))


def test_text_is_learned_whole_with_one_end_and_one_beginning(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer)
    for text in ("abc", "abc<|im_end|>"):
        [encoded] = encoder(Text("here", text))
        assert text_of(tokenizer, encoded) == "abc<|im_end|>"
        assert encoded.labels == encoded.input_ids
    with pytest.raises(RowError, match="a line 3: it cannot be rendered"):
        encoder(Text("a line 3", "half a pair: \ud800"))


def test_completions_are_learned_after_their_prompt(tokenizer: Tokenizer) -> None:
    [encoded] = Encoder(tokenizer)(Completion("here", "2+2=", "4"))
    assert learned(tokenizer, encoded) == ["4<|im_end|>"]
    [encoded] = Encoder(tokenizer, completion_only_loss=False)(Completion("here", "2+2=", "4"))
    assert learned(tokenizer, encoded) == ["2+2=4<|im_end|>"]


def test_there_is_one_beginning_even_if_the_text_brings_its_own(tokenizer: Tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    start = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    encoder = Encoder(tokenizer)
    for text in ("abc", start + "abc"):
        [encoded] = encoder(Text("here", text))
        assert encoded.input_ids[0] == tokenizer.bos_token_id
        assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
        assert encoded.labels[0] in (IGNORED, tokenizer.bos_token_id)
    [encoded] = encoder(Completion("here", start + "2+2=", "4"))
    assert learned(tokenizer, encoded) == ["4<|im_end|>"]


def trls_rows(folder: Path, tokenizer: Tokenizer, rows: list[dict], tmp_path: Path, **settings: bool) -> Dataset:
    """What SFTTrainer itself makes of rows."""
    config = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=None, bf16=False, **settings
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = SFTTrainer(model=model, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows))
    return trainer.train_dataset


def test_marks_prompts_and_text_are_what_trl_makes_of_them(
    tiny_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    own, marked = tokenizer.chat_template, CHATML_MARKED
    cases = [
        (marked, {"messages": TURNS}, Chat("here", TURNS), {"assistant_only_loss": True}),
        (own, {"prompt": TURNS[:3], "completion": TURNS[3:]}, Chat("here", TURNS, context=3), {}),
        (own, {"prompt": "say", "completion": " the thing"}, Completion("here", "say", " the thing"), {}),
        (own, {"text": "in the thing"}, Text("here", "in the thing"), {}),
    ]
    for template, row, example, extra in cases:
        encoder = encoder_of(tokenizer, template)
        [theirs] = trls_rows(tiny_folder, tokenizer, [row], tmp_path, **extra)
        [ours] = encoder(example)
        assert (ours.input_ids, ours.labels) == (theirs["input_ids"], theirs["labels"])


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<|>", exclude_categories=("Cs", "Cc")), max_size=12)
TURNS_OF_WORDS = st.lists(st.tuples(WORDS, WORDS.filter(str.strip)), min_size=1, max_size=4)


@pytest.mark.parametrize("template", [None, CHATML_MARKED], ids=["rendering", "marks"])
def test_all_answers_and_no_questions_are_learned_whatever_they_say(tokenizer: Tokenizer, template: str | None) -> None:
    encoder = encoder_of(tokenizer, template)
    end = "<|im_end|>\n" if template is None else "<|im_end|>"

    @given(TURNS_OF_WORDS, st.booleans())
    @settings(max_examples=60, deadline=None)
    def holds(turns: list[tuple[str, str]], system: bool) -> None:
        messages = [SYSTEM] * system + [m for asked, said in turns for m in (user(asked), assistant(said))]
        [encoded] = encoder(Chat("here", messages))
        assert learned(tokenizer, encoded) == [said + end for _, said in turns]

    holds()
