"""The recipe's section `training`."""

from __future__ import annotations

import os
from math import ceil
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from folora_q.recipe.gate_rules import DEFAULT_RULE, GATE_RULES, PLAIN_LEARNING_RATE, defaults_by_rule, written
from folora_q.recipe.objectives import OBJECTIVE_FACTS, OTHER_OBJECTIVES, ObjectiveName, RewardObjective
from folora_q.recipe.section import Fraction, NonNegative, Positive, PositiveInt, Section, Seed

# Names in transformers (which a test checks) of optimizers that need no further packages.
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
Kernels = Literal["auto", "compile", "liger", "none"]


def _known_objective(value: Any) -> Any:
    if isinstance(value, str) and (reason := OTHER_OBJECTIVES.get(value.lower())):
        raise ValueError(f"{value} is not supported: {reason}")
    return value


class TrainingSection(Section):
    """The training loop of TRL's SFTTrainer, and what it minimizes."""

    output_dir: Annotated[str, Field(pattern=r"^[^\x00]+$")]
    """The run folder, relative to the working directory."""
    objective: Annotated[ObjectiveName, BeforeValidator(_known_objective, json_schema_input_type=ObjectiveName)] = "sft"
    """What is minimized. sft: the loss of the tokens to learn. dpo: Direct Preference Optimization, on rows with a
    preferred (chosen) and another answer (rejected). kto: Kahneman-Tversky Optimization, on rows with an answer and
    whether it is desirable (label). The reference of both is the base, which is the model without adapter."""
    beta: Positive = 0.1
    """dpo, kto: weight of the distance from the base; with a larger value the model stays closer to it."""
    desirable_weight: Positive = 1.0
    """kto: weight of the loss of desirable answers."""
    undesirable_weight: Positive = 1.0
    """kto: weight of the loss of undesirable answers. If one kind has many more rows, raise the weight of the other."""
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
    """Number of rows in one forward pass. With objective dpo each has two sequences that are trained."""
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
    """Recompute activations in the backward pass: about a third slower, far less memory. auto: on a GPU, where the
    memory estimate finds no faster way to compute a step."""
    kernels: Kernels = "auto"
    """How training steps are computed. auto: layers whose A is frozen share A x and one gradient of their input (the
    adapter stays PEFT's); in runs of ten minutes or more torch.compile is tried on the decoder layers, and kept if it
    is faster. compile: always. liger: Liger's norms, rotary embeddings and activations, on a GPU (not measured). none:
    PEFT's and transformers' own code."""
    activation_offloading: bool = False
    """On a GPU: keep what activation checkpointing saves in the host's memory until the backward pass. For long
    contexts; slower, and requires activation_checkpointing."""
    auto_batch_size: bool = True
    """On a GPU, cut per_device_train_batch_size x gradient_accumulation_steps into forward passes by the memory
    estimate, and split them further if memory runs out. Optimizer steps, data order and results stay the same. Batches
    of sampling, statistics and evaluation follow from the estimate too."""
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

    @field_validator("output_dir")
    @classmethod
    def _home_is_written_as_tilde(cls, value: str) -> str:
        return os.path.expanduser(value)

    @model_validator(mode="after")
    def _only_checkpoints_are_offloaded(self) -> TrainingSection:
        if self.activation_offloading and self.activation_checkpointing is False:
            raise ValueError("activation_offloading requires activation_checkpointing: set that to true or auto")
        return self

    @model_validator(mode="after")
    def _answers_are_compared_alone(self) -> TrainingSection:
        if not self.compares:
            return self
        if self.packing:
            raise ValueError(f"packing is for objective sft: with {self.objective} every answer has its own sequence")
        if not (self.assistant_only_loss and self.completion_only_loss):
            raise ValueError(
                f"objective {self.objective} compares answers alone: remove assistant_only_loss and "
                "completion_only_loss"
            )
        return self

    @property
    def compares(self) -> bool:
        """Whether the objective rewards answers by their probability in relation to the base."""
        return self.objective in get_args(RewardObjective)

    @property
    def sequences_per_row(self) -> int:
        """The number of sequences of one row that are trained on: of a pair, both answers."""
        return OBJECTIVE_FACTS[self.objective].sequences

    def steps_for(self, sequences: int) -> int:
        """Return the number of optimizer steps for a number of sequences, as transformers counts them."""
        if self.max_steps is not None:
            return self.max_steps
        passes = ceil(sequences / self.per_device_train_batch_size)
        return ceil(self.num_train_epochs * max(1, ceil(passes / self.gradient_accumulation_steps)))

    def optimizer_on(self, gpu: bool) -> str:
        """Return the optimizer that `optim` means on a GPU or on a CPU."""
        if self.optim != "auto":
            return self.optim
        return "paged_adamw_8bit" if gpu else "adamw_torch"

    def recomputes_on(self, gpu: bool) -> bool:
        """Return whether `activation_checkpointing` is on, on a GPU or on a CPU."""
        return gpu if self.activation_checkpointing == "auto" else self.activation_checkpointing
