"""The recipe's section `gate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from folora_q.recipe.gate_rules import (
    DEFAULT_RULE,
    GATE_RULES,
    GateRule,
    GateSettings,
    Place,
    RuleName,
    defaults_by_rule,
    rule_summaries,
)
from folora_q.recipe.section import Fraction, NonNegative, Positive, PositiveInt, Section

# Least number of directions in a sketch, and directions per row of the adapter, which uses the best of them.
RANK, RANK_PER_ROW = 64, 2


def sketch_rank(rows: int) -> int:
    """Return the number of directions that sketches keep for an adapter of this rank by default."""
    return max(RANK, RANK_PER_ROW * rows)


class BudgetSection(Section):
    """How much may be forgotten, by `kl` or `forgetting`; the run ends at or below it, and learns what that allows."""

    kl: Positive | None = None
    """KL from the base on held-out model-generated text, in nats per token."""
    forgetting: Positive | None = None
    """Mean rise of the loss on evaluation.general_text, in nats per token."""
    num_texts: PositiveInt = 320
    """kl: number of held-out samples that steer the budget, of which evaluation.num_proxy_samples are measured most
    often. The tables show the others. Default: 320, or five sixths of proxy.num_heldout_samples."""

    @model_validator(mode="after")
    def _one_of_both(self) -> BudgetSection:
        if (self.kl is None) == (self.forgetting is None):
            raise ValueError("name one of kl and forgetting, e.g. {kl: 0.02}")
        return self

    @property
    def words(self) -> str:
        """Description of the budget."""
        what = "KL" if self.forgetting is None else "rise of the loss on real text"
        return f"{what} of at most {self.limit:g} nats per token"

    @property
    def limit(self) -> float:
        """The budget in nats per token."""
        return cast(float, self.kl if self.forgetting is None else self.forgetting)


class GateSection(Section):
    """The gate on the adapter's updates."""

    enabled: bool = True
    """false: plain QLoRA with the same seeds and data order."""
    rule: Annotated[RuleName, Field(description=rule_summaries())] = DEFAULT_RULE
    places: Annotated[
        list[Place],
        Field(
            description="Where the gate acts: on A's initialization, on A's steps, on B's steps. Default by rule: "
            f"{defaults_by_rule(lambda rule: rule.places)}; frozen with start: random: [a_start]."
        ),
    ] = GATE_RULES[DEFAULT_RULE].default_places(random_start=False)
    start: Literal["leading", "random"] = "leading"
    """How A is initialized. leading: the r directions with the largest quotient γ. random: PEFT's random
    initialization, filtered by the gate."""
    gate_lambda: NonNegative = 64.0
    """λ, the strength of rules step and spectral: half of a step passes in a direction whose quotient equals λ. Raise
    it together with the learning rate."""
    floor: Fraction = 0.0
    """s_min: the minimum share of a step that passes in every direction."""
    sharpness: Positive = 1.0
    """Exponent p of the gate γᵖ / (γᵖ + λᵖ)."""
    ridge: Annotated[
        Positive,
        Field(
            description="τ, added to the penalty's covariance, relative to its mean variance. Default by rule: "
            f"{defaults_by_rule(lambda rule: rule.ridge)}."
        ),
    ] = GATE_RULES[DEFAULT_RULE].ridge
    utility_ridge: Annotated[
        NonNegative,
        Field(
            description="Added to the task's covariance, relative to its mean variance, so that directions in neither "
            "text count as equally useful and costly. Default by rule: "
            f"{defaults_by_rule(lambda rule: rule.utility_ridge)}."
        ),
    ] = GATE_RULES[DEFAULT_RULE].utility_ridge
    rank: PositiveInt = RANK
    """Number of directions that each sketch keeps. Default: 64, or twice adapter.r if that is more."""
    oversampling: Annotated[int, Field(ge=0)] = 16
    """Number of extra sketch columns beyond the rank."""
    second_pass: bool = True
    """Pass over the text twice, so that the quotient of every direction is exact."""
    refinements: Annotated[int, Field(ge=0)] = 1
    """Number of additional passes that refine the leading directions. Requires second_pass."""
    covariance: Literal["fisher", "activation"] = "fisher"
    """Token weights in the covariances. fisher: squared norm of the loss gradient at the layer's output. activation:
    uniform, as in the paper."""
    num_task_samples: PositiveInt = 256
    """Number of training rows for the task's statistics."""
    batch_size: PositiveInt = 16
    """Batch size for the statistics, which do not depend on it. Short texts are read together, but at most
    batch_tokens."""
    batch_tokens: PositiveInt | None = None
    """Maximum number of tokens in a batch of the statistics with covariance: fisher. Default: as many as in a training
    batch; on a GPU as memory allows."""
    basis_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the gates' bases during training. auto: bfloat16 on a GPU, float32 on a CPU."""
    refresh_every: PositiveInt = 10
    """Rule step: number of steps between two updates of B's r x r gate."""
    complement: Literal["gated", "frozen"] = "gated"
    """Rule spectral: outside the sketched directions, A's steps are gated by one common value, or A is frozen there."""

    budget: BudgetSection | None = None
    """Rule frozen: how much may be forgotten, e.g. {kl: 0.02}. The learning rate is raised until that much is. From
    then on the update is shrunk after each step, most in directions of low quotient. Default: no limit."""

    @property
    def readings(self) -> list[tuple[int, bool]]:
        """For each reading after the first: columns of the basis, and whether its image is collected for refinement."""
        if not self.second_pass:
            return []
        return [((2 + step) * self.rank, step < self.refinements) for step in range(self.refinements + 1)]

    def basis_dtype_on(self, gpu: bool) -> str:
        """Return the dtype that `basis_dtype` means: on a GPU, where the bases stay in memory, three digits suffice."""
        if self.basis_dtype != "auto":
            return self.basis_dtype
        return "bfloat16" if gpu else "float32"

    @property
    def facts(self) -> GateRule:
        """The rule's facts."""
        return GATE_RULES[self.rule]

    @property
    def weighted(self) -> bool:
        """Whether tokens are weighted by their gradient in the loss; statistics are then in units of the loss."""
        return self.covariance == "fisher"

    @property
    def scales_rows(self) -> bool:
        """Whether B's steps are gated by the lengths of a frozen A's rows."""
        return not self.facts.trains_a and "b_step" in self.places

    @property
    def reshaped(self) -> dict[str, float]:
        """Settings of the gate's curve s(γ) that differ from their defaults, with the defaults."""
        defaults = {name: type(self).model_fields[name].default for name in ("gate_lambda", "floor", "sharpness")}
        return {name: default for name, default in defaults.items() if getattr(self, name) != default}

    @property
    def words(self) -> str:
        """Description of the rule, its places and, where they matter, its strength and its budget."""
        strength = f"; λ = {self.gate_lambda:g}" if self.facts.uses_strength else ""
        budget = "" if self.budget is None else f"; {self.budget.words}"
        return f"{self.rule} at {', '.join(self.places)}{strength}{budget}"

    @model_validator(mode="before")
    @classmethod
    def _by_the_rule(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("rule", DEFAULT_RULE)
        rule = GATE_RULES.get(name) if isinstance(name, str) else None
        if rule is None:
            return given  # pydantic names the rules that exist
        places = rule.default_places(random_start=given.get("start") == "random")
        return {"places": places, "ridge": rule.ridge, "utility_ridge": rule.utility_ridge} | given

    @model_validator(mode="after")
    def _settings_suit_the_rule(self) -> GateSection:
        settings = GateSettings(self.places, self.start == "leading", tuple(self.reshaped))
        if self.enabled and (objection := self.facts.objection(settings)):
            raise ValueError(objection)
        if self.budget is not None and not (self.enabled and self.scales_rows and self.weighted):
            raise ValueError(
                "budget needs a gate that knows the penalty of every step: rule: frozen, which gates B's steps, with "
                "covariance: fisher"
            )
        return self
