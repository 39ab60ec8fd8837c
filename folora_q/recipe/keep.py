"""The recipe's section `keep`: capabilities whose answers should survive the training."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from folora_q.block_sizes import KEPT_PROMPT
from folora_q.recipe.capabilities import CAPABILITIES, CapabilityName, capability_summaries
from folora_q.recipe.section import PositiveInt, Section, as_list

# Length of an answer to a prompt of the user's.
FILE_TOKENS = 96


class KeepSection(Section):
    """Capabilities to keep. The base answers their prompts: half of the answers enter the penalty, and the others are
    measured, each capability as one row. A list is short for `capabilities`."""

    capabilities: Annotated[
        list[CapabilityName],
        BeforeValidator(as_list, json_schema_input_type=CapabilityName | list[CapabilityName]),
        Field(description=capability_summaries()),
    ] = []
    files: Annotated[list[str], BeforeValidator(as_list, json_schema_input_type=str | list[str])] = []
    """Files of your own: rows with `prompt` or `messages` (and `tools`), which the base answers, or with `text`, which
    is kept as it is; .jsonl, .json, .csv or .txt. Every second row is held out; measured by KL."""
    share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of these answers and texts in the penalty, the same for each capability and file. 0: they are only
    measured."""
    max_new_tokens: PositiveInt | None = None
    """Maximum length of an answer in tokens. Default: by capability, 32 to 384; 96 for files."""

    @field_validator("capabilities", "files")
    @classmethod
    def _named_once(cls, value: list[str]) -> list[str]:
        if repeated := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"keep: {repeated[0]} is named twice")
        return value

    @property
    def active(self) -> bool:
        """Whether anything is kept."""
        return bool(self.capabilities or self.files)

    def answer_length(self, name: CapabilityName | None) -> int:
        """Return the maximum length of an answer in tokens, for a capability, or for a file (None)."""
        default = FILE_TOKENS if name is None else CAPABILITIES[name].max_new_tokens
        return self.max_new_tokens or default

    def joined(self, other: KeepSection) -> KeepSection:
        """Return a section that keeps what either names, with this one's settings."""
        both = {key: [*getattr(self, key), *getattr(other, key)] for key in ("capabilities", "files")}
        return self.model_copy(update={key: list(dict.fromkeys(names)) for key, names in both.items()})

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer, about; 0 if nothing is kept."""
        lengths = [self.answer_length(name) for name in self.capabilities]
        lengths += [self.answer_length(None)] * bool(self.files)
        return KEPT_PROMPT + max(lengths) if lengths else 0


def from_shorthand(value: Any) -> Any:
    """Return a name or a list of names as a section."""
    return {"capabilities": value} if isinstance(value, str | list) else value


KeepField = Annotated[
    KeepSection,
    BeforeValidator(from_shorthand, json_schema_input_type=CapabilityName | list[CapabilityName] | KeepSection),
]
