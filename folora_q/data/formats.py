"""Row formats: which columns a row has, and how it becomes an example."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from typing import get_args

from folora_q.data.column_guess import guess_fields
from folora_q.data.examples import Chat, Completion, Example, Labelled, Text, content_of
from folora_q.data.fields import Fields, chat_of, listed_columns
from folora_q.data.labels import LABEL, TAG, label_of
from folora_q.data.pair_rows import parse_preference
from folora_q.data.rows import Row, RowError, kind_of
from folora_q.data.turns import Turn, check_order, parse_turns
from folora_q.recipe.dataset import FormatName, Source
from folora_q.recipe.objectives import ObjectiveName
from folora_q.recipe.strict_yaml import dump_yaml


def detect_format(row: Row, source: Source, objective: ObjectiveName = "sft") -> FormatName:
    """Return the format that the source names, or that the row's columns imply.

    Args:
        objective: what the rows are for; other formats are not considered.

    Raises:
        RowError: the columns fit no format of the objective.
    """
    if source.shape != "auto":
        if FORMATS[source.shape].objective != objective:
            raise _of_another_objective(row, f"its source has `shape: {source.shape}`", objective, source.shape)
        return source.shape
    columns = {*row.values, *source.fields}
    fitting: list[FormatName] = [
        name for name, known in FORMATS.items() if known.fits(columns) and known.objective == objective
    ]
    if fitting:  # formats whose columns the recipe maps come first
        return max(fitting, key=lambda name: len(FORMATS[name].fields & source.fields.keys()))
    if FORMATS["preference"].fits(columns):
        raise _of_another_objective(row, "it has `chosen` and `rejected`", objective, "preference")
    if objective != "sft":
        labelled: FormatName | None = "labelled" if FORMATS["labelled"].fits(columns) else None
        raise _of_another_objective(row, f"its columns are {listed_columns(row.values)}", objective, labelled)
    raise RowError(
        row.where, f"its columns ({listed_columns(row.values)}) match no known format", _hint_on_columns(row, source)
    )


def _of_another_objective(row: Row, what: str, objective: ObjectiveName, found: FormatName | None) -> RowError:
    """Return the error for a row that training.objective cannot use.

    Args:
        found: the format that the row seems to have.
    """
    needs = f"{what}, and training.objective: {objective} needs"
    other = "sft" if found is None else FORMATS[found].objective
    match objective, found:
        case "dpo", _:
            return RowError(
                row.where,
                f"{needs} pairs",
                "give each row a `chosen` and a `rejected` answer, and perhaps their `prompt`; map other names with "
                f"`fields`, e.g. {{chosen: better, rejected: worse}}; or set training.objective: {other}",
            )
        case "kto", _:
            return RowError(
                row.where,
                f"{needs} answers with a label",
                "give each row a prompt, an answer, and a `label` that is true or false; map other names with "
                f"`fields`, e.g. {{label: liked}}; or set training.objective: {other}",
            )
        case _, "labelled":
            return RowError(
                row.where,
                f"{what}: answers with a label, which training.objective: sft does not use",
                "set training.objective: kto",
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
    if row.values.get(TAG) is False and FORMATS[name].objective == "sft":
        raise _undesirable(row.where, TAG)
    try:
        example = FORMATS[name].parse(Fields(row, source))
        if not isinstance(example, Text):
            content_of(example)  # tools and calls may be nested to any depth
    except RecursionError:
        raise RowError(row.where, "it is nested too deeply") from None
    return example


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
    return chat_of(fields, turns)


def _alpaca(fields: Fields) -> Chat:
    system = fields.text("system", "system_prompt", required=False)
    turns = [(fields.instruction(), fields.text("output"))]
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
    if fields.row.values.get(LABEL) is False:
        raise _undesirable(fields.where, LABEL)
    return _prompt_and_completion(fields)


def _prompt_and_completion(fields: Fields) -> Chat | Completion:
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        context = parse_turns(prompt, fields.source, fields.where, "prompt")
        turns = context + parse_turns(completion, fields.source, fields.where, "completion")
        check_order(fields.where, [turn.message for turn in turns], "prompt + completion")
        if not any(turn.message["role"] == "assistant" for turn in turns[len(context) :]):
            raise RowError(fields.where, "the assistant says nothing in `completion`, so there is nothing to learn")
        return chat_of(fields, turns, context=len(context))
    if fields.tools():
        raise RowError(fields.where, "it has `tools`, which only a chat template can render: give lists of turns")
    return Completion(fields.where, fields.text("prompt"), fields.text("completion"))


def _undesirable(where: str, column: str) -> RowError:
    return RowError(
        where,
        f"its `{column}` is false, which marks an answer that is not to be learned",
        "set training.objective: kto, which learns from such answers too, or data.on_error: skip to learn the others "
        "alone, or remove the column",
    )


def _labelled(fields: Fields) -> Labelled:
    """Parse an answer with its label; the answer is the completion, the output, or the last turn of a chat."""
    desirable = label_of(fields)
    if fields.column("completion"):
        return Labelled(fields.where, _prompt_and_completion(fields), desirable)
    chat = _alpaca(fields) if fields.column("output") else _messages(fields)
    return Labelled(fields.where, replace(chat, context=chat.answer), desirable)


def _text(fields: Fields) -> Text:
    return Text(fields.where, fields.text("text"))


@dataclass(frozen=True)
class DatasetFormat:
    """A format of rows.

    Attributes:
        parse: makes an example of a row.
        columns: columns by which the format is detected.
        aliases: further sets of columns by which it is.
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
    aliases: tuple[frozenset[str], ...] = ()

    def fits(self, columns: Set[str]) -> bool:
        """Return whether a row with these columns can have the format."""
        return any(each <= columns for each in (self.columns, *self.aliases))


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
        parse=parse_preference,
        columns=_names("chosen rejected"),
        fields=_names("prompt instruction input messages chosen rejected role content system tools"),
        unmapped=_names("functions system_prompt conversations"),
        turns=(("prompt",), ("messages", "conversations"), ("chosen",), ("rejected",)),
        objective="dpo",
    ),
    "labelled": DatasetFormat(
        parse=_labelled,
        columns=frozenset({LABEL}),
        fields=_names("prompt completion instruction input output messages history role content system tools label"),
        unmapped=_names("functions system_prompt conversations") | {TAG},
        turns=(("prompt",), ("completion",), ("messages", "conversations")),
        objective="kto",
        aliases=(frozenset({TAG}),),
    ),
}
if FORMATS.keys() != set(get_args(FormatName)):
    raise TypeError(f"FormatName has {get_args(FormatName)}, FORMATS has {tuple(FORMATS)}")
# Columns for media; a row in which one is not empty is refused.
MEDIA = {"image", "images", "audio", "audios", "video", "videos"}
