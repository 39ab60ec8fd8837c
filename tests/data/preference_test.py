"""Pairs of answers: the forms in which datasets have them, what their prompt is, and their tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt

from folora_q.data.encode import Encoder
from folora_q.data.examples import Chat, Completion, Preference, content_of
from folora_q.data.formats import detect_format, to_example
from folora_q.data.loading import read_task_data
from folora_q.data.pairs import in_order, padded_pairs, sequences_of
from folora_q.data.rows import Row, RowError
from folora_q.data.tokenized import UnfitExamples, tokenize
from folora_q.data.tokens import IGNORED, batches
from folora_q.recipe.dataset import DataSection, Source
from tests.conftest import tiny_tokenizer

HERE = "rows.jsonl line 1"
Message = dict[str, str]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def parse(row: dict[str, Any], **more: Any) -> Preference:
    source = Source(path="rows.jsonl", **more)
    example = to_example(Row(HERE, row), detect_format(Row(HERE, row), source, "dpo"), source)
    assert isinstance(example, Preference)
    return example


def refusal(row: dict[str, Any], **more: Any) -> str:
    with pytest.raises(RowError) as caught:
        parse(row, **more)
    return caught.value.reason


ASKED, GOOD, BAD = user("why?"), assistant("so"), assistant("no idea")
PAIR = Preference(HERE, Chat(HERE, [ASKED, GOOD], 1), Chat(HERE, [ASKED, BAD], 1))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "why?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD]},
        {"prompt": "why?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": "so", "rejected": "no idea"},
        {"prompt": "", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": None, "chosen": [{"from": "human", "value": "why?"}, GOOD], "rejected": [ASKED, BAD]},
        {"instruction": "why?", "chosen": "so", "rejected": "no idea"},  # LLaMA-Factory
        {"instruction": "why?", "input": "", "prompt": None, "chosen": [GOOD], "rejected": BAD},
        {
            "conversations": [{"from": "human", "value": "why?"}],
            "chosen": {"from": "gpt", "value": "so"},
            "rejected": {"from": "gpt", "value": "no idea"},
        },
        {"messages": [ASKED], "chosen": GOOD, "rejected": BAD},  # axolotl
    ],
)
def test_every_conversational_form_is_the_same_pair(row: dict[str, Any]) -> None:
    assert parse(row) == PAIR
    assert content_of(parse(row)) == content_of(PAIR) != content_of(Preference(HERE, PAIR.rejected, PAIR.chosen))


def test_a_system_prompt_and_mapped_columns_belong_to_both_sides() -> None:
    row = {"q": "why?", "better": [GOOD], "worse": [BAD], "system": "be brief"}
    found = parse(row, fields={"prompt": "q", "chosen": "better", "rejected": "worse"})
    system = {"role": "system", "content": "be brief"}
    assert found.chosen == Chat(HERE, [system, ASKED, GOOD], 2) and found.rejected == Chat(
        HERE, [system, ASKED, BAD], 2
    )


def test_an_input_follows_the_instruction_and_a_question_can_be_mapped_to_it() -> None:
    found = parse({"instruction": "why?", "input": "the sky", "chosen": "so", "rejected": "no"})
    assert cast(Chat, found.chosen).messages[0] == user("why?\n\nthe sky")
    row = {"system": "be brief", "question": "why now?", "chosen": "so", "rejected": "no idea"}
    assert "has a system prompt, which only a chat template can render" in refusal(row)
    chosen = cast(Chat, parse(row, fields={"instruction": "question"}).chosen)
    assert chosen.messages == [{"role": "system", "content": "be brief"}, user("why now?"), GOOD]


@pytest.mark.parametrize("column", ["question", "User Prompt", "input"])
def test_a_prompt_under_another_name_is_not_lost(column: str) -> None:
    row = {column: "why is it so?", "chosen": "it rained", "rejected": "it snowed", "id": "a b"}
    assert f"`{column}` seems to be the prompt, and is not mapped" in refusal(row)
    assert parse(row, fields={"prompt": column}).chosen == Completion(HERE, "why is it so?", "it rained")
    assert cast(Chat, parse(row, fields={"instruction": column}).chosen).messages[0] == user("why is it so?")


def test_text_is_a_prompt_with_two_continuations_given_or_found_as_trl_finds_it() -> None:
    given = parse({"prompt": "2+2=", "chosen": "4", "rejected": "5"})
    assert given.chosen == Completion(HERE, "2+2=", "4") and given.rejected == Completion(HERE, "2+2=", "5")
    row: dict[str, Any] = {"chosen": "Human: why? Assistant: it is so", "rejected": "Human: why? Assistant: it rains"}
    found, trls = parse(row), maybe_extract_prompt(dict(row))
    for name, side in (("chosen", found.chosen), ("rejected", found.rejected)):
        assert isinstance(side, Completion) and (side.prompt, side.completion) == (trls["prompt"], trls[name])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "`chosen` and `rejected` are the same"),
        ({"chosen": "a b", "rejected": "a b c"}, "one is the beginning of the other"),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [GOOD]}, "do not differ in an assistant's turn"),
        ({"chosen": [user("a"), GOOD], "rejected": [user("b"), GOOD]}, "do not differ in an assistant's turn"),
        (
            {"prompt": [ASKED], "chosen": [user("and?"), GOOD], "rejected": [BAD]},
            "do not differ in an assistant's turn",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "`rejected` must be text, not null"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "`rejected` is empty"),
        ({"messages": [ASKED, GOOD]}, "training.objective: dpo needs pairs"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "d"}, "it has a system prompt"),
    ],
)
def test_what_is_no_pair_is_refused_with_the_reason(row: dict[str, Any], reason: str) -> None:
    assert reason in refusal(row)


def test_tokens_are_trls_and_an_overlong_answer_drops_or_cuts_both(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = [
        {"prompt": [user(f"say {i}")], "chosen": [assistant("it " * (i + 1))], "rejected": [assistant(f"no {i}")]}
        for i in range(4)
    ]
    encoder = Encoder(tokenizer)
    encoder.prepare_chats()
    examples = [parse(row) for row in rows]
    found = tokenize(examples, encoder, UnfitExamples(200, "drop"))
    assert found.counts.sequences == 4
    sequences: list[dict[str, Any]] = list(cast(Any, found.sequences))
    for row, tokens in zip(rows, sequences, strict=True):
        rendered = maybe_apply_chat_template(dict(row), tokenizer)
        asked = tokenizer(rendered["prompt"], add_special_tokens=False)["input_ids"]
        for name, ids, labels in (("chosen", "input_ids", "labels"), ("rejected", "rejected_ids", "rejected_labels")):
            said = tokenizer(rendered[name], add_special_tokens=False)["input_ids"]
            assert tokens[ids] == asked + said and tokens[labels] == [IGNORED] * len(asked) + said
    lengths = [max(len(row["input_ids"]), len(row["rejected_ids"])) for row in sequences]
    assert found.counts.tokens == sum(len(row[name]) for row in sequences for name in ("input_ids", "rejected_ids"))
    limit = sorted(lengths)[1]
    dropped = tokenize(examples, encoder, UnfitExamples(limit, "drop"))
    assert (dropped.counts.sequences, dropped.counts.dropped) == (2, 2)
    cut = tokenize(examples, encoder, UnfitExamples(limit, "truncate"))
    assert cut.counts.cut == 2 and max(map(len, sequences_of(cut.sequences[:])[0])) == limit


def test_the_longest_pairs_come_first_with_sequences_of_together() -> None:
    rows = {
        "input_ids": [[1], [2, 2], [3]],
        "labels": [[1], [2, IGNORED], [3]],
        "rejected_ids": [[4, 4], [5], [6, 6, 6]],
        "rejected_labels": [[4, 4], [5], [6, 6, IGNORED]],
    }
    ids, labels = in_order(*sequences_of(rows))
    assert ids == [[3], [6, 6, 6], [1], [4, 4], [2, 2], [5]]
    assert labels == [[3], [6, 6, IGNORED], [1], [4, 4], [2, IGNORED], [5]]
    made = list(batches(ids, 4, torch.device("cpu"), labels, sort=False))
    assert [batch.input_ids.shape for batch in made] == [(4, 3), (2, 2)]
    inputs = padded_pairs([{name: column[i] for name, column in rows.items()} for i in range(3)])
    assert inputs["input_ids"].shape == (3, 2, 3) and inputs["attention_mask"].sum() == 10
    assert inputs["labels"][2].tolist() == [[3, IGNORED, IGNORED], [6, 6, IGNORED]]


def test_rows_of_both_kinds_are_told_apart_by_the_objective(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD], "model": "m"}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    section = DataSection(train_dataset=[Source(path=str(path))], eval_size=1)
    assert {type(example) for example in read_task_data(section, 0).train} == {Chat}
    assert {type(example) for example in read_task_data(section, 0, "dpo").train} == {Preference}
    assert read_task_data(section, 0, "dpo").facts[0].unused == ("model",)
