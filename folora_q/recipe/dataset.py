"""The recipe's section `data`: where the rows are, their format, and what happens to rows that cannot be used."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field

from folora_q.recipe.section import PositiveInt, Section

FormatName = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "labelled"]
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
    "chosen",
    "rejected",
    "label",
]


class Source(Section):
    """One source of rows."""

    path: Annotated[str, Field(min_length=1)]
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .txt, .md; text files also compressed as .gz, .zst, .bz2 or .xz), a
    folder or glob of files, a folder saved by `save_to_disk`, a URL such as s3://bucket/rows.jsonl, or a hub
    dataset."""
    name: str | None = None
    """The configuration of a hub dataset, e.g. main."""
    split: str | None = None
    """The split of a hub dataset (slices such as train[:10%] work), of a folder saved by `save_to_disk`, or of a folder
    with files such as train.jsonl and test.jsonl. Default: train, or the only split."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each training row is used: 0.5 uses a random half, 2 uses every row twice."""
    shape: Literal["auto", FormatName] = "auto"
    """The row format. auto: detected from the columns."""
    fields: dict[FieldName, str] = {}
    """Names of columns that differ from the format's, as {ours: theirs}: {instruction: question, output: answer} makes
    chats, {prompt: question, completion: answer} plain text."""
    roles: dict[str, Role] = {}
    """Names of roles, as {theirs: ours}, e.g. {customer: user}. human, gpt, model and bot are known."""

    def column(self, name: str) -> str:
        """Return the name of the column for our `name`."""
        return cast("dict[str, str]", self.fields).get(name, name)


def _as_list(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[
    list[Source],
    BeforeValidator(_as_list, json_schema_input_type=str | Source | list[str | Source]),
    Field(min_length=1),
]


class DataSection(Section):
    """The training data. Paths are relative to the recipe."""

    train_dataset: Sources
    """Rows to train on: a file, a folder, a glob, a hub id, a mapping with a `path` (below), or a list of these."""
    eval_dataset: Sources | None = None
    """Rows for evaluation only, given in the same way. Default: eval_size of the training rows are held out."""
    eval_size: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    """How much to hold out if there is no eval_dataset: a share of each source if below 1, otherwise a number of
    rows."""
    max_train_samples: PositiveInt | None = None
    """Maximum number of training rows to use."""
    max_eval_samples: PositiveInt | None = None
    """Maximum number of evaluation rows to use."""
    chat_template: str | None = None
    """The chat template: a .jinja file, or a name such as chatml or llama3. Default: the model's own."""
    without_thought: Literal["given", "learn", "raise"] = "given"
    """For answers without a thought on a model that thinks: the empty thought that the template renders is part of the
    prompt (given), is trained, so that the model stops thinking (learn), or is an error (raise)."""
    overlong: Literal["drop", "truncate", "split", "raise"] = "drop"
    """For examples over training.max_length: drop, truncate at the end, split into several (plain text only), or
    raise."""
    on_error: Literal["raise", "skip"] = "raise"
    """For a row that cannot be used: raise an error that names it, or skip it and write it to skipped.jsonl."""
