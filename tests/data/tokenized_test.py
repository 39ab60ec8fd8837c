"""What is left of a set of examples, what happened to the rest, and when the cache is right to answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from folora_q.data.encode import Encoder
from folora_q.data.examples import Chat, Completion, Text
from folora_q.data.rows import RowError
from folora_q.data.tokenized import Tokenized, UnfitExamples, tokenize
from folora_q.data.tokens import IGNORED
from folora_q.errors import UserError
from tests.data.rows import assistant, user

LONG = "x" * 100
SHORT = Completion("line 1", "a", "b")
EXAMPLES = [SHORT, Completion("line 2", "a", LONG), Completion("line 3", LONG, "b")]


@pytest.fixture
def encoder(tiny_folder: Path) -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(tiny_folder))


def tokens(
    encoder: Encoder,
    examples: list,
    max_length: int = 32,
    overlong: str = "drop",
    skip_errors: bool = False,
    **more: object,
) -> Tokenized:
    return tokenize(examples, encoder, UnfitExamples(max_length, overlong, skip_errors), **more)


def test_what_is_too_long_is_left_out_and_counted(encoder: Encoder) -> None:
    found = tokens(encoder, EXAMPLES)
    counts = found.counts
    assert found.sequences["example"] == [0]
    assert (counts.examples, counts.sequences, counts.overlong, counts.dropped) == (3, 1, 2, 2)
    assert (counts.tokens, counts.trained, counts.longest) == (3, 2, 102)


def test_what_is_cut_keeps_its_beginning_and_is_left_out_if_nothing_is_learned(encoder: Encoder) -> None:
    found = tokens(encoder, EXAMPLES, overlong="truncate")
    counts = found.counts
    assert found.sequences["example"] == [0, 1], "of line 3 only the prompt would be left"
    assert [len(ids) for ids in found.sequences["input_ids"]] == [3, 32]
    assert found.sequences[1]["labels"] == [IGNORED, *found.sequences[1]["input_ids"][1:]]
    assert (counts.cut, counts.untrained, counts.trained) == (2, 1, 2 + 31)


def test_plain_text_is_split_and_nothing_of_it_is_lost(encoder: Encoder) -> None:
    text = "".join(chr(97 + i % 26) for i in range(100))
    found = tokens(encoder, [Text("a file", text), Text("b file", "short")], overlong="split")
    assert found.sequences["example"] == [0, 0, 0, 0, 1]
    pieces = [encoder.tokenizer.decode(ids) for ids in found.sequences["input_ids"][:4]]
    assert "".join(pieces) == text + "<|im_end|>"
    assert found.counts.split == 1
    with pytest.raises(UserError, match="line 2 has 102 tokens, .* split is for plain text"):
        tokens(encoder, EXAMPLES, overlong="split")


def test_what_is_too_long_can_be_an_error_that_names_it(encoder: Encoder) -> None:
    with pytest.raises(UserError, match=r"line 2 has 102 tokens, more than training.max_length \(32\)"):
        tokens(encoder, EXAMPLES, overlong="raise")


def test_nothing_left_is_an_error_with_every_reason(encoder: Encoder) -> None:
    encoder.tokenizer.chat_template = (
        "{% if messages|length > 2 %}{{ raise_exception('no') }}{% endif %}" + encoder.tokenizer.chat_template
    )
    encoder.prepare_chats()
    refused = Chat("line 9", [user("a"), assistant("b"), user("c"), assistant("d")])
    with pytest.raises(UserError) as caught:
        tokens(encoder, [*EXAMPLES[1:], refused], kind="held-out", skip_errors=True)
    assert caught.value.message == (
        "none of the 3 held-out examples can be used: 2 are longer than training.max_length (32; the longest: 102), "
        "1 cannot be used; the first is line 9: it cannot be rendered: no"
    )


def test_what_the_template_refuses_stops_or_is_counted(encoder: Encoder) -> None:
    encoder.tokenizer.chat_template = (
        "{% if messages|length > 2 %}{{ raise_exception('no') }}{% endif %}" + encoder.tokenizer.chat_template
    )
    encoder.prepare_chats()
    good = Chat("line 1", [user("a"), assistant("b")])
    bad = Chat("line 2", [user("a"), assistant("b"), user("c"), assistant("d")])
    with pytest.raises(RowError, match="line 2"):
        tokens(encoder, [good, bad], max_length=200)
    for _ in range(2):  # the second time from the cache
        found = tokens(encoder, [good, bad, good], max_length=200, skip_errors=True)
        assert found.sequences["example"] == [0, 2]
        assert [tuple(refusal) for refusal in found.counts.refused] == [(1, "it cannot be rendered: no")]
    assert found.from_cache


def test_progress_counts_every_example_with_and_without_the_cache(encoder: Encoder) -> None:
    for _ in range(2):
        seen: list[int] = []
        tokens(encoder, EXAMPLES, on_progress=seen.append)
        assert sum(seen) == 3


def test_the_same_is_found_again_wherever_it_lay(encoder: Encoder) -> None:
    first = tokens(encoder, EXAMPLES, 200)
    moved = [Completion(f"elsewhere {i}", e.prompt, e.completion) for i, e in enumerate(EXAMPLES)]
    second = tokens(encoder, moved, 200)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert second.sequences.to_dict() == first.sequences.to_dict()
    assert second.counts == first.counts


def test_anything_that_matters_is_made_anew(encoder: Encoder, tiny_folder: Path) -> None:
    chat = [Chat("line 1", [user("a"), assistant("b")])]
    encoder.prepare_chats()

    def made(encoder: Encoder = encoder, examples: list = chat, max_length: int = 200, overlong: str = "drop") -> bool:
        return not tokens(encoder, examples, max_length, overlong).from_cache

    assert made()
    assert not made()
    assert made(examples=[Chat("line 1", [user("a"), assistant("c")])])
    assert made(examples=[Chat("line 1", [user("a"), assistant("b")], context=1)])
    assert made(max_length=201)
    assert made(overlong="truncate")

    def other(**settings: bool) -> Encoder:
        fresh = Encoder(AutoTokenizer.from_pretrained(tiny_folder), **settings)
        fresh.prepare_chats()
        return fresh

    assert not made(other())
    assert made(other(assistant_only_loss=False))
    with_another_template = AutoTokenizer.from_pretrained(tiny_folder)
    with_another_template.chat_template += "{# changed #}"
    fresh = Encoder(with_another_template)
    fresh.prepare_chats()
    assert made(fresh)
    with_another_token = AutoTokenizer.from_pretrained(tiny_folder)
    with_another_token.add_tokens(["zz"])
    fresh = Encoder(with_another_token)
    fresh.prepare_chats()
    assert made(fresh)
