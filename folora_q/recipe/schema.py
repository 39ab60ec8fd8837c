"""The recipe's sections. The string under a field is its help text; names are Hugging Face's where it has one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Place = Literal["a_start", "a_step", "b_step"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


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


class AdapterSection(Section):
    """The LoRA adapter, trained and saved in float32."""

    r: PositiveInt = 16
    """Rank of the adapter."""
    lora_alpha: Positive = 16
    """The adapter's output is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Which linear layers get an adapter: all of the transformer, or a list of name endings."""


class DataSection(Section):
    """The task: JSONL rows with `messages`, or with `prompt` and `completion`. Paths are relative to the recipe."""

    train_file: str
    """Rows to train on."""
    eval_file: str | None = None
    """Rows for evaluation only; without it, eval_size of the training rows are held out."""
    eval_size: Fraction = 0.05
    """Share of train_file to hold out when there is no eval_file."""
    max_train_samples: PositiveInt | None = None
    """Use only the first so many training rows."""
    max_eval_samples: PositiveInt | None = None
    """Use only the first so many evaluation rows."""


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
    """Sequences sampled, or measured, at a time."""
    seed: int = 0
    """Seed of the sampling, apart from the training's, so that runs share their proxy text."""


class GateSection(Section):
    """The gate on the adapter's updates."""

    enabled: bool = True
    """false is plain QLoRA with the same seeds and data order."""
    rule: Literal["step", "spectral"] = "step"
    """step: any optimizer's step passed through the gate. spectral: Adam in the gate's coordinates, as in the paper."""
    places: list[Place] = ["a_start", "a_step", "b_step"]
    """Where it acts: on A's random start, on A's steps, on B's steps (rule step only)."""
    gate_lambda: NonNegative = 16.0
    """λ, the strength: a direction whose quotient equals it passes half. Raise it together with the learning rate."""
    floor: Fraction = 0.0
    """s_min: the least share of a step that every direction passes."""
    sharpness: Positive = 1.0
    """p in γᵖ / (γᵖ + λᵖ)."""
    ridge: Positive = 0.01
    """τ, added to the proxy covariance, relative to its mean variance."""
    utility_ridge: NonNegative = 0.01
    """Added to the task covariance: with ridge, directions in neither text count as equally useful and costly."""
    rank: PositiveInt = 64
    """Directions that each sketch keeps."""
    oversampling: Annotated[int, Field(ge=0)] = 16
    """Sketch columns beyond the rank."""
    second_pass: bool = True
    """Read the text twice, so that every quotient is exact in its direction."""
    num_task_samples: PositiveInt = 256
    """Training rows for the task's statistics."""
    refresh_every: PositiveInt = 10
    """Steps between two solutions of the r x r problem that gates B."""
    complement: Literal["gated", "frozen"] = "gated"
    """Rule spectral: what happens outside the sketched directions."""

    @model_validator(mode="after")
    def _spectral_gates_a_only(self) -> GateSection:
        if self.enabled and self.rule == "spectral" and "b_step" in self.places:
            raise ValueError(
                "rule spectral leaves B to AdamW, as in the paper: set gate.places to [a_start, a_step] or [a_step]"
            )
        if self.enabled and self.rule == "spectral" and "a_step" not in self.places:
            raise ValueError("rule spectral needs a_step among gate.places")
        return self


class TrainingSection(Section):
    """The training loop, which is transformers' Trainer through TRL's SFTTrainer."""

    output_dir: str
    """The run folder, relative to where the command is given."""
    learning_rate: Positive = 2e-4
    """Peak learning rate."""
    num_train_epochs: Positive = 1.0
    """Passes over the training rows, unless max_steps is set."""
    max_steps: PositiveInt | None = None
    """Optimizer steps; overrides num_train_epochs."""
    per_device_train_batch_size: PositiveInt = 4
    """Sequences in one forward pass."""
    gradient_accumulation_steps: PositiveInt = 4
    """Forward passes in one optimizer step."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """Longer examples are cut to so many tokens."""
    lr_scheduler_type: str = "cosine"
    """A schedule of transformers: linear, cosine, constant, constant_with_warmup, ..."""
    warmup_steps: NonNegative = 0.03
    """Steps of warm-up; below 1 it is a share of all steps."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay on the adapter."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to this norm; 0 turns it off."""
    optim: str = "adamw_torch"
    """An optimizer of transformers, e.g. adamw_torch or paged_adamw_8bit. The gate acts on its step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    seed: int = 0
    """Of the adapter's start, the data order and dropout."""
    logging_steps: PositiveInt = 10
    """Steps between two lines of metrics."""


class EvaluationSection(Section):
    """What is measured before and after training."""

    metric: Literal["none", "exact_match"] = "none"
    """exact_match: greedy answers that equal the reference, after trimming white space."""
    max_new_tokens: PositiveInt = 128
    """Length of a generated answer, at most."""
    batch_size: PositiveInt = 16
    """Sequences measured at a time."""
    general_text: str | None = None
    """A text file for PEFT's `forgetting` (loss after - before), relative to the recipe; unset: public-domain prose."""


class Recipe(Section):
    """One run of folora-q."""

    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    proxy: ProxySection = ProxySection()
    gate: GateSection = GateSection()
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _spectral_is_its_own_optimizer(self) -> Recipe:
        if self.gate.enabled and self.gate.rule == "spectral" and self.training.optim != "adamw_torch":
            raise ValueError(
                f"gate.rule spectral is an AdamW of its own: training.optim: adamw_torch, not {self.training.optim}"
            )
        return self
