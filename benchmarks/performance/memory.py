"""Compare `folora-q estimate` with the memory that a run needs.

    .venv/bin/python -m benchmarks.performance.memory              tensors at 7B shapes, then processes: minutes
    .venv/bin/python -m benchmarks.performance.memory tensors      the first half, in which nothing is computed
    .venv/bin/python -m benchmarks.performance.memory processes    the second half
    .venv/bin/python -m benchmarks.performance.memory --gpu        7B shapes, random weights, stage by stage on a GPU

Tensors: the peak of all live tensors in a forward and a backward pass of the backbone, beyond weights and adapter; as
on a GPU, under autocast, and as on a CPU. Processes: each stage in a fresh process. On a CPU, the kernel's high-water
mark, which includes the libraries, with glibc set to return memory at once (by default it may keep as much as was
freed); on a GPU, the allocator's peak, which does not include the estimate's CUDA context.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
from rich.table import Table

from folora_q.cli.console import ConsoleProgress, err, out, quiet_libraries, quiet_progress_bars

quiet_libraries()  # before they are imported

import torch
from datasets import Dataset
from transformers import LlamaConfig

from benchmarks.performance._process import GIVE_BACK, in_a_process
from benchmarks.performance._trainer import gated_trainer, placeholder_tokenizer
from benchmarks.performance.live_tensors import counted_step
from benchmarks.performance.shapes import SHAPES, random_4bit
from folora_q.calibration.collect import StatisticsSettings, build_gates
from folora_q.calibration.sample import sample_proxy
from folora_q.data.tokens import Batch, batches
from folora_q.evaluation.divergence import HeldOutText, compare
from folora_q.evaluation.model_pair import ModelPair
from folora_q.memory.activations import Arithmetic, BatchShape, at_backward
from folora_q.memory.components import adapter_parameters
from folora_q.memory.estimate import CUDA_CONTEXT, estimate
from folora_q.memory.shapes import ModelShape, shape_of
from folora_q.models.adapters import attach_adapter
from folora_q.models.demo import DEMO_MODEL, demo_model_folder
from folora_q.models.hardware import PeakMemory, choose_hardware
from folora_q.models.load import LoadedModel, load_model
from folora_q.models.parts import embedding_rows
from folora_q.models.quantization import Quantization
from folora_q.progress import StageTimer
from folora_q.recipe import Recipe
from folora_q.runs.results import GENERATED_TEXT, TextKind

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
@click.option("--workers", default=1, show_default=True, help="Processes at once, if the GPU has room for them.")
@click.pass_context
def main(context: click.Context, gpu: bool, names: tuple[str, ...], stages: tuple[str, ...], workers: int) -> None:
    if context.invoked_subcommand is not None:
        return
    if gpu and not torch.cuda.is_available():
        raise click.ClickException("no GPU is available")
    out.width = max(out.width, 110)
    if not gpu:
        _print_tensors()
    _print_processes(gpu, names, stages or STAGES, workers)


@main.command()
def tensors() -> None:
    """Compare counted tensors with the formulas."""
    _print_tensors()


@main.command()
@click.option("--model", "names", multiple=True)
@click.option("--stage", "stages", multiple=True, type=click.Choice(STAGES))
def processes(names: tuple[str, ...], stages: tuple[str, ...]) -> None:
    """Compare the peaks of stages, each in a fresh process, with the estimate."""
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
                    found += _adapter_bytes(adapter_parameters(shape, how), how, checkpointing, shape.depth)
                    table.add_row(
                        name,
                        f"{rows} x {length:,}",
                        "yes" if checkpointing else "no",
                        place,
                        *(f"{size / 2**20:,.0f}" for size in (counted, found)),
                        f"{found / counted - 1:+.1%}",
                    )
    out.print(table)


def _adapter_bytes(trained: int, how: Arithmetic, checkpointing: bool, depth: int) -> int:
    """Return the bytes of gradients and autocast copies at the peak: those of the last layer, or all layers' copies."""
    copies = how.compute * trained if how.autocast else 0
    return (4 * trained + copies) // depth if checkpointing else copies


def _print_processes(gpu: bool, names: tuple[str, ...], stages: tuple[str, ...], workers: int = 1) -> None:
    sizes = ON_A_GPU if gpu else ON_A_CPU
    wanted = [
        (name, *size, stage)
        for name in names or (("llama-2-7b", "llama-3-8b") if gpu else ("demo", *SMALL))
        for size in sizes
        for stage in stages
        if stage == "training" or size == sizes[-1]  # the other stages depend on neither checkpointing nor rows
    ]
    with ThreadPoolExecutor(workers) as together:
        measured = list(together.map(lambda what: _measure(*what), wanted))
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
    out.print(f"mean absolute error {sum(map(abs, errors)) / len(errors):.1%}, largest {max(errors, key=abs):+.1%}")


def _recipe(name: str, rows: int, length: int, checkpointing: bool) -> Recipe:
    """Return a recipe in which all stages have sequences of one length, four at a time except in training."""
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


def _measure(name: str, rows: int, length: int, checkpointing: bool, stage: str) -> int:
    arguments = (name, rows, length, int(checkpointing), stage)
    peak: int = in_a_process("benchmarks.performance.memory", "once", *arguments, environment=GIVE_BACK)
    err.print(f"[dim]{name} {rows} x {length} {'checkpointing' * checkpointing} {stage} {peak:,} bytes[/]")
    return peak


@main.command(hidden=True)
@click.argument("name")
@click.argument("rows", type=int)
@click.argument("length", type=int)
@click.argument("checkpointing", type=bool)
@click.argument("stage", type=click.Choice(STAGES))
def once(name: str, rows: int, length: int, checkpointing: bool, stage: str) -> None:
    """Run a stage in this process, and print its peak in bytes."""
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
    click.echo(json.dumps(memory.peak()))


def _load(name: str, recipe: Recipe) -> LoadedModel:
    if name == "demo":
        section = recipe.model.model_copy(update={"model_name_or_path": DEMO_MODEL})
        return load_model(section, choose_hardware())
    hardware = choose_hardware()
    model = random_4bit(_config(name), hardware.device, hardware.dtype)
    return LoadedModel(model, placeholder_tokenizer(), name, None, "", 0, Quantization())


def _prepared(stage: str, base: LoadedModel, recipe: Recipe, folder: Path) -> Callable[[], object]:
    """Prepare everything that a stage needs, and return a function that runs it."""
    hardware, length = choose_hardware(), recipe.training.max_length
    if stage == "sampling":
        return lambda: sample_proxy(base.model, base.tokenizer, recipe.proxy)
    model = attach_adapter(base, recipe.adapter, 0)
    vocabulary = embedding_rows(base.model)

    def text(rows: int) -> list[Batch]:
        ids = torch.randint(5, vocabulary, (rows, length)).tolist()
        return list(batches([*ids[:-1], ids[-1][:-1]], rows, hardware.device))  # so that one is padded

    if stage == "statistics":
        clock = StageTimer(ConsoleProgress())
        size = recipe.gate.batch_size
        recompute = recipe.statistics_recompute_on(hardware.device.type == "cuda")
        settings = StatisticsSettings(recipe.gate, recompute=recompute)
        return lambda: build_gates(model, text(size), text(size), settings, clock)
    if stage == "evaluation":
        own = HeldOutText(GENERATED_TEXT, TextKind.GENERATED, text(recipe.evaluation.batch_size))
        return lambda: compare(ModelPair(model), own)
    rows = recipe.training.per_device_train_batch_size
    ids = torch.randint(5, vocabulary, (4 * rows, length)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return gated_trainer(model, base.tokenizer, data, recipe, folder).train


if __name__ == "__main__":
    main()
