"""The recipe's section `evaluation`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from folora_q.recipe.section import Positive, PositiveInt, Section, as_list


class EvaluationSection(Section):
    """What is measured on the base and the tuned model, during and after training."""

    metric: Literal["none", "exact_match", "regex", "function"] = "none"
    """How greedy answers are scored against the reference, without thoughts: equal up to white space (exact_match), by
    metric_pattern (regex), or by metric_function (function)."""
    metric_pattern: str = r"-?\d[\d,]*(?:\.\d+)?"
    """regex: an answer is correct if its last match (or the match's groups) equals the reference's. Default: a
    number."""
    metric_function: str | None = None
    """function: file.py:name, relative to the recipe. Called with (answer, reference), both without thoughts, and with
    thought and reference_thought if it has such parameters; returns 0 to 1. Requires --allow-code."""
    num_answers: Annotated[int, Field(ge=0)] | None = None
    """Number of held-out prompts to answer. Default: all of them if there is a metric, otherwise four."""
    max_new_tokens: PositiveInt = 128
    """Maximum length of a generated answer in tokens."""
    batch_size: PositiveInt = 16
    """Batch size for measuring."""
    steps: PositiveInt | None = None
    """Number of steps between evaluations during training: held-out loss, KL, loss on general text. Default: none."""
    num_proxy_samples: PositiveInt = 16
    """Number of held-out samples, and of windows of general text, for evaluations during training. Default: 16,
    with gate.budget 128."""
    max_kl: Positive | None = None
    """Stop when KL(base ‖ tuned) exceeds this value in nats per token, and keep the best checkpoint below it. Requires
    evaluation.steps."""
    general_text: Annotated[list[str], BeforeValidator(as_list, json_schema_input_type=str | list[str])] | None = None
    """Text files to measure forgetting on (increase of the loss). Default: packaged prose, manual pages and code."""
    general_prompts: str | None = None
    """A text file with one prompt per line, answered by the base and the tuned model. Default: six packaged prompts."""

    @field_validator("metric_pattern")
    @classmethod
    def _a_regular_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"it is not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _a_function_is_named(self) -> EvaluationSection:
        if self.metric == "function" and not re.fullmatch(r".+\.py:[A-Za-z_]\w*", self.metric_function or ""):
            raise ValueError("metric: function needs metric_function, such as score.py:score")
        if self.max_kl is not None and self.steps is None:
            raise ValueError("max_kl needs measurements during training: set evaluation.steps, e.g. to 50")
        return self
