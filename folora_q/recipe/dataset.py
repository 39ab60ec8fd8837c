"""The recipe's `data` section: where the rows are, what shape they have, and what happens to those that do not fit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from folora_q.recipe.section import PositiveInt, Section

Shape = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]
Role = Literal["system", "user", "assistant", "tool"]
FieldName = Literal[
    "messages",
    "role",
    "content",
    "system",
    "tools",
    "history",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "text",
]


class Source(Section):
    """One source of rows."""

    path: Annotated[str, Field(min_length=1)]
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .txt, .md; texts also as .gz, .zst, .bz2 or .xz), a folder or a glob
    of them, a folder of `save_to_disk`, an address such as s3://bucket/rows.jsonl, or a dataset's hub id."""
    name: str | None = None
    """The configuration of a hub dataset, e.g. main."""
    split: str | None = None
    """The split of a hub dataset, where slices such as train[:10%] work, or of a folder: one of `save_to_disk`,
    or with files such as train.jsonl and test.jsonl. Left out: train, or the only one."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often a training row counts: 0.5 takes a random half, 2 takes every row twice."""
    shape: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """The shape of a row; auto finds it from the columns."""
    fields: dict[FieldName, str] = {}
    """Columns with other names, ours: theirs, e.g. {prompt: question, completion: answer}."""
    roles: dict[str, Role] = {}
    """Roles with other names, theirs: ours, e.g. {customer: user}. human, gpt, model and bot are known."""


def _as_list(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[
    list[Source],
    BeforeValidator(_as_list, json_schema_input_type=str | Source | list[str | Source]),
    Field(min_length=1),
]


class DataSection(Section):
    """The task. Paths are relative to the recipe."""

    train_dataset: Sources
    """Rows to train on: a file, a folder, a glob, a hub id, a mapping with a `path` (below), or a list of these."""
    eval_dataset: Sources | None = None
    """Rows for evaluation only, given in the same ways; without it, eval_size of the training rows are held out."""
    eval_size: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    """What to hold out when there is no eval_dataset: below 1 a share of each source, from 1 on a number of rows."""
    max_train_samples: PositiveInt | None = None
    """Use at most so many training rows."""
    max_eval_samples: PositiveInt | None = None
    """Use at most so many evaluation rows."""
    chat_template: str | None = None
    """How chats are rendered: unset is the model's own; else a .jinja file, or a name such as chatml or llama3."""
    without_thought: Literal["given", "learn", "raise"] = "given"
    """Answers without a thought where the template renders thoughts: what it puts in the thought's place, such as an
    empty one, is given and not learned; or learned, so that the model stops thinking; or an error."""
    overlong: Literal["drop", "truncate", "split", "raise"] = "drop"
    """Examples over training.max_length: left out, cut at the end, cut into several (plain text only), or an error."""
    on_error: Literal["raise", "skip"] = "raise"
    """A row that cannot be used: an error that names it, or skipped, counted, and written to skipped.jsonl."""
