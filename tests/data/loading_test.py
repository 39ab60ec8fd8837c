"""All rows of a recipe: held out, weighted, cut to size, and left out where they cannot be used."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from folora_q.data.examples import Completion, Example, Text
from folora_q.data.loading import SourceFacts, TaskData, examine, read_task_data
from folora_q.errors import UserError
from folora_q.recipe.dataset import DataSection, Source
from tests.data.rows import assistant, user, write_jsonl

CHAT = {"messages": [user("hi"), assistant("yo")]}


def texts(name: str, count: int) -> list[dict[str, Any]]:
    return [{"text": f"{name} {number}"} for number in range(count)]


def read(*sources: object, seed: int = 0, **more: object) -> TaskData:
    """Sources are paths, or mappings with one."""
    given = [source if isinstance(source, dict) else {"path": str(source)} for source in sources]
    return read_task_data(DataSection(train_dataset=given, **more), seed)


def refusal(*sources: object, **more: object) -> UserError:
    with pytest.raises(UserError) as caught:
        read(*sources, **more)
    return caught.value


def said(examples: Iterable[Example]) -> list[str]:
    return [example.text for example in examples if isinstance(example, Text)]


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", texts("a", 100))


@pytest.fixture
def b(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "b.jsonl", texts("b", 40))


@pytest.mark.parametrize(
    ("size", "from_a", "from_b"),
    [(0.05, 5, 2), (0.1, 10, 4), (0.001, 1, 1), (0.9, 90, 36), (6, 3, 3), (5, 3, 2), (1, 1, 0)],
)
def test_every_source_gives_its_share_or_its_part_of_a_number(
    a: Path, b: Path, size: float, from_a: int, from_b: int
) -> None:
    task = read(a, b, eval_size=size)
    held = said(task.heldout)
    assert Counter(text[0] for text in held) == Counter(a=from_a, b=from_b)
    assert Counter(said(task.train) + held) == Counter(row["text"] for row in texts("a", 100) + texts("b", 40))


def test_what_is_held_out_is_drawn_from_anywhere_and_both_halves_keep_their_order(a: Path) -> None:
    task = read(a, eval_size=0.5)
    numbers = [[int(text.split()[1]) for text in said(half)] for half in (task.train, task.heldout)]
    assert numbers == [sorted(half) for half in numbers]
    assert 10 < sum(number < 50 for number in numbers[1]) < 40


@pytest.mark.parametrize(
    ("rows", "size", "count"), [(1, 0.5, 1), (2, 2, 2), (3, 100, 100), (3, 0.9, 3), (40, 0.99, 40)]
)
def test_too_few_rows_to_hold_some_out_are_refused(tmp_path: Path, rows: int, size: float, count: int) -> None:
    path = write_jsonl(tmp_path / "few.jsonl", [CHAT] * rows)
    error = refusal(path, eval_size=size)
    assert error.message == f"few.jsonl has {rows} row{'s' * (rows > 1)}: too few to hold {count} out for evaluation"
    assert error.hint == "name a data.eval_dataset, or set a smaller data.eval_size"


@pytest.mark.parametrize("share", [0.05, 0.25, 0.9])
def test_a_single_document_is_cut_in_two_at_a_line(tmp_path: Path, share: float) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {number}\n" for number in range(1000)))
    task = read(path, eval_size=share)
    [start], [end] = said(task.train), said(task.heldout)
    assert start + end == path.read_text() and end.startswith("line ")
    assert len(end) / len(start + end) == pytest.approx(share, abs=0.001)
    assert (task.train[0].where, task.heldout[0].where) == (str(path), str(path))


@pytest.mark.parametrize("text", ["no line end", "one line\n", "   \n  \na last line", "a first line\n \n"])
def test_a_document_without_two_halves_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "short.md").write_text(text)
    assert refusal(tmp_path / "short.md").message == f"{tmp_path / 'short.md'} is too short to hold its end out"


def test_a_single_document_cannot_give_a_number_of_rows(tmp_path: Path) -> None:
    (tmp_path / "book.md").write_text("a\n" * 100)
    assert "book.md has 1 row: too few to hold 3 out" in refusal(tmp_path / "book.md", eval_size=3).message


@pytest.mark.parametrize(
    ("weight", "counts"), [(1, {1: 80}), (2, {2: 80}), (0.5, {1: 40}), (1.5, {1: 40, 2: 40}), (0.01, {1: 1})]
)
def test_a_weight_says_how_often_a_row_counts(a: Path, weight: float, counts: dict[int, int]) -> None:
    task = read({"path": str(a), "weight": weight}, eval_size=0.2)
    assert Counter(Counter(said(task.train)).values()) == counts
    assert len(set(said(task.heldout))) == len(task.heldout) == 20
    assert task.facts == [SourceFacts(str(a), "text", 100, 100)]


def test_half_of_the_rows_are_a_random_half(a: Path) -> None:
    half = said(read({"path": str(a), "weight": 0.5}).train)
    assert not set(half) <= {row["text"] for row in texts("a", 60)}
    assert not set(half) <= {row["text"] for row in texts("a", 100)[40:]}


def test_a_weight_that_leaves_no_row_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts("a", 5))
    assert refusal({"path": str(path), "weight": 0.01}).message == "no training row is left"


@pytest.mark.parametrize("weight", [0, -1, 1001, 1e300, float("nan")])
def test_a_weight_that_no_memory_holds_is_no_weight(weight: float) -> None:
    with pytest.raises(ValidationError, match="weight"):
        Source(path="a.jsonl", weight=weight)


def test_at_most_so_many_rows_of_all_sources_together_are_used(a: Path, b: Path) -> None:
    task = read(a, b, max_train_samples=30, max_eval_samples=3, eval_size=0.5)
    assert (len(task.train), len(task.heldout)) == (30, 3)
    assert {text[0] for text in said(task.train)} == {"a", "b"}, "drawn, not the first"
    assert said(task.train) == sorted(said(task.train), key=lambda text: (text[0], int(text.split()[1])))
    everything = read(a, b, max_train_samples=1000, max_eval_samples=70, eval_size=0.5)
    assert (len(everything.train), len(everything.heldout)) == (70, 70)


def test_with_rows_for_evaluation_nothing_is_held_out(a: Path, b: Path) -> None:
    task = read(a, eval_dataset=[str(b)], eval_size=0.5)
    assert said(task.train) == [row["text"] for row in texts("a", 100)]
    assert said(task.heldout) == [row["text"] for row in texts("b", 40)]
    assert task.facts == [SourceFacts(str(a), "text", 100, 100), SourceFacts(str(b), "text", 40, 40)]


def test_held_out_examples_that_the_training_data_repeat_are_counted(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "1", "completion": "a"}, CHAT])
    train.write_text(train.read_text().splitlines()[0])
    rows = [{"prompt": "1", "completion": "a", "id": 9}, {"prompt": "1", "completion": "b"}]
    heldout = write_jsonl(tmp_path / "heldout.jsonl", [*rows, rows[0]])
    assert read(train, eval_dataset=[str(heldout)]).repeated == 2
    assert read(heldout, eval_dataset=[str(train)]).repeated == 1
    assert read(write_jsonl(tmp_path / "x.jsonl", texts("x", 4))).repeated == 0


def test_shapes_may_differ_between_sources_but_not_within_one(tmp_path: Path, a: Path) -> None:
    chats = write_jsonl(tmp_path / "chats.jsonl", [CHAT] * 4)
    assert [facts.shape for facts in read(a, chats).facts] == ["text", "messages"]
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [CHAT, CHAT, {"text": "x"}, CHAT])
    assert refusal(mixed).message == (
        f"{mixed} line 3: its columns are those of `text`, but the rows before it are `messages`"
    )
    task = read(mixed, on_error="skip")
    assert len(task.train + task.heldout) == 3 and [error.where for error in task.skipped] == [f"{mixed} line 3"]


def test_rows_that_cannot_be_used_are_skipped_and_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = ['{"prompt": "1", "completion": "a"}', "{x}", '{"prompt": "2"}', '{"prompt": "3", "completion": null}']
    path.write_bytes("\n".join([*rows, '{"prompt": "4", "completion": "b"}\n']).encode() + b'{"prompt": "\xff"}')
    assert refusal(path).message.startswith(f"{path} line 2: it is not JSON")
    task = read(path, on_error="skip", eval_size=1)
    assert {example.where for example in task.train + task.heldout} == {f"{path} line 1", f"{path} line 5"}
    assert sorted((error.where, error.reason) for error in task.skipped) == [
        (f"{path} line 2", "it is not JSON: Expecting property name enclosed in double quotes at column 2"),
        (f"{path} line 3", "its columns (prompt) match no known format"),
        (f"{path} line 4", "`completion` must be text, not null"),
        (f"{path} line 6", "it is not UTF-8 text: byte 12 is 0xff"),
    ]
    assert task.facts == [SourceFacts(str(path), "prompt_completion", 2, 6)]


def test_rows_skipped_for_evaluation_are_told_too(tmp_path: Path, a: Path) -> None:
    heldout = write_jsonl(tmp_path / "heldout.jsonl", [{"text": ""}, {"text": "x"}])
    task = read(a, eval_dataset=[str(heldout)], on_error="skip")
    assert [error.message for error in task.skipped] == [f"{heldout} line 1: `text` is empty"]
    assert said(task.heldout) == ["x"]


def test_when_no_row_can_be_used_skipping_raises_all_the_same(tmp_path: Path, a: Path) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [{"text": None}])
    for sources, more in (([path], {}), ([a, path], {}), ([a], {"eval_dataset": [str(path)]})):
        assert refusal(*sources, on_error="skip", **more).message == (
            f"no row of {path} can be used; the first: {path} line 1: `text` must be text, not null"
        )


def test_when_no_row_can_be_used_the_first_is_told(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [{"text": 1}, {"text": None}, {"text": ""}])
    assert f"the first: {path} line 1: " in refusal(path, on_error="skip").message


def test_a_skipped_row_does_not_decide_the_shape_of_the_others(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": None}, *[CHAT] * 9])
    task = read(path, on_error="skip")
    assert len(task.train + task.heldout) == 9 and len(task.skipped) == 1


@pytest.mark.parametrize(
    ("weight", "more"),
    [
        (1, {"eval_size": 0.2}),
        (0.5, {"eval_dataset": "b.jsonl"}),
        (1.5, {"eval_dataset": "b.jsonl"}),
        (1, {"eval_dataset": "b.jsonl", "max_train_samples": 50}),
        (1, {"eval_dataset": "b.jsonl", "max_eval_samples": 20}),
    ],
)
def test_the_same_seed_draws_the_same_rows_and_another_others(
    a: Path, b: Path, weight: float, more: dict[str, Any]
) -> None:
    more = {key: str(b) if value == b.name else value for key, value in more.items()}
    drawn = [read({"path": str(a), "weight": weight}, seed=seed, **more) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_source_more_leaves_what_the_others_hold_out_as_it_was(a: Path, b: Path) -> None:
    alone = said(read(a).heldout)
    assert said(read(a, b).heldout)[: len(alone)] == alone


def test_a_look_at_a_source_reads_no_further_than_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1", "completion": "a"}\n' * 5 + "broken\n")
    source = Source(path=str(path))
    assert examine(source, 5, "raise") == SourceFacts(str(path), "prompt_completion", 5, 5)
    assert examine(source, None, "skip") == SourceFacts(str(path), "prompt_completion", 5, 6)
    for rows in (6, None):
        with pytest.raises(UserError, match=r"rows\.jsonl line 6: it is not JSON"):
            examine(source, rows, "raise")


def test_rows_come_with_their_places(a: Path) -> None:
    task = read(a, eval_size=1)
    for example in task.train + task.heldout:
        assert isinstance(example, Text)
        assert example.where == f"{a} line {int(example.text.split()[1]) + 1}"


@settings(max_examples=100, deadline=None)
@given(
    sources=st.lists(st.tuples(st.integers(2, 30), st.floats(0.05, 3.5)), min_size=1, max_size=4),
    size=st.floats(0.01, 0.6) | st.integers(1, 12),
    seed=st.integers(0, 5),
)
def test_training_and_held_out_rows_never_meet(sources: list[tuple[int, float]], size: float, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given = []
        for number, (rows, weight) in enumerate(sources):
            pairs = [{"prompt": f"{number}", "completion": f"{row}"} for row in range(rows)]
            path = write_jsonl(Path(folder) / f"{number}.jsonl", pairs)
            given.append({"path": str(path), "weight": weight})
        shares = [size // len(sources) + (number < size % len(sources)) for number in range(len(sources))]
        held = [max(1, round(rows * size)) if size < 1 else shares[n] for n, (rows, _) in enumerate(sources)]
        left = [rows - count for (rows, _), count in zip(sources, held, strict=True)]
        if min(left) <= 0:
            assert "too few" in refusal(*given, eval_size=size, seed=seed).message
            return
        extra = [round(count * (weight % 1)) for count, (_, weight) in zip(left, sources, strict=True)]
        sizes = [count * int(weight) + more for count, more, (_, weight) in zip(left, extra, sources, strict=True)]
        if not sum(sizes):
            assert "no training row is left" in refusal(*given, eval_size=size, seed=seed).message
            return
        task = read(*given, eval_size=size, seed=seed)

    def keys(examples: list[Example]) -> list[tuple[int, int]]:
        return [(int(e.prompt), int(e.completion)) for e in examples if isinstance(e, Completion)]

    heldout, train = keys(task.heldout), Counter(keys(task.train))
    assert not set(heldout) & set(train) and len(set(heldout)) == len(heldout) and task.repeated == 0
    for number, (rows, weight) in enumerate(sources):
        assert sum(source == number for source, _ in heldout) == held[number]
        counts = [train[number, row] for row in range(rows) if (number, row) not in heldout]
        assert sum(counts) == sizes[number]
        assert set(counts) <= {int(weight), int(weight) + (1 if extra[number] else 0)}


def test_columns_of_mixed_kinds_that_nothing_is_learned_from_are_no_obstacle(tmp_path: Path) -> None:
    """Readers that make one table of a file refuse it: an id that is now a number, a column that is null at first."""
    rows = [{**CHAT, "id": number if number % 2 else f"x{number}", "tags": None} for number in range(30)]
    rows[20]["tags"] = {"a": [1, "b"]}
    rows[21]["tags"] = ["c"]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    write_jsonl(tmp_path / "lines.jsonl", rows)
    task = read(tmp_path, eval_size=1)
    assert len(task.train + task.heldout) == 60 and not task.skipped
