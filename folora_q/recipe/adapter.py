"""The recipe's section `adapter`: which layers get a LoRA adapter, and which modules are trained in full."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, WrapValidator, field_validator, model_validator

from folora_q.recipe.patterns import pattern_fault
from folora_q.recipe.section import Positive, PositiveInt, Section

ALL_LINEAR = "all-linear"
# Other tools' names for it.
ALL_WORDS = {"all", "linear", "all_linear", "alllinear", "lora_target_linear"}
# One name, or several separated by commas or spaces.
NAMES_ALONE = re.compile(r"[\w.]*\w(\s*[, ]\s*[\w.]*\w)*")


def _text_or_list(value: Any, check: Callable[[Any], Any], info: ValidationInfo) -> Any:
    """Raise one error that says what is expected, where pydantic would have one for each type."""
    takes_text = info.field_name != "modules_to_save"
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    if value is None or is_list or (isinstance(value, str) and takes_text):
        return check(value)
    kinds = "a list of names, or one regular expression" if takes_text else "a list of names"
    example = f"[{value}]" if isinstance(value, str) else "[embed_tokens]" if not takes_text else "[q_proj, v_proj]"
    raise ValueError(f"`adapter.{info.field_name}` must be {kinds}, e.g. {example}, not {value!r:.100}")


class AdapterSection(Section):
    """The LoRA adapter, trained and saved in float32."""

    r: PositiveInt = 32
    """Rank of the adapter. With gate.rule: frozen only B is trained, so rank 32 trains as many weights as rank 16."""
    lora_alpha: Positive = 32
    """The adapter's output is scaled by lora_alpha / r. Default: r, a scale of 1."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    target_modules: Annotated[Literal["all-linear"] | str | list[str], WrapValidator(_text_or_list)] = ALL_LINEAR
    """Linear layers that get an adapter: all-linear (all but the output layer); a list of names or suffixes such as
    q_proj; or one regular expression that matches full names such as model.layers.0.self_attn.q_proj."""
    exclude_modules: Annotated[str | list[str] | None, WrapValidator(_text_or_list)] = None
    """Layers to exclude: a list of names or suffixes, or one regular expression that matches full names."""
    modules_to_save: Annotated[list[str] | None, WrapValidator(_text_or_list)] = None
    """Embeddings and output layer to train in full and without the gate, e.g. [embed_tokens, lm_head]. If the model
    ties them, they are trained as one."""

    @field_validator("target_modules", "exclude_modules", "modules_to_save")
    @classmethod
    def _names_or_a_pattern(cls, value: str | list[str] | None, info: ValidationInfo) -> str | list[str] | None:
        name, is_target = f"`adapter.{info.field_name}`", info.field_name == "target_modules"
        if isinstance(value, str):
            return value if is_target and value == ALL_LINEAR else _pattern(name, value, is_target)
        if value is not None and any(not ending.strip() for ending in value):
            raise ValueError(f"{name} holds an empty name")
        if is_target and not value:
            raise ValueError(f"{name} names no layer: name some, or remove it for {ALL_LINEAR}")
        return value or None

    @model_validator(mode="before")
    @classmethod
    def _scale_of_one(cls, given: Any) -> Any:
        rows = given.get("r") if isinstance(given, dict) else None
        return {"lora_alpha": rows} | given if isinstance(rows, int) and rows > 0 else given


def _pattern(name: str, value: str, is_target: bool) -> str:
    """Check a regular expression for module names.

    Raises:
        ValueError: it is not one, matching it could take forever, or it is one name or several, which match nothing.
    """
    if is_target and value.strip().lower().replace("-", "_") in ALL_WORDS:
        raise ValueError(f"{name}: {value} would be a regular expression; did you mean {ALL_LINEAR}?")
    names = value.strip()
    if NAMES_ALONE.fullmatch(names) and ("." not in names or re.search("[, ]", names)):
        several = ", ".join(re.split(r"[,\s]+", names))
        raise ValueError(f"{name}: text is a regular expression; names go in a list: [{several}]")
    if reason := pattern_fault(value):
        raise ValueError(f"{name}: {value:.100} is {reason}")
    return value
