"""Build the gated trainer for a model with random weights and random tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.performance.shapes import random_gates
from folora_q.models.adapters import adapter_pairs
from folora_q.models.hardware import choose_hardware
from folora_q.recipe import Recipe
from folora_q.rules import rule_of
from folora_q.training.build_trainer import TrainerSetup, build_trainer
from folora_q.training.config import trainer_config
from folora_q.training.trainer import GatedTrainer


def placeholder_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a single token, for models whose inputs are random token ids."""
    words = Tokenizer(models.WordLevel({"<e>": 0}, unk_token="<e>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", pad_token="<e>")


def gated_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, recipe: Recipe, folder: Path
) -> GatedTrainer:
    """Return the trainer of the recipe's gate rule, with random gates; one row of the data is held out."""
    hardware = choose_hardware()
    dtype = torch.bfloat16 if hardware.device.type == "cuda" else torch.float32
    pairs = adapter_pairs(model)
    gates = random_gates(pairs, recipe.gate.rank, hardware.device, dtype)
    return build_trainer(
        TrainerSetup(
            model=model,
            tokenizer=tokenizer,
            train=data,
            heldout=data.select(range(1)),
            recipe=recipe,
            config=trainer_config(model, recipe, hardware, folder),
            gates=rule_of(recipe.gate).before_training(pairs, gates),
        )
    )
