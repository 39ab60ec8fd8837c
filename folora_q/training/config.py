"""The Trainer's configuration: a recipe's settings by transformers' and TRL's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from trl import SFTConfig

from folora_q.errors import UserError
from folora_q.models.hardware import Hardware
from folora_q.recipe.schema import Recipe

# The option's name since transformers 5.20, and before.
FIELDS = SFTConfig.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"
# The metric that the best checkpoint minimizes: the held-out loss, infinite where the KL limit is exceeded.
BEST = "loss_within_limit"


def trainer_config(
    model: PeftModel, recipe: Recipe, hardware: Hardware, output_dir: Path, processes: int = 1
) -> SFTConfig:
    """Return the configuration of a run's trainer, on one device.

    Args:
        processes: share the forward passes of a step.

    Raises:
        UserError: transformers rejects a combination of settings, or this model does not support it.
    """
    training, every = recipe.training, recipe.evaluation.steps
    if training.router_aux_loss_coef and not hasattr(model.config.get_text_config(), "output_router_logits"):
        raise UserError(
            "`training.router_aux_loss_coef` is for mixtures of experts, and this model has no router to balance",
            "remove it from the recipe",
        )
    save_steps = training.save_steps or (every if recipe.keeps_best else None)
    on_gpu = hardware.device.type == "cuda"
    checkpointing: dict[str, Any] = {CHECKPOINTING: training.recomputes_on(on_gpu)}
    try:
        config = SFTConfig(
            output_dir=str(output_dir),
            learning_rate=training.learning_rate,
            num_train_epochs=training.num_train_epochs,
            max_steps=training.max_steps or -1,
            per_device_train_batch_size=training.per_device_train_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps // processes,
            ddp_find_unused_parameters=False,
            lr_scheduler_type=training.lr_scheduler_type,
            warmup_steps=training.warmup_steps,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            optim=training.optimizer_on(on_gpu),  # rule `spectral` brings its own optimizer and ignores this
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_epsilon=training.adam_epsilon,
            **checkpointing,
            activation_offloading=training.activation_offloading and on_gpu,
            seed=training.seed,
            router_aux_loss_coef=training.router_aux_loss_coef,  # if omitted, TRL would use the model configuration's
            max_length=training.max_length,
            packing=training.packing,
            dataset_kwargs={"skip_prepare_dataset": True},  # already prepared
            remove_unused_columns=not training.compares,  # TRL would remove the second sequences
            eval_strategy="steps" if every else "no",
            eval_steps=every,
            eval_on_start=every is not None,
            save_strategy="steps" if save_steps else "no",
            save_steps=save_steps or 1,
            save_total_limit=None,  # the Trainer would remove the last good one before the next is known to be complete
            restore_callback_states_from_checkpoint=True,
            load_best_model_at_end=recipe.keeps_best,
            metric_for_best_model=f"eval_{BEST}",
            greater_is_better=False,
            logging_steps=recipe.logging.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # it would show a running average instead of a NaN
            report_to=list(recipe.logging.report_to) or "none",
            run_name=recipe.logging.run_name or output_dir.name,
            bf16=hardware.dtype == torch.bfloat16,  # autocast: adapters are float32 and compute in bfloat16
            fp16=on_gpu and hardware.dtype == torch.float16,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            disable_tqdm=True,
        )
    except ValueError as error:
        raise UserError(f"section `training`: {str(error).splitlines()[0]}") from error
    on_one_device(config)
    return config


def on_one_device(config: SFTConfig) -> None:
    """Keep transformers from using all visible GPUs, which would replicate the model and enlarge the batches."""
    _ = config.device  # counts the GPUs
    config._n_gpu = min(config.n_gpu, 1)
