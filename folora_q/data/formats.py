"""What shape rows have, and the one shape that we train on: a prompt and the completion that is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from folora_q.data.sources import Row
from folora_q.errors import UserError

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A prompt and its completion, both as chat messages or both as plain text. Loss is on the completion alone."""

    prompt: list[Message] | str
    completion: list[Message] | str

    @property
    def reference(self) -> str:
        """The completion's text, which an answer is compared with."""
        return self.completion if isinstance(self.completion, str) else self.completion[-1]["content"]


def to_examples(rows: Sequence[Row], path: Path) -> list[Example]:
    """Read `messages` rows, or `prompt` and `completion` rows.

    Every assistant turn of a conversation becomes an example of its own, all earlier turns its prompt: nothing of a
    conversation is left untrained, and no mask depends on how a template marks turns.

    Raises:
        UserError: a row has another shape; it names the row (blank lines not counted) and the field.
    """
    examples: list[Example] = []
    for number, row in enumerate(rows, 1):
        where = f"{path} row {number}"
        if "messages" in row:
            examples += _from_messages(row["messages"], where)
        elif isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            examples.append(Example(row["prompt"], row["completion"]))
        else:
            raise UserError(
                f"{where} has neither `messages` nor text in `prompt` and `completion`; its keys are {sorted(row)}"
            )
    if len({type(example.prompt) for example in examples}) > 1:
        raise UserError(f"{path} mixes `messages` rows with `prompt`/`completion` rows", "use one shape a file")
    return examples


def _from_messages(messages: object, where: str) -> list[Example]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: `messages` must be a list of turns")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where}: messages[{index}] needs a `role` and a `content`, both text")
    turns = [
        Example(messages[:index], [message])
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and index > 0
    ]
    if not turns:
        raise UserError(f"{where}: no assistant turn follows a prompt, so there is nothing to learn")
    return turns
