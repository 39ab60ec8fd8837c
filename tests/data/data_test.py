from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from folora_q.data.formats import to_examples
from folora_q.data.sources import read_jsonl
from folora_q.data.tokens import IGNORED, batches, prompt_ids
from folora_q.errors import UserError

HERE = Path("data.jsonl")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_jsonl_reads_unicode_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes('\ufeff{"a": "ü"}\n\n{"a": "\u2028"}\r\n'.encode())
    assert read_jsonl(path) == [{"a": "ü"}, {"a": "\u2028"}]
    assert read_jsonl(path, max_rows=1) == [{"a": "ü"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": }\n', "line 2 is not JSON"),
        (b'{"a": 1}\n[1]\n', "line 2 must be an object"),
        (b"\n\n", "holds no rows"),
        (b'{"a": "\xff"}\n', "is not UTF-8 text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_jsonl(path)


def test_every_assistant_turn_is_an_example_with_all_turns_before_it() -> None:
    turns = [{"role": "system", "content": "s"}, user("1"), assistant("a"), user("2"), assistant("b")]
    first, second = to_examples([{"messages": turns}], HERE)
    assert (first.prompt, first.completion, first.reference) == (turns[:2], turns[2:3], "a")
    assert (second.prompt, second.completion, second.reference) == (turns[:4], turns[4:], "b")


def test_prompt_and_completion_rows_stay_text() -> None:
    (example,) = to_examples([{"prompt": "2+2=", "completion": "4"}], HERE)
    assert (example.prompt, example.completion, example.reference) == ("2+2=", "4", "4")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "x"}], r"data.jsonl row 1 has neither `messages` nor"),
        ([{"prompt": "x", "completion": 1}], "row 1 has neither"),
        ([{"messages": []}], "must be a list of turns"),
        ([{"messages": [user("x"), {"role": "assistant"}]}], r"messages\[1\] needs a `role` and a `content`"),
        ([{"messages": [user("x")]}], "no assistant turn follows"),
        ([{"messages": [assistant("x")]}], "no assistant turn follows"),
        ([{"prompt": "x", "completion": "y"}, {"messages": [user("x"), assistant("y")]}], "mixes"),
    ],
)
def test_other_shapes_are_refused_by_row_and_field(rows: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_examples(rows, HERE)


def test_batches_hold_every_sequence_once_longest_first_and_pad_by_length() -> None:
    sequences = [[5], [7, 8, 9], [0, 0]]  # zeros are tokens here, and the padding too
    (first, second) = batches(sequences, 2, torch.device("cpu"), labels=[[5], [IGNORED, 8, 9], [0, 0]])
    assert first.input_ids.tolist() == [[7, 8, 9], [0, 0, 0]]
    assert first.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert first.labels.tolist() == [[IGNORED, 8, 9], [0, 0, IGNORED]]
    assert second.input_ids.tolist() == [[5]]


def test_prompts_end_where_the_answer_begins(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    chat, text = (
        to_examples([{"messages": [user("hi"), assistant("yo")]}], HERE),
        to_examples([{"prompt": "hi", "completion": "yo"}], HERE),
    )
    assert tokenizer.decode(prompt_ids(tokenizer, chat[0])) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(prompt_ids(tokenizer, text[0])) == "hi"
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        prompt_ids(tokenizer, chat[0])


def test_json_lines_of_the_demo_fit_the_reader() -> None:
    folder = Path(__file__).parents[2] / "recipes" / "demo"
    for name in ("train.jsonl", "heldout.jsonl"):
        examples = to_examples(read_jsonl(folder / name), folder / name)
        assert all(json.loads(example.reference) for example in examples)
