from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from folora_q.data.tokens import IGNORED, batches, text_ids


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


@pytest.mark.parametrize("adds", ["$A", "{bos} $A", "$A {eos}", "{bos} $A {eos}"])
def test_a_prompt_has_the_beginning_that_its_tokenizer_adds_once_and_never_an_end(tiny_folder: Path, adds: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=adds.format(bos=bos, eos=eos),
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)],
    )
    first = bos if "{bos}" in adds else ""
    assert tokenizer.decode(text_ids(tokenizer, "hi")) == first + "hi"
    assert tokenizer.decode(text_ids(tokenizer, bos + "hi")) == bos + "hi"
