"""TRL's SFTTrainer with a gate rule's optimizer and float32 adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PrinterCallback

from folora_q.core import GatedOptimizer, SpectralGate
from folora_q.core.optimizer import TOLERATED_FAILURES
from folora_q.core.shrink import FrozenRows
from folora_q.errors import RunError, UserError, first_line
from folora_q.evaluation.divergence import HeldOutText, compare
from folora_q.models.adapters import adapter_pairs, wrappers
from folora_q.recipe.gate import BudgetSection
from folora_q.recipe.schema import Recipe
from folora_q.rules import AdamSettings, OptimizerContext, rule_of
from folora_q.runs.results import TextResult
from folora_q.training.budget import Budget, BudgetPlan, Spent
from folora_q.training.budget_measuring import measuring_of
from folora_q.training.callbacks import BeforeTraining, Spending
from folora_q.training.config import BEST
from folora_q.training.fault_tolerant_trainer import FaultTolerantTrainer
from folora_q.training.schedule import rising_from_the_first_step, warmup_of


class GatedTrainer(FaultTolerantTrainer):
    """A trainer whose optimizer is built by the recipe's gate rule.

    Args:
        recipe: its sections `gate`, `evaluation` and `training` are used.
        gates: by adapted layer; layers with the same input share one object. None is plain QLoRA.
        note: receives a line for each measurement of a forgetting budget.
    """

    def __init__(
        self,
        *args: Any,
        recipe: Recipe,
        gates: Mapping[str, SpectralGate] | None,
        note: Callable[[str], None] = lambda line: None,
        **kwargs: Any,
    ) -> None:
        self.gates, self.gate_section, self.note = gates, recipe.gate, note
        self.max_kl = recipe.evaluation.max_kl
        self.rate_of_whole = recipe.training.embedding_learning_rate
        self.gated: GatedOptimizer | None = None
        super().__init__(*args, **kwargs)
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps  # the pre-flight check's
        self.model_accepts_loss_kwargs = True  # every token or pair has the same weight, in whichever batch it is
        self.remove_callback(PrinterCallback)  # it prints every line of metrics
        self.add_callback(BeforeTraining(self.before_first_step))
        self.add_callback(Spending(lambda: self.budget))

    def before_first_step(self) -> None:
        """Prepare the budget, whose forms need the final A, before the state of a resumed run is restored."""
        if self.gate_section.budget is not None and self.gates is not None:
            self.budget = self._new_budget(self.gate_section.budget)
        super().before_first_step()

    def _new_budget(self, section: BudgetSection) -> Budget:
        gates, steps = cast(Mapping[str, SpectralGate], self.gates), self.state.max_steps
        pairs = [pair for pair in adapter_pairs(self.model) if pair.name in gates]
        gated = {id(parameter) for pair in pairs for parameter in (pair.a, pair.b)}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in gated:
                raise UserError(
                    f"gate.budget limits what gated adapters forget, and {name} is trained without a gate",
                    "leave its module out of adapter.target_modules, or train without gate.budget",
                )
        layers = FrozenRows([(pair.a, pair.b, gates[pair.name], pair.scale) for pair in pairs])
        rates = getattr(self.lr_scheduler, "lr_lambdas", [lambda step: 1.0])
        learning = self.args.learning_rate * sum(rates[0](step) for step in range(steps))
        measure_here = measuring_of(section, self.monitored, self._compared)

        def measure(complete: bool) -> Spent:
            return self.processes.gather(measure_here(complete))[0]  # those of others may differ by rounding

        return Budget(BudgetPlan(section.limit, steps, learning, measure, self.note), layers)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.budget is not None and "loss" in logs:
            logs |= self.budget.metrics()
        super().log(logs, start_time)

    def _compared(self, text: HeldOutText) -> TextResult:
        """Compare the model with its base on a text."""
        return compare(self.model_pair, text, splitter=self.measuring)

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
        """Give modules that are trained in full parameter groups with their own learning rate."""
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
        """Measure held-out loss, KL from the base, and change of loss on real text, as after training.

        All are in nats per token. A significant increase (95 % interval) on real text is reported in a line.

        The Trainer's own evaluation averages over batches, whatever their size, and keeps all logits in memory.
        """
        metrics = self._measured(metric_key_prefix)
        loss, kl = metrics[f"{metric_key_prefix}_loss"], metrics.get(f"{metric_key_prefix}_kl")
        within = self.max_kl is None or kl is None or kl <= self.max_kl
        self.log(dict(metrics))
        # The Trainer keeps the checkpoint with the lowest value: never one over the limit.
        metrics[f"{metric_key_prefix}_{BEST}"] = loss if within else math.inf
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if kl is not None and not within:
            self.exceeded = self.state.global_step, kl
            self.control.should_training_stop = True
        return metrics

    def _measured(self, metric_key_prefix: str) -> dict[str, float]:
        """Return the measurements of `evaluate`; each process reads a part, and all get the same numbers."""
        self.model.eval()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measured_on_task().items()}
        if self.monitored.generated_text is not None:
            generated = self._compared(self.monitored.generated_text)
            metrics[f"{metric_key_prefix}_kl"] = generated.kl.value
            metrics[f"{metric_key_prefix}_top1_agreement"] = generated.top1_agreement.value
        for text in self.monitored.real_text:
            rise = self._compared(text).loss.change
            metrics[f"{metric_key_prefix}_rise_{text.name}"] = rise.value
            if rise.bounds and rise.bounds[0] > 0:
                self.skipped.tell(
                    f"step {self.state.global_step}: real text got worse: the loss on {text.name} rose by "
                    f"{rise.value:.4f} nats per token (95 % interval {rise.bounds[0]:.4f} to {rise.bounds[1]:.4f})"
                )
        return metrics

    def conclude(self, steps: int, tell: Callable[[str], None]) -> None:
        """Report where training stopped, and which step was kept.

        Args:
            steps: the planned number of steps.

        Raises:
            RunError: the KL exceeded its limit before any step within it was saved.
        """
        state = self.state
        if self.exceeded is not None:
            step, kl = self.exceeded
            tell(f"stopped at step {step}: KL {kl:.4f} is over evaluation.max_kl ({self.max_kl})")
            if state.best_model_checkpoint is None:
                raise RunError(
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
        self._conclude_budget(steps)

    def _conclude_budget(self, steps: int) -> None:
        """Keep to the budget, which was last measured after the last planned step, if another step's update is kept."""
        state = self.state
        best = state.best_global_step if self.args.load_best_model_at_end else None
        kept = best or state.global_step
        if self.budget is not None and kept != steps:
            self.budget.conclude(kept)

    def require_learned(self) -> None:
        """Check that training changed the adapter.

        Raises:
            RunError: B is still zero in every layer.
        """
        if any(bool(pair.b.detach().any()) for pair in adapter_pairs(self.model)):
            return
        steps = self.state.global_step
        if self.skipped.total >= steps:
            hint = "every step was skipped (see metrics.jsonl): lower training.learning_rate"
        elif self.args.fp16:
            hint = "its gradients may have overflowed in float16 each time: set model.dtype to float32"
        else:
            hint = "raise training.learning_rate, or take more steps (training.num_train_epochs, training.max_steps)"
        raise RunError(f"nothing was learned in {steps} steps: B is zero in every layer", hint)

    def _rank_gates_failed(self, failures: int, error: Exception) -> None:
        self.skipped.tell(
            f"step {self.state.global_step + 1}: the gates of B could not be solved for, and the last ones stay "
            f"({failures} in a row, the run ends at {TOLERATED_FAILURES + 1}): {first_line(error)}"
        )
        if failures > TOLERATED_FAILURES:
            raise RunError(
                f"the gates of B could not be solved for {failures} times in a row: {first_line(error)}",
                "raise gate.ridge, e.g. tenfold, or lower training.learning_rate",
            ) from error

    def energy_kept(self) -> dict[str, dict[str, float]]:
        """Return by layer the share of A's and B's step energy that the gate let pass; empty if ungated."""
        if self.gated is None or self.gates is None:
            return {}
        names = [pair.name for pair in adapter_pairs(self.model) if pair.name in self.gates]
        return dict(zip(names, self.gated.energy_kept(), strict=True))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no card for checkpoints; the card with the results is written with the adapter."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        loss, outputs = self.objective.loss(self, model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss
