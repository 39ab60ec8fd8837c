from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from folora_q.data.formats import Chat, Completion
from folora_q.data.tokens import IGNORED, batches, prompt_ids
from tests.data.rows import assistant, user


def test_batches_hold_every_sequence_once_longest_first_and_pad_by_length() -> None:
    sequences = [[5], [7, 8, 9], [0, 0]]  # zeros are tokens here, and the padding too
    (first, second) = batches(sequences, 2, torch.device("cpu"), labels=[[5], [IGNORED, 8, 9], [0, 0]])
    assert first.input_ids.tolist() == [[7, 8, 9], [0, 0, 0]]
    assert first.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert first.labels.tolist() == [[IGNORED, 8, 9], [0, 0, IGNORED]]
    assert second.input_ids.tolist() == [[5]]


def test_batches_can_be_larger_where_sequences_are_shorter() -> None:
    sequences = [list(range(5, 5 + length)) for length in (1, 6, 2, 3, 12, 2)]
    found = list(batches(sequences, lambda length: 12 // length, torch.device("cpu")))
    assert [tuple(batch.input_ids.shape) for batch in found] == [(1, 12), (2, 6), (3, 2)]
    assert sorted(int(batch.attention_mask.sum()) for batch in found) == [5, 9, 12]


def test_prompts_end_where_the_answer_begins(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    chat, text = Chat("here", [user("hi"), assistant("yo")]), Completion("here", "hi", "yo")
    assert tokenizer.decode(prompt_ids(tokenizer, chat)) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt_ids(tokenizer, text)) == "hi"
