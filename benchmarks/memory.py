"""How far `folora-q estimate` is from what a run takes.

    .venv/bin/python benchmarks/memory.py                  tensors at 7B shapes, then processes; minutes on a CPU
    .venv/bin/python benchmarks/memory.py tensors          the first half, where nothing is computed
    .venv/bin/python benchmarks/memory.py processes        the second half
    .venv/bin/python benchmarks/memory.py --gpu            7B shapes with random weights on a GPU, stage by stage

Tensors: all that live in a forward and a backward pass of the backbone, at its peak, beyond weights and adapter; as a
GPU computes, under autocast, and as a CPU does. Processes: each stage in a process of its own; on a CPU the kernel's
high-water mark, which has the libraries in it, with glibc told to give memory back at once (it may keep as much as it
gave); on a GPU what the allocator gave out at most, to which the estimate's CUDA context does not belong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
from rich.table import Table

from folora_q.cli.console import ConsoleProgress, err, out, quiet_libraries, quiet_progress_bars

quiet_libraries()  # before they are imported

import torch
from datasets import Dataset
from live_tensors import GIVE_BACK, counted_step
from shapes import SHAPES, random_4bit, random_gates
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from folora_q.calibration.collect import build_gates
from folora_q.calibration.sample import sample_proxy
from folora_q.data.tokens import batches
from folora_q.evaluation.divergence import HeldOutText, compare
from folora_q.evaluation.model_pair import ModelPair
from folora_q.memory.activations import Arithmetic, BatchShape, at_backward
from folora_q.memory.components import adapter_parameters
from folora_q.memory.estimate import CUDA_CONTEXT, estimate
from folora_q.memory.shapes import ModelShape, shape_of
from folora_q.models.adapters import adapter_pairs, attach_adapter
from folora_q.models.demo import DEMO_MODEL, demo_model_folder
from folora_q.models.hardware import PeakMemory, choose_hardware
from folora_q.models.load import LoadedModel, load_model
from folora_q.models.quantization import Quantization
from folora_q.progress import StageTimer
from folora_q.recipe import Recipe
from folora_q.rules import rule_of
from folora_q.training.config import trainer_config
from folora_q.training.trainer import TrainerSetup, build_trainer

STAGES = ("loading", "sampling", "statistics", "training", "evaluation")
RANK = 16
SMALL = {
    "small": LlamaConfig(vocab_size=8_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
                         num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=16_384),
    "many words": LlamaConfig(vocab_size=64_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
                              num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=16_384),
}  # fmt: skip
# Rows, length, checkpointing.
ON_A_CPU = ((2, 256, False), (2, 256, True), (4, 1024, True))
ON_A_GPU = ((1, 512, False), (1, 1024, True), (1, 4096, True), (4, 1024, True))
TENSORS = ((1, 1024), (4, 2048), (1, 8192))


@click.group(invoke_without_command=True, help=__doc__)
@click.option("--gpu", is_flag=True)
@click.option("--model", "names", multiple=True, help="demo, small, 'many words', llama-2-7b, llama-3-8b.")
@click.option("--stage", "stages", multiple=True, type=click.Choice(STAGES))
@click.option("--workers", default=1, show_default=True, help="Processes at once, where a GPU has room for them.")
@click.pass_context
def main(context: click.Context, gpu: bool, names: tuple[str, ...], stages: tuple[str, ...], workers: int) -> None:
    if context.invoked_subcommand is not None:
        return
    if gpu and not torch.cuda.is_available():
        raise click.ClickException("there is no GPU here")
    out.width = max(out.width, 110)
    if not gpu:
        _print_tensors()
    _print_processes(gpu, names, stages or STAGES, workers)


@main.command()
def tensors() -> None:
    """Counted tensors beside the formulas."""
    _print_tensors()


@main.command()
@click.option("--model", "names", multiple=True)
@click.option("--stage", "stages", multiple=True, type=click.Choice(STAGES))
def processes(names: tuple[str, ...], stages: tuple[str, ...]) -> None:
    """Stages in processes of their own."""
    out.width = max(out.width, 110)
    _print_processes(False, names, stages or STAGES)


def _print_tensors() -> None:
    table = Table(title="peak of live tensors in a step, MiB", title_justify="left")
    for heading in ("model", "rows x length", "checkpointing", "computes as", "counted", "formula", "error"):
        table.add_column(heading, justify="left" if heading in ("model", "computes as") else "right")
    for name in ("llama-2-7b", "llama-3-8b"):
        shape = shape_of(SHAPES[name].to_dict())
        for rows, length in TENSORS:
            for checkpointing in (True, False):
                for place in ("gpu", "cpu"):
                    how = Arithmetic(compute=2, autocast=place == "gpu", rank=RANK)
                    _, counted = counted_step(SHAPES[name], rows, length, RANK, checkpointing, how.autocast)
                    found = sum(at_backward(shape, BatchShape(rows, length), how, checkpointing))
                    found += _of_the_adapter(adapter_parameters(shape, how), how, checkpointing, shape.depth)
                    table.add_row(
                        name,
                        f"{rows} x {length:,}",
                        "yes" if checkpointing else "no",
                        place,
                        *(f"{size / 2**20:,.0f}" for size in (counted, found)),
                        f"{found / counted - 1:+.1%}",
                    )
    out.print(table)


def _of_the_adapter(trained: int, how: Arithmetic, checkpointing: bool, depth: int) -> int:
    """Gradients and autocast's copies that stand at the peak: the last layer's, or the copies of all layers."""
    copies = how.compute * trained if how.autocast else 0
    return (4 * trained + copies) // depth if checkpointing else copies


def _print_processes(gpu: bool, names: tuple[str, ...], stages: tuple[str, ...], workers: int = 1) -> None:
    sizes = ON_A_GPU if gpu else ON_A_CPU
    wanted = [
        (name, *size, stage)
        for name in names or (("llama-2-7b", "llama-3-8b") if gpu else ("demo", *SMALL))
        for size in sizes
        for stage in stages
        if stage == "training" or size == sizes[-1]  # checkpointing and the training's rows are no matter to the others
    ]
    with ThreadPoolExecutor(workers) as together:
        measured = list(together.map(lambda what: _in_a_process(*what), wanted))
    table = Table(title=f"peak memory by stage, GiB: {choose_hardware().reason}", title_justify="left")
    for heading in ("model", "rows x length", "checkpointing", "stage", "measured", "estimate", "error"):
        table.add_column(heading, justify="left" if heading in ("model", "stage") else "right")
    errors = []
    for (name, rows, length, checkpointing, stage), size in zip(wanted, measured, strict=True):
        stages_of = estimate(_recipe(name, rows, length, checkpointing), _shape(name), "gpu" if gpu else "cpu").stages
        (found,) = [each for each in stages_of if each.name == stage]
        expected = found.on_device - (CUDA_CONTEXT if gpu else 0)
        errors.append(expected / size - 1)
        shown = (f"{each / 2**30:,.2f}" for each in (size, expected))
        table.add_row(
            name, f"{rows} x {length:,}", "yes" if checkpointing else "no", stage, *shown, f"{errors[-1]:+.1%}"
        )
    out.print(table)
    out.print(
        f"mean of the errors' sizes {sum(map(abs, errors)) / len(errors):.1%}, largest {max(errors, key=abs):+.1%}"
    )


def _recipe(name: str, rows: int, length: int, checkpointing: bool) -> Recipe:
    """All stages with sequences of one length, four at a time but for the training's."""
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": name},
            "adapter": {"r": RANK},
            "data": {"train_dataset": "random"},
            "proxy": {"num_samples": 4, "num_heldout_samples": 1, "max_new_tokens": min(length, 128), "batch_size": 4},
            "gate": {"batch_size": 4},
            "evaluation": {"batch_size": 4},
            "training": {
                "output_dir": "unused",
                "max_steps": 3,
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": 1,
                "max_length": length,
                "activation_checkpointing": checkpointing,
            },
        }
    )


def _config(name: str) -> LlamaConfig:
    return (SHAPES | SMALL)[name]


def _shape(name: str) -> ModelShape:
    if name == "demo":
        return shape_of(json.loads((demo_model_folder() / "config.json").read_text(encoding="utf-8")))
    return shape_of(_config(name).to_dict())


def _in_a_process(name: str, rows: int, length: int, checkpointing: bool, stage: str) -> int:
    command = [sys.executable, __file__, "once", name, str(rows), str(length), str(int(checkpointing)), stage]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | GIVE_BACK)
    if done.returncode:
        raise click.ClickException(done.stderr[-800:])
    peak = int(done.stdout.split()[-1])
    err.print(f"[dim]{name} {rows} x {length} {'checkpointing' * checkpointing} {stage} {peak:,} bytes[/]")
    return peak


@main.command(hidden=True)
@click.argument("name")
@click.argument("rows", type=int)
@click.argument("length", type=int)
@click.argument("checkpointing", type=bool)
@click.argument("stage", type=click.Choice(STAGES))
def once(name: str, rows: int, length: int, checkpointing: bool, stage: str) -> None:
    quiet_progress_bars()
    hardware, recipe = choose_hardware(), _recipe(name, rows, length, checkpointing)
    memory = PeakMemory(hardware.device)
    memory.reset()
    base = _load(name, recipe)
    if stage != "loading":
        with tempfile.TemporaryDirectory() as scratch:
            run = _prepared(stage, base, recipe, Path(scratch))
            memory.reset()
            run()
    click.echo(memory.peak())


def _load(name: str, recipe: Recipe) -> LoadedModel:
    if name == "demo":
        section = recipe.model.model_copy(update={"model_name_or_path": DEMO_MODEL})
        return load_model(section, choose_hardware())
    hardware = choose_hardware()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<e>": 0}, "<e>")), eos_token="<e>", pad_token="<e>"
    )
    model = random_4bit(_config(name), hardware.device, hardware.dtype)
    return LoadedModel(model, tokenizer, name, None, "", 0, Quantization())


def _prepared(stage: str, base: LoadedModel, recipe: Recipe, folder: Path):
    """What the stage does, with all that comes before it done."""
    hardware, length = choose_hardware(), recipe.training.max_length
    if stage == "sampling":
        return lambda: sample_proxy(base.model, base.tokenizer, recipe.proxy)
    model = attach_adapter(base, recipe.adapter, 0)
    pairs = adapter_pairs(model)
    vocabulary = base.model.config.vocab_size

    def text(rows: int):
        ids = torch.randint(5, vocabulary, (rows, length)).tolist()
        return list(batches([*ids[:-1], ids[-1][:-1]], rows, hardware.device))  # one is padded

    if stage == "statistics":
        clock = StageTimer(ConsoleProgress())
        size = recipe.gate.batch_size
        recompute = recipe.training.recomputes_on(hardware.device.type == "cuda")
        return lambda: build_gates(model, pairs, text(size), text(size), recipe.gate, clock, recompute=recompute)
    if stage == "evaluation":
        own = HeldOutText("own", "own", text(recipe.evaluation.batch_size))
        return lambda: compare(ModelPair(model), own)
    rows = recipe.training.per_device_train_batch_size
    ids = torch.randint(5, vocabulary, (4 * rows, length)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    dtype = torch.bfloat16 if hardware.device.type == "cuda" else torch.float32
    gates = random_gates(pairs, recipe.gate.rank, hardware.device, dtype)
    trainer = build_trainer(
        TrainerSetup(
            model=model,
            tokenizer=base.tokenizer,
            train=data,
            heldout=data.select(range(1)),
            recipe=recipe,
            config=trainer_config(model, recipe, hardware, folder),
            gates=rule_of(recipe.gate).before_training(pairs, gates),
        )
    )
    return trainer.train


if __name__ == "__main__":
    main()
