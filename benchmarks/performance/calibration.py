"""Count the work of sampling and statistics at 7B shapes, on cards of several sizes: no GPU is needed.

    .venv/bin/python -m benchmarks.performance.calibration

Compared are the recipe's own batches, as before plans by memory existed, and those of the plan for each card. Passes
and tokens follow from the batches. Waits for the device are counted on a tiny model, for one batch; before, there was
one more for each adapted layer.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from folora_q.cli.console import out, quiet_libraries

quiet_libraries()  # before they are imported

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.performance.shapes import SHAPES, random_4bit
from folora_q.calibration.hooks import shared_inputs
from folora_q.calibration.reading import Reading
from folora_q.core import CovarianceSketch
from folora_q.data.tokens import batches
from folora_q.memory.components import arithmetic, input_spaces
from folora_q.memory.estimate import estimate
from folora_q.memory.micro_batches import plan_step
from folora_q.memory.shapes import shape_of
from folora_q.models.adapters import adapter_pairs
from folora_q.recipe import Recipe

CARDS = (8, 12, 16, 24, 80)
TASK_TOKENS = 512  # of a row, assumed
# Operations with which the host waits for a number, or for a tensor's size, from the device.
WAITS = {"_local_scalar_dense", "nonzero"}


@dataclass(frozen=True)
class Work:
    """The work of calibration: decoding steps of sampling; passes, tokens and waits of the statistics."""

    decoding_steps: int
    passes: int
    tokens: int
    waits: int


class _Waits(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in WAITS
        return func(*args, **(kwargs or {}))


def waits_in_a_batch() -> int:
    """Return how often the statistics wait for the device in a batch, whatever the number of layers."""
    found = []
    for layers in (2, 3):
        config = SHAPES["tiny"]
        config.num_hidden_layers = layers
        base = random_4bit(config, torch.device("cpu"), torch.float32)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model: PeftModel = get_peft_model(base, lora)
        modules = {pair.name: pair.module for pair in adapter_pairs(model)}
        ids = torch.randint(5, 500, (4, 32))
        text = list(batches(ids.tolist(), 4, ids.device))
        groups = shared_inputs(model, modules, ids[:1])
        reading = Reading(model, modules, groups, weighted=True)
        sinks = {group[0]: CovarianceSketch(modules[group[0]].in_features, 8) for group in groups}
        counts = []
        for times in (1, 2):
            with _Waits() as waits:
                reading.feed(text * times, sinks, draw=0)
            counts.append(waits.count)
        found.append(counts[1] - counts[0])
    if len(set(found)) > 1:
        raise click.ClickException(f"the waits in a batch depend on the number of layers: {found}")
    return found[0]


def work(recipe: Recipe, waits: int) -> Work:
    """Return the work of a run's calibration, if every sample has its maximum length."""
    proxy, gate = recipe.proxy, recipe.gate
    texts = proxy.num_samples + proxy.num_heldout_samples
    decoding = -(-texts // proxy.batch_size) * proxy.max_new_tokens
    length = proxy.max_new_tokens
    passes = tokens = 0
    for count, each in ((2 * proxy.num_samples, length), (gate.num_task_samples, TASK_TOKENS)):
        passes += -(-count // recipe.statistics_batch_size(each))
        tokens += count * each
    readings = 1 + len(gate.readings)
    return Work(decoding, readings * passes, readings * tokens, readings * passes * waits)


@click.command()
def main() -> None:
    """Count the work of sampling and statistics at 7B shapes."""
    now = waits_in_a_batch()
    for name in ("llama-2-7b", "llama-3-8b"):
        shape = shape_of({**SHAPES[name].to_dict(), "torch_dtype": None})
        with tempfile.TemporaryDirectory() as folder:
            given = {"model": {"model_name_or_path": folder}, "data": {"train_dataset": str(Path(folder) / "x.jsonl")}}
            training = {"output_dir": folder, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}
            recipe = Recipe.model_validate(given | {"training": training | {"max_length": 1024}})
        layers = sum(count for linear, count in shape.linears)
        table = Table(title=f"{name}, 288 samples of 256 tokens, 256 task rows of {TASK_TOKENS}", title_justify="left")
        for heading in ("batches by", "decoding steps", "passes", "tokens read", "waits", "largest stage, GiB"):
            table.add_column(heading, justify="left" if heading == "batches by" else "right")
        rows = [("the recipe, before", recipe, layers + now)]
        rows += [(f"the plan for {card} GB", plan_step(recipe, shape, card).recipe, now) for card in CARDS]
        for title, planned, waits in rows:
            found = work(planned, waits)
            stages = [s.on_device for s in estimate(planned, shape).stages if s.name in ("sampling", "statistics")]
            numbers = (found.decoding_steps, found.passes, found.tokens, found.waits)
            table.add_row(title, *(f"{number:,}" for number in numbers), f"{max(stages) / 2**30:.1f}")
        out.print(table)
        spaces = input_spaces(shape, arithmetic(recipe, shape, on_gpu=True))
        cached = sum(space.count * space.width * recipe.gate.rank * 4 for space in spaces)
        readings = 1 + len(recipe.gate.readings)
        out.print(
            f"Σp in the cache: {cached / 1e6:,.0f} MB; a second task saves one of {readings} readings of its text\n"
        )


if __name__ == "__main__":
    main()
