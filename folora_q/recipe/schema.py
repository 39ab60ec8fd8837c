"""The recipe's sections. The string under a field is its help text; names are Hugging Face's where it has one."""

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
    """A hub id, a local folder, a local .gguf file, or demo/SmolLM2-135M-Instruct (fetched from PyPI, checked)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype, and that of the parts that are not quantized; auto asks the hardware."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type of bitsandbytes."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the quantization constants too, which saves about 0.4 bits a parameter."""
    attn_implementation: Literal[
        "auto", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"
    ] = "auto"
    """The attention backend; auto is what transformers chooses, which is sdpa for most models."""


class ProxySection(Section):
    """Text sampled from the base model itself: what it already handles, and what is to stay as it is."""

    source: Literal["bos", "chat", "mixed"] = "bos"
    """Sample from the beginning-of-text token, from the chat template's user turn, or half of each."""
    num_samples: PositiveInt = 256
    """Samples for the statistics."""
    num_heldout_samples: PositiveInt = 32
    """Further samples that are used for measuring only."""
    max_new_tokens: Annotated[int, Field(ge=16)] = 256
    """Length of a sample in tokens, at most."""
    decoding: Literal["plain", "paper"] = "plain"
    """Temperature 1 without cuts, or the paper's: 70 % plain, 20 % top-p 0.95, 10 % T 1.2, top-p 0.98, top-k 50."""
    filters: bool = False
    """The paper's filters against degenerate text: duplicates, short samples, runs, few distinct tokens or 4-grams."""
    batch_size: PositiveInt = 32
    """Sequences sampled at a time."""
    public_share: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of packaged public text (prose, languages, tables, code) in the penalty; the rest is what was sampled."""
    statistics_memory: Positive | None = None
    """GiB for the sketches; layers that do not fit come after the others, reading the text again; unset: no limit."""
    seed: Seed = 0
    """Seed of the sampling, apart from the training's, so that runs share their proxy text."""


class GateSection(Section):
    """The gate on the adapter's updates."""

    enabled: bool = True
    """false is plain QLoRA with the same seeds and data order."""
    rule: Annotated[RuleName, Field(description=rule_summaries())] = DEFAULT_RULE
    places: Annotated[
        list[Place],
        Field(
            description="Where the gate acts: on A's initialization, on A's steps, on B's steps. Default by rule: "
            f"{defaults_by_rule(lambda rule: rule.places)}; frozen with start: random: [a_start]."
        ),
    ] = GATE_RULES[DEFAULT_RULE].default_places(random_start=False)
    start: Literal["leading", "random"] = "leading"
    """Of A: in the r directions of largest quotient; or where PEFT puts it at random, passed through the gate."""
    gate_lambda: NonNegative = 64.0
    """λ, the strength of rules step and spectral: a direction whose quotient equals it passes half of a step. Raise it
    together with the learning rate."""
    floor: Fraction = 0.0
    """s_min: the least share of a step that every direction passes."""
    sharpness: Positive = 1.0
    """p in γᵖ / (γᵖ + λᵖ)."""
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
    """Directions that each sketch keeps. Left out: 64, or twice adapter.r where that is more."""
    oversampling: Annotated[int, Field(ge=0)] = 16
    """Sketch columns beyond the rank."""
    second_pass: bool = True
    """Read the text twice, so that every quotient is exact in its direction."""
    refinements: Annotated[int, Field(ge=0)] = 1
    """Further readings, each for a better basis of the largest quotients; after a second_pass alone."""
    covariance: Literal["fisher", "activation"] = "fisher"
    """fisher: a token counts by the loss's gradient at what is made of it. activation: all alike, as in the paper."""
    num_task_samples: PositiveInt = 256
    """Training rows for the task's statistics."""
    batch_size: PositiveInt = 16
    """Sequences that statistics are taken of at a time; for covariance fisher with no more tokens than in training."""
    basis_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the gates' bases, which stay beside the model; auto: bfloat16 on a GPU, float32 on a CPU."""
    refresh_every: PositiveInt = 10
    """Steps between two solutions of the r x r problem that gates B."""
    complement: Literal["gated", "frozen"] = "gated"
    """Rule spectral: what happens outside the sketched directions."""

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
        """Of what shapes s(γ) that which is not as by default, with the defaults."""
        defaults = {name: type(self).model_fields[name].default for name in ("gate_lambda", "floor", "sharpness")}
        return {name: default for name, default in defaults.items() if getattr(self, name) != default}

    @property
    def words(self) -> str:
        """Rule, places and strength, for people; where only A's start is gated the strength says nothing."""
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
    """The training loop, which is transformers' Trainer through TRL's SFTTrainer."""

    output_dir: Annotated[str, Field(pattern=r"^[^\x00]+$")]
    """The run folder, relative to where the command is given."""
    learning_rate: Annotated[
        Positive,
        Field(
            description="Peak learning rate. With rule frozen a step of rate η costs η²/2 nats of KL, to second order, "
            f"on any model. Default by gate.rule: {defaults_by_rule(lambda rule: rule.learning_rate)}; "
            f"{written(PLAIN_LEARNING_RATE)} with gate.enabled: false."
        ),
    ] = GATE_RULES[DEFAULT_RULE].learning_rate
    embedding_learning_rate: Positive = 2e-5
    """Peak learning rate of adapter.modules_to_save, which no rule of the gate scales: that of full fine-tuning."""
    num_train_epochs: Positive = 1.0
    """Passes over the training rows, unless max_steps is set."""
    max_steps: PositiveInt | None = None
    """Optimizer steps; overrides num_train_epochs."""
    per_device_train_batch_size: PositiveInt = 4
    """Sequences in one forward pass."""
    gradient_accumulation_steps: PositiveInt = 4
    """Forward passes in one optimizer step."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """The longest sequence in tokens; data.overlong says what happens to longer ones."""
    router_aux_loss_coef: NonNegative = 0.0
    """Weight of the routers' balancing loss in the loss of a mixture of experts. 0 leaves it out: routers and experts
    are frozen."""
    packing: bool = False
    """Put several examples into one sequence of max_length, where they cannot attend to each other."""
    assistant_only_loss: bool = True
    """Chats: train on what the assistant says alone; false trains on every token."""
    completion_only_loss: bool = True
    """Rows with a prompt and a completion: train on the completion alone; false trains on both."""
    lr_scheduler_type: Scheduler = "cosine"
    """The learning rate's schedule."""
    warmup_steps: NonNegative = 0.03
    """Steps of warm-up; below 1 it is a share of all steps. At most a third of them, and the first step has a rate."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay on the adapter."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to this norm; 0 turns it off."""
    optim: Optimizer = "auto"
    """The optimizer, by transformers' name, whose step is gated; auto: paged_adamw_8bit on a GPU, else adamw_torch."""
    adam_beta1: Fraction = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Fraction = 0.999
    """Decay of Adam's second moment."""
    adam_epsilon: Positive = 1e-8
    """Added to the root of Adam's second moment."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: about a third slower, far less memory; auto: on a GPU."""
    auto_batch_size: bool = True
    """Where memory runs out, compute on half the sequences at a time: steps, data order and results stay."""
    max_skipped_steps: PositiveInt = 3
    """A step whose loss or gradient is not finite, or blows up, is skipped; after so many in a row the run stops."""
    max_loss_factor: Annotated[float, Field(gt=1)] | None = 2.0
    """A loss blows up at so many times the largest of the last 32 steps, if over ln(vocabulary) / 2; null: never."""
    save_steps: PositiveInt | None = None
    """Steps between two checkpoints, from which --resume goes on; unset: one at the end, until it is evaluated."""
    save_total_limit: PositiveInt = 2
    """How many checkpoints are kept."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """A checkpoint that cannot be written, as on a full disk, ends the run, or leaves it without that checkpoint."""
    load_best_model_at_end: bool = False
    """End with the checkpoint that has the least held-out loss, in place of the last step's; needs evaluation.steps."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after so many measurements without a smaller held-out loss, and keep the best; needs evaluation.steps."""
    early_stopping_threshold: NonNegative = 0.0
    """A loss is smaller if it is so by more than this."""
    seed: Seed = 0
    """Of the adapter's start, the data order, the split and dropout."""

    def steps_for(self, sequences: int) -> int:
        """Optimizer steps of a run on so many sequences, as transformers counts them."""
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
    """What is measured of the base and of the tuned model, after training and during it."""

    metric: Literal["none", "exact_match", "regex", "function"] = "none"
    """Scores greedy answers, without thoughts and as the chat template renders the reference: equal to it but for white
    space, by metric_pattern, or by metric_function."""
    metric_pattern: str = r"-?\d[\d,]*(?:\.\d+)?"
    """regex: right if the last match in the answer (its groups, if it has any) is the reference's; unset: a number."""
    metric_function: str | None = None
    """function: file.py:name, relative to the recipe, called with (answer, reference), both without thoughts, and with
    thought and reference_thought if it has parameters of these names; gives 0 to 1; --allow-code."""
    num_answers: Annotated[int, Field(ge=0)] | None = None
    """Held-out prompts that are answered; unset: all of them with a metric, four without."""
    max_new_tokens: PositiveInt = 128
    """Length of a generated answer, at most."""
    batch_size: PositiveInt = 16
    """Sequences measured at a time."""
    steps: PositiveInt | None = None
    """Steps between two measurements during training: held-out loss, KL, loss on general text; unset: after it only."""
    num_proxy_samples: PositiveInt = 16
    """Number of held-out samples, and of windows of general text, measured during training; after it, all are."""
    max_kl: Positive | None = None
    """Stop when KL(base ‖ tuned) exceeds this, in nats per token, and keep the best checkpoint within; needs steps."""
    general_text: Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])] | None = None
    """Text files on which forgetting (loss after - before) is measured; unset: packaged prose, manual pages, code."""
    general_prompts: str | None = None
    """A text file with a prompt a line, answered by base and tuned model for you to read; unset: six packaged ones."""

    @field_validator("metric_pattern")
    @classmethod
    def _a_regular_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"it is no regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _a_function_is_named(self) -> EvaluationSection:
        if self.metric == "function" and not re.fullmatch(r".+\.py:[A-Za-z_]\w*", self.metric_function or ""):
            raise ValueError("metric: function needs metric_function, such as score.py:score")
        if self.max_kl is not None and self.steps is None:
            raise ValueError("max_kl needs measurements during training: set evaluation.steps, e.g. to 50")
        return self


class ExportSection(Section):
    """The adapter as it is saved."""

    adapter_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The saved adapter's dtype; 16 bits halve the file. It is trained in float32."""
    base_model_name_or_path: str | None = None
    """What the adapter names as its base, e.g. a hub id when it was loaded from a folder; unset: what was loaded."""


def _no_trackers(value: Any) -> Any:
    if value is None or value == "none" or value == ["none"]:
        return []
    return _as_list(value)


class LoggingSection(Section):
    """Training metrics, which always go to metrics.jsonl in the run folder."""

    report_to: Annotated[
        list[Tracker], BeforeValidator(_no_trackers, json_schema_input_type=Literal["none"] | Tracker | list[Tracker])
    ] = []
    """Trackers that get the metrics too, by transformers' names; their packages are installed by you."""
    run_name: str | None = None
    """The run's name there; unset: the name of the run folder."""
    logging_steps: PositiveInt = 10
    """Steps between two lines of metrics."""


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
        """A sentence where the learning rate is far from the gate's default, as plain LoRA's rates are."""
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
        """A sentence where the sketches keep fewer directions than A has rows to start in."""
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
