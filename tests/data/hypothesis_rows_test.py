"""Whatever a file holds, reading it gives examples or a UserError, never anything else."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from folora_q.data.examples import Chat, Completion, Example, Text
from folora_q.data.file_readers import READERS
from folora_q.data.loading import TaskData, read_task_data
from folora_q.data.rows import RowError
from folora_q.data.turns import ROLES
from folora_q.errors import UserError
from folora_q.recipe.dataset import DataSection

COLUMNS = "messages conversations prompt completion instruction input output system text tools history images".split()
KEYS = "reasoning_content thinking tool_calls function_call weight train channel name function arguments type".split()
NAMES = ["role", "content", "from", "value", *COLUMNS, *KEYS]
SHAPES = ["messages", "sharegpt", "alpaca", "prompt_completion", "text"]

# Half surrogates of JSON's escapes among them, and what terminals, CSV and templates take for their own.
texts = st.text(max_size=12) | st.sampled_from(["", " ", "a\nb", "\ud800", "\x1b[2J", "\x00", '"', "{{ x }}", "\u2028"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | texts, inner, max_size=3),
    max_leaves=6,
)
words = st.text(min_size=1, max_size=8).filter(str.strip)
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": words}), min_size=1, max_size=2)


@st.composite
def good_turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    role, content = draw(st.sampled_from([("role", "content"), ("from", "value")]))
    roles = ["system"] * draw(st.booleans()) + ["human", "gpt"] * draw(st.integers(1, 3))
    return [{role: name, content: draw(words | parts if content == "content" else words)} for name in roles]


odd_turns = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from([*ROLES, "robot"]) | values,
            "content": words | parts | values,
            "from": st.sampled_from(list(ROLES)),
            "value": texts,
            **dict.fromkeys(KEYS, values),
        },
    )
    | values,
    max_size=4,
)
turns = good_turns() | good_turns() | odd_turns
good_rows = [
    st.fixed_dictionaries({"messages": good_turns()}),
    st.fixed_dictionaries({"conversations": good_turns()}, optional={"id": values}),
    st.fixed_dictionaries({"prompt": words, "completion": words}, optional={"meta": values}),
    st.fixed_dictionaries({"instruction": words, "output": words}, optional={"input": words, "system": st.none()}),
    st.fixed_dictionaries({"text": words}),
]
odd_rows = st.dictionaries(st.sampled_from(COLUMNS) | texts, words | turns | values, max_size=5) | values


@st.composite
def row_lists(draw: st.DrawFn) -> list[Any]:
    """Rows of one shape, and in half of the files others among them."""
    good = draw(st.sampled_from(good_rows))
    rows = good | good | good | odd_rows if draw(st.booleans()) else good
    return [draw(good), *draw(st.lists(rows, max_size=8))]


def as_csv(rows: list[Any], delimiter: str) -> bytes:
    objects = [row for row in rows if isinstance(row, dict)]
    header = list(dict.fromkeys(key for row in objects for key in row))
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(header)
    writer.writerows(
        [value if isinstance(value := row.get(key), str) else json.dumps(value) for key in header] for row in objects
    )
    return file.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows: list[Any]) -> bytes:
    """Text columns, with null where a row has none."""
    objects = [row for row in rows if isinstance(row, dict)]
    names = sorted({key for row in objects for key in row})
    cells = {
        name: [json.dumps(row[name]) if name in row and row[name] is not None else None for row in objects]
        for name in names
    }
    sink = pyarrow.BufferOutputStream()
    columns = [pyarrow.array(values, pyarrow.string()) for values in cells.values()]
    parquet.write_table(pyarrow.table(columns, names=[json.dumps(name)[1:-1] for name in names]), sink)
    return sink.getvalue().to_pybytes()


def as_file(rows: list[Any], ending: str) -> bytes:
    match ending:
        case ".jsonl":
            return "".join(json.dumps(row) + "\n" for row in rows).encode()
        case ".json":
            return json.dumps(rows, indent=1).encode()
        case ".csv" | ".tsv":
            return as_csv(rows, "," if ending == ".csv" else "\t")
        case ".parquet":
            return as_parquet(rows)
        case _:
            return "\n".join(str(row) for row in rows).encode("utf-8", "surrogatepass")


sections = st.fixed_dictionaries(
    {
        "source": st.fixed_dictionaries(
            {},
            optional={
                "weight": st.floats(0.05, 3),
                "shape": st.sampled_from(["auto", *SHAPES]),
                "fields": st.dictionaries(
                    st.sampled_from([*COLUMNS[:1], *COLUMNS[2:-1], "role", "content"]),
                    st.sampled_from(NAMES),
                    max_size=2,
                ),
                "roles": st.dictionaries(
                    st.sampled_from(["robot", "human", ""]), st.sampled_from(["user", "assistant"]), max_size=1
                ),
            },
        ),
        "eval_size": st.floats(0.01, 0.9) | st.integers(1, 4),
        "max_train_samples": st.none() | st.integers(1, 4),
        "max_eval_samples": st.none() | st.integers(1, 4),
    }
)
plain = st.just({"source": {}, "eval_size": 0.3})


def outcome(path: Path, options: dict[str, Any], on_error: str, evaluate: bool) -> TaskData | UserError:
    """What reading comes to; anything else that it raises fails the test."""
    more = {key: value for key, value in options.items() if key != "source"}
    section = DataSection(
        train_dataset=[{"path": str(path), **options["source"]}],
        eval_dataset=[str(path)] if evaluate else None,
        on_error=on_error,
        **more,
    )
    try:
        return read_task_data(section, seed=0)
    except UserError as error:
        return error


def check_both(path: Path, options: dict[str, Any], evaluate: bool) -> None:
    """Both values of on_error agree as far as they can, and what is read can be trained on."""
    raised, skipped = (outcome(path, options, on_error, evaluate) for on_error in ("raise", "skip"))
    event(f"{path.suffix} raise: {type(raised).__name__}, skip: {type(skipped).__name__}")
    for result in (raised, skipped):
        if isinstance(result, UserError):
            assert path.name in result.message or result.message == "no training row is left"
            continue
        assert result.train and result.heldout
        for example in result.train + result.heldout:
            check(example, path)
    if isinstance(raised, TaskData):
        assert raised == skipped and not raised.skipped
    elif isinstance(skipped, TaskData):
        assert isinstance(raised, RowError)
        assert skipped.skipped[0].message == raised.message


def check(example: Example, path: Path) -> None:
    assert example.where.startswith(str(path))
    match example:
        case Text(text=text):
            assert text.strip()
        case Completion(prompt=prompt, completion=completion):
            assert prompt.strip() and completion.strip()
        case Chat(messages=messages, context=context):
            roles = [message["role"] for message in messages]
            assert all(set(message) == {"role", "content"} for message in messages)
            assert all(isinstance(message["content"], str) for message in messages)
            assert all(message["content"].strip() for message in messages if message["role"] == "assistant")
            assert set(roles) <= {"system", "user", "assistant", "tool"} and "system" not in roles[1:]
            assert [role for role in roles if role != "system"][0] == "user"
            assert not {pair for pair in pairwise(roles)} & {("user", "user"), ("assistant", "assistant")}
            assert "assistant" in roles[context:] and 0 <= context < len(messages)
            assert example.reference.strip() and example.prompt[-1]["role"] in ("user", "tool")


@settings(max_examples=300, deadline=None)
@given(
    rows=row_lists(),
    ending=st.sampled_from([".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet"]),
    options=plain | plain | sections,
    evaluate=st.booleans(),
)
def test_random_rows_are_examples_or_a_user_error(
    rows: list[Any], ending: str, options: dict[str, Any], evaluate: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{ending}"
        path.write_bytes(as_file(rows, ending))
        check_both(path, options, evaluate)


@settings(max_examples=150, deadline=None)
@given(ending=st.sampled_from(list(READERS)), content=st.binary(max_size=300))
def test_random_bytes_are_examples_or_a_user_error(ending: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{ending}"
        path.write_bytes(b"PAR1" + content + b"PAR1" if ending == ".parquet" else content)
        check_both(path, {"source": {}, "eval_size": 0.3}, evaluate=False)


@settings(max_examples=200, deadline=None)
@given(
    rows=row_lists(),
    ending=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".md", ".parquet", ".parquet"]),
    place=st.floats(0, 1),
    cut=st.integers(0, 9),
    put=st.sampled_from([b'"', b"{", b"]", b",", b"\n", b"\r", b"\t", b"\\", b"\x00", b"\xff"]) | st.binary(max_size=3),
)
def test_a_file_with_a_few_bytes_changed_is_examples_or_a_user_error(
    rows: list[Any], ending: str, place: float, cut: int, put: bytes
) -> None:
    content = as_file(rows, ending)
    start = round(place * len(content))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{ending}"
        path.write_bytes(content[:start] + put + content[start + cut :])
        check_both(path, {"source": {}, "eval_size": 1}, evaluate=False)


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"prompt": words, "completion": words}), min_size=2, max_size=8))
def test_what_is_written_is_what_is_read(ending: str, rows: list[dict[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{ending}"
        path.write_bytes(as_file(rows, ending))
        task = outcome(path, {"source": {}, "eval_size": 1}, "raise", evaluate=True)
        assert isinstance(task, TaskData)
        for half in (task.train, task.heldout):
            assert [(e.prompt, e.completion) for e in half if isinstance(e, Completion)] == [
                (row["prompt"], row["completion"]) for row in rows
            ]
