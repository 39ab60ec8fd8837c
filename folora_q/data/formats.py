"""Row formats, and the kinds of examples: a chat, a prompt with its completion, plain text, and a pair of answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from folora_q.data.column_guess import guess_fields
from folora_q.data.rows import Row, RowError, kind_of
from folora_q.data.tools import Tool, parse_tools
from folora_q.data.turns import Message, Turn, check_order, parse_turns
from folora_q.recipe.dataset import FormatName, Source
from folora_q.recipe.strict_yaml import dump_yaml
from folora_q.recipe.training import ObjectiveName

# The columns of a preference, the better answer first.
PAIR = ("chosen", "rejected")


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        where: file and line.
        messages: in the form of `apply_chat_template`.
        context: the number of messages at the beginning that are never trained on.
        tools: tools that the assistant may call.
        unlearned: indices of assistant turns that the row excludes from training.
    """

    where: str
    messages: list[Message]
    context: int = 0
    tools: list[Tool] | None = None
    unlearned: tuple[int, ...] = ()

    @property
    def learned(self) -> list[int]:
        """The indices of the trained turns."""
        return [index for index in self._said if index >= self.context and index not in self.unlearned]

    @property
    def answer(self) -> int:
        """The index of the turn that evaluation asks for: the last trained one, else the last of the assistant's."""
        return (self.learned or self._said)[-1]

    @property
    def prompt(self) -> list[Message]:
        """The messages before that turn."""
        return self.messages[: self.answer]

    @property
    def reference(self) -> str:
        """The content of that turn."""
        return self.messages[self.answer]["content"]

    @property
    def _said(self) -> list[int]:
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


@dataclass(frozen=True)
class Completion:
    """A prompt and its continuation, both plain text."""

    where: str
    prompt: str
    completion: str

    @property
    def reference(self) -> str:
        """The completion, with which answers are compared."""
        return self.completion


@dataclass(frozen=True)
class Text:
    """A document that is trained in full."""

    where: str
    text: str


@dataclass(frozen=True)
class Preference:
    """A prompt with two answers, the first of which is preferred; both examples begin with the prompt."""

    where: str
    chosen: Chat | Completion
    rejected: Chat | Completion


Example = Chat | Completion | Text | Preference


def with_answers(examples: Iterable[Example]) -> list[Chat | Completion]:
    """Return the examples that have an answer, of a pair the one with the chosen answer."""
    chosen = (example.chosen if isinstance(example, Preference) else example for example in examples)
    return [example for example in chosen if not isinstance(example, Text)]


def content_of(example: Example) -> str:
    """Serialize an example without its location: equal for two examples of the same content."""
    if isinstance(example, Preference):
        return json.dumps(["Preference", content_of(example.chosen), content_of(example.rejected)], ensure_ascii=False)
    parts = {name: value for name, value in vars(example).items() if name != "where"}
    return json.dumps([type(example).__name__, parts], ensure_ascii=False)


def detect_format(row: Row, source: Source, objective: ObjectiveName = "sft") -> FormatName:
    """Return the format that the source names, or that the row's columns imply.

    Args:
        objective: what the rows are for; other formats are not considered.

    Raises:
        RowError: the columns fit no format of the objective.
    """
    if source.shape != "auto":
        if FORMATS[source.shape].objective != objective:
            raise _of_another_objective(row, f"its source has `shape: {source.shape}`", objective)
        return source.shape
    columns = {*row.values, *source.fields}
    fitting: list[FormatName] = [
        name for name, known in FORMATS.items() if known.columns <= columns and known.objective == objective
    ]
    if fitting:  # formats whose columns the recipe maps come first
        return max(fitting, key=lambda name: len(FORMATS[name].fields & source.fields.keys()))
    if objective == "dpo":
        raise _of_another_objective(row, f"its columns are {_listed(row.values)}", objective)
    if FORMATS["preference"].columns <= columns:
        raise _of_another_objective(row, "it has `chosen` and `rejected`", objective)
    raise RowError(
        row.where, f"its columns ({_listed(row.values)}) match no known format", _hint_on_columns(row, source)
    )


def _of_another_objective(row: Row, what: str, objective: ObjectiveName) -> RowError:
    """Return the error for a row of a format that training.objective cannot use."""
    if objective == "dpo":
        return RowError(
            row.where,
            f"{what}, and training.objective: dpo needs pairs",
            "give each row a `chosen` and a `rejected` answer, and perhaps their `prompt`; map other names with "
            "`fields`, e.g. {chosen: better, rejected: worse}; or set training.objective: sft",
        )
    return RowError(
        row.where,
        f"{what}: preference data, which training.objective: sft does not use",
        "set training.objective: dpo; to fine-tune on the chosen answers alone, set fields: {completion: chosen}, or "
        "{messages: chosen} if `chosen` is a list of turns",
    )


def _hint_on_columns(row: Row, source: Source) -> str:
    """Propose `fields` for a row of unknown columns: those that are probably meant, or an example."""
    guess = guess_fields([row.values])
    if guess is None:
        return (
            "known are messages, conversations, instruction with output, prompt with completion, and text; other "
            "names go into `fields`, e.g. train_dataset: {path: ..., fields: {instruction: TASK, output: RESULT}}; "
            "`folora-q explain data.fields`"
        )
    plain = ""
    if guess.format == "alpaca":
        pair = {"prompt": guess.fields["instruction"], "completion": guess.fields["output"]}
        plain = f"; as plain text without a chat template: {dump_yaml(pair, flow=True)}"
    told = f"if {guess.words}, write" if guess.sure else f"is it that {guess.words}? then write"
    path = dump_yaml(source.path, flow=True)
    return f"{told} train_dataset: {{path: {path}, fields: {guess.yaml}}}{plain}"


def to_example(row: Row, name: FormatName, source: Source) -> Example:
    """Convert a row to an example.

    Raises:
        RowError: a column is missing or has an invalid value; the message names it.
    """
    for column in sorted(MEDIA & row.values.keys() - set(source.fields.values())):
        if row.values[column]:
            raise RowError(row.where, f"it has `{column[:40]}`, and only text can be trained")
    try:
        example = FORMATS[name].parse(Fields(row, source))
        if not isinstance(example, Text):
            content_of(example)  # tools and calls may be nested to any depth
    except RecursionError:
        raise RowError(row.where, "it is nested too deeply") from None
    return example


@dataclass(frozen=True)
class Fields:
    """A row's columns, looked up by our names."""

    row: Row
    source: Source

    @property
    def where(self) -> str:
        return self.row.where

    def column(self, *names: str) -> str | None:
        """Return the row's column for the first of our names that has one.

        A column that `fields` maps to another name is not found under its own.
        """
        fields = self.source.fields
        mapped = set(fields.values())
        for name in names:
            column = self.source.column(name)
            if column in self.row.values and (name in fields or column not in mapped):
                return column
        return None

    def get(self, *names: str) -> Any:
        """Return the value of a required column, looked up by these names."""
        column = self.column(*names)
        if column is not None:
            return self.row.values[column]
        wanted = self.source.column(names[0])
        raise RowError(self.where, f"the column `{wanted[:40]}` is missing; the columns are {_listed(self.row.values)}")

    def text(self, name: str, *others: str, required: bool = True) -> str:
        """Return the text of a column; "" if it is not required and absent or null.

        Args:
            others: further names that the column may have.
        """
        column = self.column(name, *others)
        theirs = column or self.source.column(name)
        value = None if column is None else self.row.values[column]
        if value is None and not required:
            return ""
        if column is None:
            self.get(name)
        if not isinstance(value, str):
            raise RowError(self.where, f"`{theirs}` must be text, not {kind_of(value)}")
        if required and not value.strip():
            raise RowError(self.where, f"`{theirs}` is empty")
        return value

    def tools(self) -> list[Tool] | None:
        """Return the tools that the row offers, if any."""
        column = self.column("tools", "functions")
        return None if column is None else parse_tools(self.row.values[column], self.where, column)


def _messages(fields: Fields) -> Chat:
    column = fields.column("messages", "conversations") or "messages"
    turns = parse_turns(fields.get("messages", "conversations"), fields.source, fields.where, column)
    check_order(fields.where, [turn.message for turn in turns], column)
    system = fields.text("system", "system_prompt", required=False)
    if system.strip():
        first = turns[0].message
        if first["role"] == "system" and first["content"].strip() != system.strip():
            raise RowError(fields.where, f"it has two system prompts: `system`, and another in `{column}[0]`")
        if first["role"] != "system":
            turns.insert(0, Turn({"role": "system", "content": system}))
    return _chat(fields, turns)


def _alpaca(fields: Fields) -> Chat:
    system, more = fields.text("system", "system_prompt", required=False), fields.text("input", required=False)
    asked = fields.text("instruction") + (f"\n\n{more}" if more.strip() else "")
    turns = [(asked, fields.text("output"))]
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for question, answer in [*_history(fields), *turns]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Chat(fields.where, messages)


def _history(fields: Fields) -> list[tuple[str, str]]:
    """Return the turns before an instruction as (question, answer) pairs."""
    column = fields.column("history")
    pairs = None if column is None else fields.row.values[column]
    if not pairs:
        return []
    if not isinstance(pairs, list):
        raise RowError(fields.where, f"`{column}` must be a list of pairs, not {kind_of(pairs)}")
    for index, pair in enumerate(pairs):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError(fields.where, f"`{column}[{index}]` must be a question and its answer, both text")
        if not pair[1].strip():
            raise RowError(fields.where, f"`{column}[{index}]` has an empty answer")
    return [(question, answer) for question, answer in pairs]


def _prompt_completion(fields: Fields) -> Chat | Completion:
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if fields.row.values.get("label") is False:
        raise RowError(
            fields.where,
            "its `label` is false, which marks an answer that is not to be learned (KTO data)",
            "set data.on_error: skip to learn the others alone, or remove the column",
        )
    if isinstance(prompt, list) or isinstance(completion, list):
        context = parse_turns(prompt, fields.source, fields.where, "prompt")
        turns = context + parse_turns(completion, fields.source, fields.where, "completion")
        check_order(fields.where, [turn.message for turn in turns], "prompt + completion")
        if not any(turn.message["role"] == "assistant" for turn in turns[len(context) :]):
            raise RowError(fields.where, "the assistant says nothing in `completion`, so there is nothing to learn")
        return _chat(fields, turns, context=len(context))
    if fields.tools():
        raise RowError(fields.where, "it has `tools`, which only a chat template can render: give lists of turns")
    return Completion(fields.where, fields.text("prompt"), fields.text("completion"))


def _text(fields: Fields) -> Text:
    return Text(fields.where, fields.text("text"))


def _preference(fields: Fields) -> Preference:
    """Parse a pair; what both begin with is the prompt, whether a `prompt` gives it or not."""
    answers = [fields.get(name) for name in PAIR]
    prompt = None if (column := fields.column("prompt")) is None else fields.row.values[column]
    if not any(isinstance(part, list) for part in (prompt, *answers)):
        return _preferred_text(fields)
    before: list[Turn] = []
    if isinstance(prompt, list):
        before = parse_turns(prompt, fields.source, fields.where, "prompt")
    elif prompt is not None:
        before = [Turn({"role": "user", "content": fields.text("prompt")})]
    sides = [_turns_of_answer(fields, name, before) for name in PAIR]
    shared = next(
        (number for number, (one, other) in enumerate(zip(*sides, strict=False)) if one.message != other.message),
        min(map(len, sides)),
    )
    for name, turns in zip(PAIR, sides, strict=True):
        check_order(fields.where, [turn.message for turn in turns], name)
        if shared == len(turns) or turns[shared].message["role"] != "assistant":
            raise RowError(fields.where, f"`chosen` and `rejected` do not differ in an assistant's turn: see `{name}`")
    chosen, rejected = (_chat(fields, turns, shared) for turns in sides)
    return Preference(fields.where, chosen, rejected)


def _turns_of_answer(fields: Fields, name: str, before: list[Turn]) -> list[Turn]:
    """Return a complete conversation that ends in one of the two answers.

    Args:
        before: the row's prompt; an answer may repeat it.
    """
    value = fields.get(name)
    if isinstance(value, list):
        turns = parse_turns(value, fields.source, fields.where, fields.source.column(name))
    else:
        turns = [Turn({"role": "assistant", "content": fields.text(name)})]
    if turns[0].message["role"] == "assistant":
        turns = [*before, *turns]
    system = fields.text("system", "system_prompt", required=False)
    if system.strip() and turns[0].message["role"] != "system":
        turns.insert(0, Turn({"role": "system", "content": system}))
    return turns


def _preferred_text(fields: Fields) -> Preference:
    chosen, rejected = (fields.text(name) for name in PAIR)
    if chosen == rejected:
        raise RowError(fields.where, "`chosen` and `rejected` are the same, so there is nothing to prefer")
    if fields.tools():
        raise RowError(fields.where, "it has `tools`, which only a chat template can render: give lists of turns")
    prompt = fields.text("prompt", required=False)
    if not prompt:  # up to the word in which they differ
        same = next((i for i, (x, y) in enumerate(zip(chosen, rejected, strict=False)) if x != y), None)
        same = min(len(chosen), len(rejected)) if same is None else same
        same -= chosen[:same].endswith(" ")
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if not (chosen and rejected):
            raise RowError(fields.where, "of `chosen` and `rejected`, one is the beginning of the other: give `prompt`")
    sides = (Completion(fields.where, prompt, answer) for answer in (chosen, rejected))
    return Preference(fields.where, *sides)


def _chat(fields: Fields, turns: list[Turn], context: int = 0) -> Chat:
    unlearned = tuple(
        index for index, turn in enumerate(turns) if turn.message["role"] == "assistant" and not turn.learned
    )
    return Chat(fields.where, [turn.message for turn in turns], context, fields.tools(), unlearned)


def _listed(columns: Mapping[str, Any]) -> str:
    """List the names of a row's columns, shortened for a message."""
    return ", ".join(sorted(str(name)[:40] for name in columns)[:8]) or "none"


@dataclass(frozen=True)
class DatasetFormat:
    """A format of rows.

    Attributes:
        parse: makes an example of a row.
        columns: columns by which the format is detected.
        fields: names that a recipe's `fields` may map.
        unmapped: further columns, which are read only under their own names.
        turns: names of each column that holds turns; the first that a row has counts.
        objective: the training objective that its rows are for.
    """

    parse: Callable[[Fields], Example]
    columns: frozenset[str]
    fields: frozenset[str]
    unmapped: frozenset[str] = frozenset()
    turns: tuple[tuple[str, ...], ...] = ()
    objective: ObjectiveName = "sft"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MESSAGES = DatasetFormat(
    parse=_messages,
    columns=_names("messages"),
    fields=_names("messages role content system tools"),
    unmapped=_names("functions system_prompt"),
    turns=(("messages", "conversations"),),
)
# The first format that fits is detected: many datasets have a `prompt` next to messages, or a rendered `text`.
FORMATS: dict[FormatName, DatasetFormat] = {
    "messages": _MESSAGES,
    "sharegpt": replace(_MESSAGES, columns=_names("conversations"), fields=_MESSAGES.fields - {"messages"}),
    "prompt_completion": DatasetFormat(
        parse=_prompt_completion,
        columns=_names("prompt completion"),
        fields=_names("prompt completion tools"),
        unmapped=_names("functions"),
        turns=(("prompt",), ("completion",)),
    ),
    "alpaca": DatasetFormat(
        parse=_alpaca,
        columns=_names("instruction output"),
        fields=_names("instruction input output system history"),
        unmapped=_names("system_prompt"),
    ),
    "text": DatasetFormat(parse=_text, columns=_names("text"), fields=_names("text")),
    "preference": DatasetFormat(
        parse=_preference,
        columns=_names("chosen rejected"),
        fields=_names("prompt chosen rejected role content system tools"),
        unmapped=_names("functions system_prompt"),
        turns=(("prompt",), ("chosen",), ("rejected",)),
        objective="dpo",
    ),
}
if FORMATS.keys() != set(get_args(FormatName)):
    raise TypeError(f"FormatName has {get_args(FormatName)}, FORMATS has {tuple(FORMATS)}")
# Columns for media; a row in which one is not empty is refused.
MEDIA = {"image", "images", "audio", "audios", "video", "videos"}
