"""The recipe's sections. The string under a field is its help text; names follow Hugging Face where possible."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.dataset import DataSection
from folora_q.recipe.gate_rules import (
    DEFAULT_RULE,
    GATE_RULES,
    PLAIN_LEARNING_RATE,
    GateRule,
    GateSettings,
    Place,
    RuleName,
    defaults_by_rule,
    rule_summaries,
    written,
)
from folora_q.recipe.section import Fraction, NonNegative, Positive, PositiveInt, Section, Seed

# A rate this many times above or below the gate's default is likely to be meant for another method.
FAR_RATE = 5
# Least number of directions in a sketch, and directions per row of the adapter, which takes the best of them.
RANK, RANK_PER_ROW = 64, 2


def default_learning_rate(gate: Mapping[str, Any]) -> float | None:
    """Peak learning rate that goes with a section `gate` as it is written; None where its rule is unknown."""
    if not gate.get("enabled", True):
        return PLAIN_LEARNING_RATE
    name = gate.get("rule", DEFAULT_RULE)
    return GATE_RULES[name].learning_rate if isinstance(name, str) and name in GATE_RULES else None


def sketch_rank(rows: int) -> int:
    """Number of directions that sketches keep for an adapter of this rank, unless a recipe sets it."""
    return max(RANK, RANK_PER_ROW * rows)


# Names of transformers (a test holds that they are): those that need nothing besides what we install.
Optimizer = Literal[
    "auto",
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "ademamix_8bit",
    "paged_ademamix_8bit",
    "lion_8bit",
    "paged_lion_8bit",
    "adafactor",
    "rmsprop",
    "sgd",
]
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "swanlab", "clearml", "dvclive"]


class ModelSection(Section):
    """The base model, which is loaded in 4 bits and never changed."""

    model_name_or_path: str
    """A hub id, a local folder, a local .gguf file, or demo/SmolLM2-135M-Instruct (downloaded from PyPI)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype, also of the parts that are not quantized. auto: bfloat16 where the hardware supports it."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """bitsandbytes' 4-bit data type."""
    bnb_4bit_use_double_quant: bool = True
    """Also quantize the quantization constants, which saves about 0.4 bits per parameter."""
    attn_implementation: Literal[
        "auto", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"
    ] = "auto"
    """The attention implementation. auto: the default of transformers, which is sdpa for most models."""


class ProxySection(Section):
    """Text sampled from the base model: what it can do before training, and what should be preserved."""

    source: Literal["bos", "chat", "mixed"] = "bos"
    """What sampling starts from: the beginning-of-text token, the chat template's user turn, or half of each."""
    num_samples: PositiveInt = 256
    """Number of samples for the statistics."""
    num_heldout_samples: PositiveInt = 32
    """Number of further samples, used for measuring only."""
    max_new_tokens: Annotated[int, Field(ge=16)] = 256
    """Maximum length of a sample in tokens."""
    decoding: Literal["plain", "paper"] = "plain"
    """plain: temperature 1, no truncation. paper: 70 % plain, 20 % top-p 0.95, 10 % T 1.2 with top-p 0.98 and top-k
    50."""
    filters: bool = False
    """Discard degenerate samples as the paper does: duplicates, short samples, repeated runs, few distinct tokens."""
    batch_size: PositiveInt = 32
    """Batch size for sampling."""
    public_share: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of packaged public text (prose, languages, tables, code) in the penalty; the rest is sampled text."""
    statistics_memory: Positive | None = None
    """Memory limit for the sketches in GiB; layers that do not fit are collected in further passes. Default: no
    limit."""
    seed: Seed = 0
    """Random seed of the sampling. Separate from training.seed, so that runs can share their sampled text."""


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
    """Batch size for the statistics. With covariance: fisher it is capped at the number of tokens of a training
    batch."""
    basis_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the gates' bases during training. auto: bfloat16 on a GPU, float32 on a CPU."""
    refresh_every: PositiveInt = 10
    """Rule step: number of steps between two updates of B's r x r gate."""
    complement: Literal["gated", "frozen"] = "gated"
    """Rule spectral: outside the sketched directions, A's steps are gated by one common value, or A is frozen there."""

    @property
    def readings(self) -> list[tuple[int, bool]]:
        """Of each reading after the sketches': a basis's columns, and whether its image is gathered to refine it."""
        if not self.second_pass:
            return []
        return [((2 + step) * self.rank, step < self.refinements) for step in range(self.refinements + 1)]

    def basis_dtype_on(self, gpu: bool) -> str:
        """What `basis_dtype` stands for: on a GPU, where they stay beside the model, three digits do."""
        if self.basis_dtype != "auto":
            return self.basis_dtype
        return "bfloat16" if gpu else "float32"

    @property
    def facts(self) -> GateRule:
        """The rule's facts."""
        return GATE_RULES[self.rule]

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
        """Description of the rule, its places and, where it matters, its strength."""
        strength = f"; λ = {self.gate_lambda:g}" if self.facts.uses_strength else ""
        return f"{self.rule} at {', '.join(self.places)}{strength}"

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
        return self


class TrainingSection(Section):
    """The training loop: TRL's SFTTrainer."""

    output_dir: Annotated[str, Field(pattern=r"^[^\x00]+$")]
    """The run folder, relative to the working directory."""
    learning_rate: Annotated[
        Positive,
        Field(
            description="Peak learning rate. With rule frozen a step of rate η costs η²/2 nats of KL, to second order, "
            f"on any model. Default by gate.rule: {defaults_by_rule(lambda rule: rule.learning_rate)}; "
            f"{written(PLAIN_LEARNING_RATE)} with gate.enabled: false."
        ),
    ] = GATE_RULES[DEFAULT_RULE].learning_rate
    embedding_learning_rate: Positive = 2e-5
    """Peak learning rate of adapter.modules_to_save, which are trained in full and without the gate."""
    num_train_epochs: Positive = 1.0
    """Number of passes over the training rows, unless max_steps is set."""
    max_steps: PositiveInt | None = None
    """Number of optimizer steps. Overrides num_train_epochs."""
    per_device_train_batch_size: PositiveInt = 4
    """Number of sequences in one forward pass."""
    gradient_accumulation_steps: PositiveInt = 4
    """Number of forward passes per optimizer step."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """Maximum sequence length in tokens; data.overlong says what happens to longer examples."""
    router_aux_loss_coef: NonNegative = 0.0
    """Weight of the router's load-balancing loss for a mixture of experts. 0 leaves it out, since routers and experts
    are frozen."""
    packing: bool = False
    """Pack several examples into one sequence of max_length. They cannot attend to each other."""
    assistant_only_loss: bool = True
    """Chats: compute the loss on the assistant's tokens only. false: on all tokens."""
    completion_only_loss: bool = True
    """Prompt and completion: compute the loss on the completion only. false: on both."""
    lr_scheduler_type: Scheduler = "cosine"
    """The learning rate schedule."""
    warmup_steps: NonNegative = 0.03
    """Number of warm-up steps; a value below 1 is a share of all steps. At most a third of the steps is used."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of the adapter."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to this norm. 0 disables clipping."""
    optim: Optimizer = "auto"
    """The optimizer, by its name in transformers. auto: paged_adamw_8bit on a GPU, adamw_torch on a CPU."""
    adam_beta1: Fraction = 0.9
    """Decay rate of Adam's first moment."""
    adam_beta2: Fraction = 0.999
    """Decay rate of Adam's second moment."""
    adam_epsilon: Positive = 1e-8
    """Added to the square root of Adam's second moment."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: about a third slower, far less memory. auto: on a GPU only."""
    auto_batch_size: bool = True
    """If memory runs out, split batches in half. Optimizer steps, data order and results stay the same."""
    max_skipped_steps: PositiveInt = 3
    """A step is skipped if its loss or gradient is not finite or its loss spikes; after this many in a row the run
    stops."""
    max_loss_factor: Annotated[float, Field(gt=1)] | None = 2.0
    """A loss spikes if it exceeds this multiple of the maximum over the last 32 steps, and ln(vocabulary) / 2. null
    disables the check."""
    save_steps: PositiveInt | None = None
    """Number of steps between checkpoints, for --resume. Default: one at the end of training, kept until the
    evaluation."""
    save_total_limit: PositiveInt = 2
    """Number of checkpoints to keep."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """If a checkpoint cannot be written, e.g. to a full disk: stop the run, or continue without it."""
    load_best_model_at_end: bool = False
    """Keep the checkpoint with the lowest held-out loss instead of the last one. Requires evaluation.steps."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations without a lower held-out loss, and keep the best. Requires evaluation.steps."""
    early_stopping_threshold: NonNegative = 0.0
    """Minimum decrease of the held-out loss that counts as lower."""
    seed: Seed = 0
    """Random seed of the adapter's initialization, the data order, the split and dropout."""

    def steps_for(self, sequences: int) -> int:
        """Number of optimizer steps of a run on a number of sequences, as transformers counts them."""
        if self.max_steps is not None:
            return self.max_steps
        passes = ceil(sequences / self.per_device_train_batch_size)
        return ceil(self.num_train_epochs * max(1, ceil(passes / self.gradient_accumulation_steps)))

    def optimizer_on(self, gpu: bool) -> str:
        """What `optim` stands for on a GPU, or on a CPU."""
        if self.optim != "auto":
            return self.optim
        return "paged_adamw_8bit" if gpu else "adamw_torch"

    def recomputes_on(self, gpu: bool) -> bool:
        """What `activation_checkpointing` stands for there."""
        return gpu if self.activation_checkpointing == "auto" else self.activation_checkpointing


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


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
    """Number of held-out samples, and of windows of general text, for evaluations during training. Afterwards all are
    used."""
    max_kl: Positive | None = None
    """Stop when KL(base ‖ tuned) exceeds this value in nats per token, and keep the best checkpoint below it. Requires
    evaluation.steps."""
    general_text: Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])] | None = None
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


class ExportSection(Section):
    """How the adapter is saved."""

    adapter_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the saved adapter, which is trained in float32. 16 bits halve the file."""
    base_model_name_or_path: str | None = None
    """Base model that the adapter names, e.g. a hub id if it was loaded from a folder. Default: what was loaded."""


def _no_trackers(value: Any) -> Any:
    if value is None or value == "none" or value == ["none"]:
        return []
    return _as_list(value)


class LoggingSection(Section):
    """Training metrics. They are always written to metrics.jsonl in the run folder."""

    report_to: Annotated[
        list[Tracker], BeforeValidator(_no_trackers, json_schema_input_type=Literal["none"] | Tracker | list[Tracker])
    ] = []
    """Trackers to report to, by their names in transformers. Install their packages yourself."""
    run_name: str | None = None
    """Name of the run in trackers. Default: the name of the run folder."""
    logging_steps: PositiveInt = 10
    """Number of steps between two lines of metrics."""


class Recipe(Section):
    """One run of folora-q."""

    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    proxy: ProxySection = ProxySection()
    gate: GateSection = GateSection()
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    export: ExportSection = ExportSection()
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_follow_other_sections(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        adapter, gate, training = (given.get(name) or {} for name in ("adapter", "gate", "training"))
        if not all(isinstance(section, dict) for section in (adapter, gate, training)):
            return given
        rows = adapter.get("r")
        if isinstance(rows, int) and sketch_rank(rows) > RANK:
            gate = {"rank": sketch_rank(rows)} | gate
        if training and (rate := default_learning_rate(gate)) is not None:
            training = {"learning_rate": rate} | training
        return given | {name: section for name, section in (("gate", gate), ("training", training)) if section}

    @model_validator(mode="after")
    def _a_rule_may_be_its_own_optimizer(self) -> Recipe:
        own = self.gate.enabled and self.gate.facts.optimizer == "own"
        if own and self.training.optim not in ("auto", "adamw_torch"):
            raise ValueError(
                f"gate.rule {self.gate.rule} is an AdamW of its own: training.optim: adamw_torch, not "
                f"{self.training.optim}"
            )
        return self

    @property
    def rate_advice(self) -> str | None:
        """A warning if the learning rate is far from the rule's default, as plain LoRA's rates are."""
        rate, default = self.training.learning_rate, self.gate.facts.learning_rate
        if not self.gate.enabled or not self.gate.scales_rows or self.gate.covariance != "fisher":
            return None
        if default / FAR_RATE < rate < default * FAR_RATE:
            return None
        how = "little is learned" if rate < default else "much is forgotten"
        return (
            f"training.learning_rate {rate:g} is far from {default:g}, the default of gate.rule {self.gate.rule}, "
            f"whose rate is in units of the KL that a step costs: with it {how}"
        )

    @property
    def rank_advice(self) -> str | None:
        """A warning if the sketches keep fewer directions than A has rows to initialize."""
        gate, rows = self.gate, self.adapter.r
        kept = 2 * gate.rank  # of the task's text and of the model's own together
        if not gate.enabled or gate.start != "leading" or "a_start" not in gate.places or rows <= kept:
            return None
        others = "stay zero and learn nothing" if gate.scales_rows else "start in random ones"
        return (
            f"gate.rank {gate.rank} keeps {kept} directions for an adapter of rank {rows}, whose other {rows - kept} "
            f"rows {others}: leave gate.rank out, which is {sketch_rank(rows)} then"
        )

    @property
    def advice(self) -> list[str]:
        """Sentences about settings that are allowed and seldom meant."""
        return [sentence for sentence in (self.rate_advice, self.rank_advice) if sentence is not None]

    def statistics_batch_size(self, length: int) -> int:
        """Sequences of this length, at most, that statistics are taken of at a time.

        A backward pass has no more room than in training: it takes as many tokens.
        """
        if self.gate.covariance == "activation":
            return self.gate.batch_size
        rows, longest = self.training.per_device_train_batch_size, self.training.max_length
        return min(self.gate.batch_size, max(rows, rows * longest // length))

    @property
    def keeps_best(self) -> bool:
        """Whether the run ends with the best of its checkpoints."""
        training = self.training
        return (
            training.load_best_model_at_end
            or training.early_stopping_patience is not None
            or self.evaluation.max_kl is not None
        )

    @model_validator(mode="after")
    def _the_best_needs_measurements(self) -> Recipe:
        every, saved = self.evaluation.steps, self.training.save_steps
        if not self.keeps_best:
            return self
        if every is None:
            stopping = self.training.early_stopping_patience is not None
            name = "early_stopping_patience" if stopping else "load_best_model_at_end"
            raise ValueError(f"training.{name} needs measurements during training: set evaluation.steps, e.g. to 50")
        if saved is not None and saved % every:
            raise ValueError(
                f"the best step can only be kept if it was saved: make training.save_steps ({saved}) a multiple of "
                f"evaluation.steps ({every}), or leave it out"
            )
        return self
