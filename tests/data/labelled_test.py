"""Answers with a label: the forms in which datasets have them, and the mismatched answers that estimate KL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl.data_utils import maybe_apply_chat_template

from folora_q.data.advice import balance_advice
from folora_q.data.column_guess import guess_labelled
from folora_q.data.encode import Encoder
from folora_q.data.examples import Chat, Completion, Labelled, content_of, has_chats, with_answers
from folora_q.data.formats import detect_format, to_example
from folora_q.data.pairs import answers_to_learn, mismatched, padded_pairs
from folora_q.data.rows import Row, RowError
from folora_q.data.tokenized import UnfitExamples, tokenize
from folora_q.data.tokens import IGNORED
from folora_q.errors import UserError
from folora_q.recipe.dataset import Source
from folora_q.recipe.objectives import ObjectiveName
from folora_q.recipe.training import TrainingSection
from tests.conftest import tiny_tokenizer
from tests.data.preference_test import ASKED, GOOD, HERE, assistant, user


def parse(row: dict[str, Any], objective: ObjectiveName = "kto", **more: Any) -> Any:
    source = Source(path="rows.jsonl", **more)
    return to_example(Row(HERE, row), detect_format(Row(HERE, row), source, objective), source)


def refusal(row: dict[str, Any], objective: ObjectiveName = "kto", **more: Any) -> str:
    with pytest.raises(RowError) as caught:
        parse(row, objective, **more)
    return f"{caught.value.reason}; {caught.value.hint}"


CHAT = Labelled(HERE, Chat(HERE, [ASKED, GOOD], 1), True)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "completion": [GOOD], "label": True},
        {"messages": [ASKED, GOOD], "label": True, "model": "m"},
        {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}], "kto_tag": True},
        {"instruction": "why?", "input": "", "output": "so", "kto_tag": True},
        {"instruction": "why?", "output": "so", "label": 1},
    ],
)
def test_every_conversational_form_is_the_same_example(row: dict[str, Any]) -> None:
    assert parse(row) == CHAT
    assert content_of(parse(row)) == content_of(CHAT) != content_of(Labelled(HERE, CHAT.answer, False))


def test_of_several_turns_only_the_last_has_the_label() -> None:
    turns = [ASKED, GOOD, user("and now?"), assistant("no idea")]
    assert parse({"messages": turns, "label": False}) == Labelled(HERE, Chat(HERE, turns, 3), False)
    row = {"instruction": "and now?", "output": "no idea", "history": [["why?", "so"]], "kto_tag": False}
    assert parse(row) == Labelled(HERE, Chat(HERE, turns, 3), False)


@pytest.mark.parametrize(
    ("label", "desirable"),
    [(True, True), (1, True), (1.0, True), ("True", True), (" 1 ", True), (False, False), (0, False), ("false", False)],
)
def test_labels_are_truth_values_in_any_spelling(label: Any, desirable: bool) -> None:
    assert parse({"prompt": "2+2=", "completion": "4", "label": label}) == Labelled(
        HERE, Completion(HERE, "2+2=", "4"), desirable
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": "b", "label": "good"}, "`label` must be true for a desirable answer"),
        ({"prompt": "a", "completion": "b", "label": None}, "`label` must be true for a desirable answer"),
        ({"prompt": "a", "completion": "b", "label": 2}, "`label` must be true for a desirable answer"),
        ({"prompt": "a", "completion": "b", "label": [1]}, "`label` must be true for a desirable answer"),
        ({"prompt": "a", "completion": "b"}, "training.objective: kto needs answers with a label"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "or set training.objective: dpo"),
        ({"messages": [ASKED, GOOD]}, "or set training.objective: sft"),
        ({"text": "a", "label": True}, "the column `messages` is missing"),
        ({"prompt": "a", "completion": " ", "label": True}, "`completion` is empty"),
    ],
)
def test_what_has_no_answer_or_label_is_refused_with_the_reason(row: dict[str, Any], reason: str) -> None:
    assert reason in refusal(row)


def test_other_objectives_name_the_one_that_the_rows_are_for() -> None:
    row = {"prompt": "a", "completion": "b", "label": False}
    assert "set training.objective: kto" in refusal(row, "sft")
    assert "set training.objective: kto" in refusal(row, "sft", shape="labelled")
    assert "needs pairs" in refusal(row, "dpo") and "set training.objective: kto" in refusal(row, "dpo")
    assert "`kto_tag` is false" in refusal({"instruction": "a", "output": "b", "kto_tag": False}, "sft")
    assert isinstance(parse({"instruction": "a", "output": "b", "kto_tag": True}, "sft"), Chat)


def test_columns_can_have_other_names() -> None:
    row = {"q": "why?", "a": "so", "liked": "false"}
    chat = parse(row, fields={"instruction": "q", "output": "a", "label": "liked"})
    assert chat == Labelled(HERE, CHAT.answer, False)
    text = parse(row, fields={"prompt": "q", "completion": "a", "label": "liked"})
    assert text == Labelled(HERE, Completion(HERE, "why?", "so"), False)


def test_only_desirable_answers_are_to_be_learned() -> None:
    undesirable = Labelled(HERE, Completion(HERE, "a", "b"), False)
    assert with_answers([CHAT, undesirable]) == [CHAT.answer]
    assert has_chats([undesirable, CHAT]) and not has_chats([undesirable])
    rows = {"input_ids": [[1], [2], [3]], "labels": [[4], [5], [6]], "desirable": [True, False, True]}
    assert answers_to_learn(rows) == ([[1], [3]], [[4], [6]])


def test_tokens_are_trls_and_each_answer_is_used_once_as_a_mismatched_one() -> None:
    tokenizer = tiny_tokenizer()
    rows = [
        {"prompt": [user(f"say {i}")], "completion": [assistant("it " * (i + 1))], "label": i % 2 == 0}
        for i in range(5)
    ]
    encoder = Encoder(tokenizer)
    encoder.prepare_chats()
    examples = [parse(row) for row in rows]
    found = tokenize(examples, encoder, UnfitExamples(200, "drop"))
    sequences: Any = list(found.sequences)
    asked, said = [], []
    for row, tokens in zip(rows, sequences, strict=True):
        rendered = maybe_apply_chat_template(dict(row), tokenizer)
        asked.append(tokenizer(rendered["prompt"], add_special_tokens=False)["input_ids"])
        said.append(tokenizer(rendered["completion"], add_special_tokens=False)["input_ids"])
        assert tokens["input_ids"] == asked[-1] + said[-1] and tokens["desirable"] == row["label"]
        assert tokens["labels"] == [IGNORED] * len(asked[-1]) + said[-1]
    others = []
    for number, tokens in enumerate(sequences):
        prompt = len(asked[number])
        assert tokens["mismatched_ids"][:prompt] == asked[number]
        assert tokens["mismatched_labels"] == [IGNORED] * prompt + tokens["mismatched_ids"][prompt:]
        others.append(said.index(tokens["mismatched_ids"][prompt:]))
    assert sorted(others) == list(range(5)) and all(other != number for number, other in enumerate(others))
    assert found.counts.tokens == sum(len(row["input_ids"]) for row in sequences)
    inputs = padded_pairs(sequences)
    assert inputs["input_ids"].shape[:2] == (5, 2) and inputs["desirable"].tolist() == [row["label"] for row in rows]

    with pytest.raises(UserError, match="at least two held-out rows"):
        tokenize(examples[:1], encoder, UnfitExamples(200, "drop"), "held-out")


def test_a_mismatched_answer_is_cut_to_the_length_that_rows_have() -> None:
    ids, labels = [[1, 2, 3], [4, 5, 6]], [[IGNORED, IGNORED, 3], [IGNORED, 5, 6]]
    assert mismatched(ids, labels, 3) == ([[1, 2, 5], [4, 3]], [[IGNORED, IGNORED, 5], [IGNORED, 3]])


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, {"instruction": "prompt", "output": "completion"}),
        ({"prompt": [ASKED], "completion": [GOOD], "label": True}, {}),
        ({"instruction": "a", "output": "b", "kto_tag": False}, {}),
        ({"prompt": "a", "completion": "b", "label": 1}, None),
        ({"text": "a", "label": True}, None),
    ],
)
def test_labels_that_are_truth_values_are_recognized(row: dict[str, Any], fields: dict[str, str] | None) -> None:
    guess = guess_labelled([row, row])
    assert (None if guess is None else guess.fields) == fields


def test_unbalanced_labels_are_told_with_the_weight_that_balances_them() -> None:
    training = TrainingSection(output_dir="run")
    assert balance_advice(training, [True] * 4 + [False] * 4) is None
    assert "set training.undesirable_weight=3" in (balance_advice(training, [True] * 6 + [False] * 2) or "")
    assert "set training.desirable_weight=3" in (balance_advice(training, [True] * 2 + [False] * 6) or "")
    weighted = TrainingSection(output_dir="run", undesirable_weight=3.0)
    assert balance_advice(weighted, [True] * 6 + [False] * 2) is None
    assert "have the label false" in (balance_advice(training, [False] * 3) or "")


def test_the_same_rows_have_the_same_tokens_in_every_run(tmp_path: Path) -> None:
    examples = [parse({"prompt": f"{i}+1=", "completion": f" {i + 1}", "label": True}) for i in range(9)]
    encoder = Encoder(tiny_tokenizer())
    first = tokenize(examples, encoder, UnfitExamples(99, "drop"))
    again = tokenize(examples, encoder, UnfitExamples(99, "drop"))
    assert again.from_cache and list(first.sequences) == list(again.sequences)
