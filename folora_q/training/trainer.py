"""TRL's SFTTrainer, with the gate around its optimizer and float32 adapters. No loop, collator or mask of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from folora_q.core import GatedOptimizer, SpectralAdamW, SpectralGate
from folora_q.data.formats import Example
from folora_q.data.tokens import require_chat_template
from folora_q.errors import UserError
from folora_q.models.adapters import adapter_pairs, keep_in_float32
from folora_q.models.hardware import Hardware
from folora_q.recipe.schema import GateSection, TrainingSection


class GatedTrainer(SFTTrainer):
    """An SFTTrainer whose optimizer passes the adapter's steps through `gates`, once those are set.

    Attributes:
        gates: by adapted layer; None is plain QLoRA.
    """

    gates: Mapping[str, SpectralGate] | None = None
    gate_section: GateSection

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Optimizer:
        if self.optimizer is not None or self.gates is None:
            return super().create_optimizer(model)
        section = self.gate_section
        pairs = adapter_pairs(self.model)
        adapters = [(pair.a, pair.b, self.gates[pair.name]) for pair in pairs]
        if section.rule == "step":
            self.optimizer = GatedOptimizer(
                super().create_optimizer(model),
                adapters,
                gate_a="a_step" in section.places,
                gate_b="b_step" in section.places,
                refresh_every=section.refresh_every,
            )
            return self.optimizer
        gated = {id(p) for pair in pairs for p in (pair.a, pair.b)}
        self.optimizer = SpectralAdamW(
            adapters,
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            weight_decay=self.args.weight_decay,
            complement=section.complement,
            others=[p for p in self.model.parameters() if p.requires_grad and id(p) not in gated],
        )
        return self.optimizer

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # TRL's chunked head is made for Triton; without it, it scores ignored positions too and takes half of the step.
        head = super() if self.args.device.type == "cuda" else super(SFTTrainer, self)
        return head.compute_loss(model, inputs, *args, **kwargs)


def build_trainer(
    model: PeftModel,
    tokenizer: Tokenizer,
    train: Sequence[Example],
    heldout: Sequence[Example],
    training: TrainingSection,
    gate: GateSection,
    hardware: Hardware,
    output_dir: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> GatedTrainer:
    """A trainer whose `train_dataset` and `eval_dataset` are tokenized and labelled by TRL (loss on completions only).

    Raises:
        UserError: the data are chats without a chat template, or a setting is not one of transformers'.
    """
    if not isinstance(train[0].prompt, str):
        require_chat_template(tokenizer)
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
            optim=training.optim,
            gradient_checkpointing=training.gradient_checkpointing,
            seed=training.seed,
            max_length=training.max_length,
            logging_steps=training.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # it would show a running average in place of a NaN
            bf16=on_gpu and hardware.dtype == torch.bfloat16,
            fp16=on_gpu and hardware.dtype == torch.float16,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
    except ValueError as error:
        raise UserError(f"section `training`: {str(error).splitlines()[0]}") from error
    start = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    trainer = GatedTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=_dataset(train),
        eval_dataset=_dataset(heldout),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)  # it prints every line of metrics
    keep_in_float32(model, start)  # SFTTrainer casts adapters on a 4-bit base to bfloat16
    trainer.gate_section = gate
    return trainer


def _dataset(examples: Sequence[Example]) -> Dataset:
    return Dataset.from_list([{"prompt": e.prompt, "completion": e.completion} for e in examples])
