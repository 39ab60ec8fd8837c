"""TRL's SFTTrainer, with the gate around its optimizer and float32 adapters. No loop, collator or mask of our own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.loss.loss_utils import ForCausalLMLoss
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer import sft_trainer

from folora_q.core import GatedOptimizer, SpectralGate
from folora_q.core.optimizer import TOLERATED_FAILURES
from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.tokens import batches
from folora_q.errors import RunFailed, UserError, first_line
from folora_q.evaluation.divergence import compare
from folora_q.evaluation.loss import mean_loss
from folora_q.evaluation.model_pair import ModelPair
from folora_q.models.adapters import adapter_pairs, keep_in_float32, trains_head, wrappers
from folora_q.models.hardware import Hardware
from folora_q.recipe.schema import GateSection, Recipe
from folora_q.rules import AdamSettings, OptimizerContext, rule_of
from folora_q.training.callbacks import BeforeTraining
from folora_q.training.fault_tolerant_trainer import FaultTolerantTrainer
from folora_q.training.schedule import rising_from_the_first_step, warmup_of
from folora_q.training.step_guards import MicroBatches, SkippedSteps

# Its name in transformers before 5.20 and since.
FIELDS = SFTConfig.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"
# What the best checkpoint has the least of: the held-out loss of those within the limit.
BEST = "loss_within_limit"


class GatedTrainer(FaultTolerantTrainer):
    """A trainer whose optimizer passes the adapter's steps through `gates`, once those are set.

    Attributes:
        gates: by adapted layer, set by `gate_with`; None is plain QLoRA.
        max_kl: the KL at which training stops.
        rate_of_whole: learning rate of modules that are trained whole.
        means_batches: the model's own loss is a mean over a batch, whatever it holds, as that of models that also see.
    """

    gates: Mapping[str, SpectralGate] | None = None
    gate_section: GateSection
    max_kl: float | None = None
    rate_of_whole: float = 0.0
    gated: GatedOptimizer | None = None
    means_batches: bool = False

    def gate_with(self, gates: Mapping[str, SpectralGate]) -> None:
        """Pass all steps to come through these gates, by the recipe's rule.

        Args:
            gates: by adapted layer, those of one input space one object.
        """
        self.gates = rule_of(self.gate_section).before_training(adapter_pairs(self.model), gates)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        make = super().create_optimizer

        def configured() -> Optimizer:
            return self._with_rate_of_whole(make(model))

        if self.gates is None:
            return configured()
        rule = rule_of(self.gate_section)
        pairs = [pair for pair in adapter_pairs(self.model) if pair.name in self.gates]
        gated = {id(p) for pair in pairs for p in (pair.a, pair.b)}
        arguments = self.args
        context = OptimizerContext(
            section=self.gate_section,
            adapters=[(pair.a, pair.b, self.gates[pair.name]) for pair in pairs],
            configured=configured,
            adam=AdamSettings(
                lr=arguments.learning_rate,
                betas=(arguments.adam_beta1, arguments.adam_beta2),
                eps=arguments.adam_epsilon,
                weight_decay=arguments.weight_decay,
            ),
            ungated=[p for p in self.model.parameters() if p.requires_grad and id(p) not in gated],
            on_failure=self._rank_gates_failed,
        )
        self.optimizer = rule.build_optimizer(context)
        if isinstance(self.optimizer, GatedOptimizer):
            self.gated = self.optimizer
        return self._with_rate_of_whole(self.optimizer) if rule.facts.optimizer == "own" else self.optimizer

    def _with_rate_of_whole(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer with groups of their own for what is trained whole, whose rate is no adapter's."""
        whole = {id(p) for wrapper in wrappers(self.model).values() for p in wrapper.parameters() if p.requires_grad}
        for group in [*optimizer.param_groups] if whole else []:
            apart = [p for p in group["params"] if id(p) in whole]
            if apart:
                group["params"] = [p for p in group["params"] if id(p) not in whole]
                optimizer.add_param_group({**group, "params": apart, "lr": self.rate_of_whole})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        made = self.lr_scheduler is None
        self.args.warmup_steps = warmup = warmup_of(self.args.warmup_steps, num_training_steps)
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if made:
            self.lr_scheduler = scheduler = rising_from_the_first_step(scheduler, warmup)
        return scheduler

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """The held-out loss, KL from the base and rise of the loss on real text, as they are measured after training.

        All are in nats per token. Where real text got worse beyond doubt (95 %), a line says so.

        The Trainer's own loss is a mean over batches, whatever they hold, and keeps their logits.
        """
        self.model.eval()
        loss = mean_loss(self.model.get_base_model(), self.heldout, splitter=self.measuring)
        metrics = {f"{metric_key_prefix}_loss": loss}
        within = True
        if self.own_text is not None:
            own = compare(ModelPair(self.model), self.own_text, splitter=self.measuring)
            metrics[f"{metric_key_prefix}_kl"] = own.kl.value
            metrics[f"{metric_key_prefix}_top1_agreement"] = own.top1_agreement.value
            within = self.max_kl is None or own.kl.value <= self.max_kl
        for text in self.real_text:
            rise = compare(ModelPair(self.model), text, splitter=self.measuring).loss.change
            metrics[f"{metric_key_prefix}_rise_{text.name}"] = rise.value
            if rise.low > 0:
                self.skipped.tell(
                    f"step {self.state.global_step}: real text got worse: the loss on {text.name} rose by "
                    f"{rise.value:.4f} nats per token (95 % interval {rise.low:.4f} to {rise.high:.4f})"
                )
        self.log(dict(metrics))
        # The Trainer keeps the checkpoint with the least of this: one over the limit never is.
        metrics[f"{metric_key_prefix}_{BEST}"] = loss if within else math.inf
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if not within:
            self.exceeded = self.state.global_step, own.kl.value
            self.control.should_training_stop = True
        return metrics

    def conclude(self, steps: int, tell: Callable[[str], None]) -> None:
        """Say where training stopped, and what was kept of it.

        Args:
            steps: as many as there were to be.

        Raises:
            RunFailed: the KL went over its limit before any step within it was saved.
        """
        state = self.state
        if self.exceeded is not None:
            step, kl = self.exceeded
            tell(f"stopped at step {step}: KL {kl:.4f} is over evaluation.max_kl ({self.max_kl})")
            if state.best_model_checkpoint is None:
                raise RunFailed(
                    f"KL from the base was {kl:.4f} at step {step}, over evaluation.max_kl ({self.max_kl}), before any "
                    "step within it was saved",
                    "lower training.learning_rate, or measure more often (evaluation.steps)",
                )
        elif state.global_step < steps:
            tell(f"stopped at step {state.global_step} of {steps}: the held-out loss no longer fell")
        if self.args.load_best_model_at_end and state.best_model_checkpoint is None:
            tell("no step is the best, since no held-out loss was finite: the last one is kept")
        elif self.args.load_best_model_at_end:
            tell(f"kept step {state.best_global_step}, with the least held-out loss: {state.best_metric:.4f}")

    def require_learned(self) -> None:
        """See that the adapter is no longer what it was: B begins at zero.

        Raises:
            RunFailed: nothing was learned.
        """
        if any(bool(pair.b.detach().any()) for pair in adapter_pairs(self.model)):
            return
        steps = self.state.global_step
        if self.skipped.total >= steps:
            hint = "every step was skipped, as metrics.jsonl says: lower training.learning_rate"
        elif self.args.fp16:
            hint = "its gradients may have overflowed in float16 each time: set model.dtype to float32"
        else:
            hint = "raise training.learning_rate, or take more steps (training.num_train_epochs, training.max_steps)"
        raise RunFailed(f"nothing was learned in {steps} steps: B is zero in every layer", hint)

    def _rank_gates_failed(self, failures: int, error: Exception) -> None:
        self.skipped.tell(
            f"step {self.state.global_step + 1}: the gates of B could not be solved for, and the last ones stay "
            f"({failures} in a row, the run ends at {TOLERATED_FAILURES + 1}): {first_line(error)}"
        )
        if failures > TOLERATED_FAILURES:
            raise RunFailed(
                f"the gates of B could not be solved for {failures} times in a row: {first_line(error)}",
                "raise gate.ridge, e.g. tenfold, or lower training.learning_rate",
            ) from error

    def energy_kept(self) -> dict[str, dict[str, float]]:
        """By layer, the share of its steps' energy that the gate let pass, of "a" and "b"; empty if none was."""
        if self.gated is None or self.gates is None:
            return {}
        names = [pair.name for pair in adapter_pairs(self.model) if pair.name in self.gates]
        return dict(zip(names, self.gated.energy_kept(), strict=True))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None beside a checkpoint: the card with the numbers is written with the adapter."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        # TRL's chunked head is made for Triton; without it, it scores ignored positions too and takes half of the step.
        # It multiplies with the head's weight and asks no module, so an adapter on the head would learn nothing.
        if self.args.device.type == "cuda" and not trains_head(self.model):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.means_batches and not self.aux_loss_enabled:
            return super(SFTTrainer, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)
        balancing = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, **balancing)
        words = outputs.logits.shape[-1]
        loss = ForCausalLMLoss(outputs.logits, inputs["labels"], words, num_items_in_batch=num_items_in_batch)
        if self.aux_loss_enabled:  # a mean over a micro-batch
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


def on_one_device(config: SFTConfig) -> None:
    """Keep transformers from using every GPU that it sees: it would copy the model, and train on larger batches."""
    _ = config.device  # counts them
    config._n_gpu = min(config.n_gpu, 1)


def build_trainer(
    model: PeftModel,
    tokenizer: Tokenizer,
    train: Dataset,
    heldout: Dataset,
    recipe: Recipe,
    hardware: Hardware,
    output_dir: Path,
    callbacks: Sequence[TrainerCallback] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> GatedTrainer:
    """A trainer on tokenized data.

    Args:
        train, heldout: columns `input_ids` and `labels`; `training.packing` packs the first here.
        tell: takes a line each time that memory runs out, or a step is skipped.

    Raises:
        UserError: a combination of settings is not one that transformers takes, or one that this model has no use for.
    """
    training, every = recipe.training, recipe.evaluation.steps
    save_steps = training.save_steps or (every if recipe.keeps_best else None)
    on_gpu = hardware.device.type == "cuda"
    try:
        config = SFTConfig(
            output_dir=str(output_dir),
            learning_rate=training.learning_rate,
            num_train_epochs=training.num_train_epochs,
            max_steps=training.max_steps or -1,
            per_device_train_batch_size=training.per_device_train_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            lr_scheduler_type=training.lr_scheduler_type,
            warmup_steps=training.warmup_steps,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            optim=training.optimizer_on(on_gpu),  # rule spectral is its own, and makes none of this name
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_epsilon=training.adam_epsilon,
            **{CHECKPOINTING: training.recomputes_on(on_gpu)},
            seed=training.seed,
            router_aux_loss_coef=training.router_aux_loss_coef,  # left out, TRL would take the configuration's own
            max_length=training.max_length,
            packing=training.packing,
            dataset_kwargs={"skip_prepare_dataset": True},  # it is prepared
            eval_strategy="steps" if every else "no",
            eval_steps=every,
            eval_on_start=every is not None,
            save_strategy="steps" if save_steps else "no",
            save_steps=save_steps or 1,
            save_total_limit=None,  # it would remove the last good one before the next is known to be whole
            restore_callback_states_from_checkpoint=True,
            load_best_model_at_end=recipe.keeps_best,
            metric_for_best_model=f"eval_{BEST}",
            greater_is_better=False,
            logging_steps=recipe.logging.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # it would show a running average in place of a NaN
            report_to=list(recipe.logging.report_to) or "none",
            run_name=recipe.logging.run_name or output_dir.name,
            bf16=on_gpu and hardware.dtype == torch.bfloat16,
            fp16=on_gpu and hardware.dtype == torch.float16,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            disable_tqdm=True,
        )
    except ValueError as error:
        raise UserError(f"section `training`: {str(error).splitlines()[0]}") from error
    on_one_device(config)
    if training.router_aux_loss_coef and not hasattr(model.config.get_text_config(), "output_router_logits"):
        raise UserError(
            "`training.router_aux_loss_coef` is for mixtures of experts, and this model has no router to balance",
            "leave it out",
        )
    if training.packing:
        train = pack_dataset(train.select_columns(["input_ids", "labels"]), training.max_length)
    start = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    with patch.object(sft_trainer, "BaseTunerLayer", ()):  # it refuses an adapter on the head, which it is not asked to
        trainer = GatedTrainer(
            model=model,
            args=config,
            processing_class=tokenizer,
            train_dataset=train,
            eval_dataset=heldout,
            callbacks=list(callbacks),
        )
    # TRL leaves it on in the configuration, for every pass that comes; a step of training asks for it.
    model.config.get_text_config().output_router_logits = False
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps  # the rehearsal's
    trainer.means_batches = not trainer.model_accepts_loss_kwargs
    trainer.model_accepts_loss_kwargs = True  # every token counts alike, in whichever batch it is
    trainer.remove_callback(PrinterCallback)  # it prints every line of metrics
    keep_in_float32(model, start)  # SFTTrainer casts adapters on a 4-bit base to bfloat16
    if training.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(training.early_stopping_patience, training.early_stopping_threshold))
    trainer.micro_batches = MicroBatches(BatchSplitter("training on", tell, training.auto_batch_size))
    trainer.measuring = BatchSplitter("measuring", tell, training.auto_batch_size)
    factor = None if config.fp16 else training.max_loss_factor  # where the loss scaler says which steps are taken
    vocabulary = model.get_input_embeddings().weight.shape[0]
    trainer.skipped = SkippedSteps(training.max_skipped_steps, factor, vocabulary, tell)
    trainer.kept = training.save_total_limit
    trainer.needs_saves = training.on_save_error == "stop"
    trainer.add_callback(BeforeTraining(trainer.before_first_step))
    trainer.gate_section = recipe.gate
    trainer.max_kl = recipe.evaluation.max_kl
    trainer.rate_of_whole = training.embedding_learning_rate
    trainer.heldout = list(
        batches(heldout["input_ids"][:], recipe.evaluation.batch_size, model.device, heldout["labels"][:])
    )
    return trainer
