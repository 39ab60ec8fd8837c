"""Measure peak memory and speed of 7B training on a GPU: two gate rules, and plain PEFT + bitsandbytes + Trainer.

    .venv/bin/python -m benchmarks.performance.cards --gpu               both shapes, five lengths, caps of 8 to 24 GB
    .venv/bin/python -m benchmarks.performance.cards --shape tiny --lengths 64     on a CPU, to test this program

Models have random weights, created layer by layer in 4 bits. Batch 1, adapters of rank 16 on every linear layer,
activation checkpointing, paged 8-bit AdamW. Every figure comes from a fresh process: peak memory as the allocator
reports it, tokens per second over the ten steps after the second, one of which solves for the gates of rule `step`. A
cap is `torch.cuda.set_per_process_memory_fraction`: a run that needs more fails. The caps of all lengths are tried at
once, on a card with room for all of them.
Published figures for Llama-2-7B, batch 1, at 1k/2k/4k/8k tokens: plain Hugging Face 6/7/9/12 GB, Unsloth 5/6/7/8 GB.
"""

from __future__ import annotations

import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from folora_q.cli.console import err, out, quiet_libraries, quiet_progress_bars

quiet_libraries()  # before they are imported

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from benchmarks.performance._process import in_a_process
from benchmarks.performance._trainer import gated_trainer, placeholder_tokenizer
from benchmarks.performance.shapes import SHAPES, random_4bit
from folora_q.data.batch_splitting import ran_out
from folora_q.errors import RunError
from folora_q.models.adapters import keep_in_float32
from folora_q.models.hardware import PeakMemory, choose_hardware
from folora_q.models.parts import base_of
from folora_q.recipe import Recipe
from folora_q.training.config import CHECKPOINTING

LENGTHS = "512,1024,2048,4096,8192"
CAPS = "8,12,16,24"
WAYS = ("plain", "frozen", "step")
STEPS, WARM_UP = 12, 2
DOES_NOT_FIT = {"peak": None, "tokens_per_second": None}


class Clock(TrainerCallback):
    """Records when each step ends, to time the steps after the warm-up."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        return (self.ends[-1] - self.ends[WARM_UP - 1]) / (len(self.ends) - WARM_UP)


@click.group(invoke_without_command=True, help=__doc__)
@click.option("--gpu", is_flag=True)
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)))
@click.option("--lengths", default=LENGTHS, show_default=True)
@click.option("--caps", default=CAPS, show_default=True, help="GB; only with --gpu.")
@click.option("--output", type=click.Path(path_type=Path), help="A file for the results table, as Markdown.")
@click.pass_context
def main(
    context: click.Context, gpu: bool, shapes: tuple[str, ...], lengths: str, caps: str, output: Path | None
) -> None:
    if context.invoked_subcommand is not None:
        return
    if gpu and not torch.cuda.is_available():
        raise click.ClickException("no GPU is available")
    sizes = [float(cap) for cap in caps.split(",")] if gpu else []
    shown = [
        (shape, length) for shape in shapes or ("llama-2-7b", "llama-3-8b") for length in map(int, lengths.split(","))
    ]
    found = {(way, *at): _measure(way, *at) for at in shown for way in WAYS}
    capped = [(*at, cap) for at in shown for cap in sizes]
    with ThreadPoolExecutor(max(len(capped), 1)) as together:
        fits = dict(zip(capped, together.map(lambda at: _measure("frozen", *at), capped), strict=True))
    headings = ["model", "tokens"]
    for what in ("peak, GB", "tokens/s"):
        headings += [f"plain: {what}"] + [part for way in WAYS[1:] for part in (f"{way}: {what}", "ratio")]
    headings += [f"runs in {cap:g} GB" for cap in sizes]
    rows = []
    for at in shown:
        row = [at[0], f"{at[1]:,}"]
        for what, unit in (("peak", 1e9), ("tokens_per_second", 1)):
            plain = found["plain", *at][what]
            row.append(_shown(plain, unit))
            for way in WAYS[1:]:
                value = found[way, *at][what]
                row += [_shown(value, unit), f"{value / plain:.3f}" if value and plain else ""]
        rows.append(row + ["yes" if fits[*at, cap]["peak"] else "no" for cap in sizes])
    table = Table(*headings, title=choose_hardware().reason, title_justify="left")
    for row in rows:
        table.add_row(*row)
    out.width = max(out.width, 150)
    out.print(table)
    if output is not None:
        lines = [headings, ["---"] * len(headings), *rows]
        output.write_text("".join("| " + " | ".join(line) + " |\n" for line in lines), encoding="utf-8")


@main.command(hidden=True)
@click.argument("way", type=click.Choice(WAYS))
@click.argument("shape")
@click.argument("length", type=int)
@click.argument("cap", type=float)
def once(way: str, shape: str, length: int, cap: float) -> None:
    """Train once in this process, and print the peak and the speed as JSON."""
    quiet_progress_bars()
    hardware = choose_hardware()
    if cap:
        total = torch.cuda.get_device_properties(hardware.device).total_memory
        torch.cuda.set_per_process_memory_fraction(cap * 1e9 / total)
    memory, clock = PeakMemory(hardware.device), Clock()
    memory.reset()
    try:
        base = random_4bit(SHAPES[shape], hardware.device, hardware.dtype)
        model = get_peft_model(
            base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        keep_in_float32(model)
        ids = torch.randint(5, base.config.vocab_size, (STEPS, length)).tolist()
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        with tempfile.TemporaryDirectory() as scratch:
            if way == "plain":
                trainer = _plain_trainer(model, data, scratch)
            else:
                recipe = _recipe(way, length, scratch)
                trainer = gated_trainer(model, placeholder_tokenizer(), data, recipe, Path(scratch))
            trainer.add_callback(clock)
            trainer.train()
    except (RuntimeError, RunError) as error:
        if not isinstance(error, RunError) and not ran_out(error):
            raise
        click.echo(json.dumps(DOES_NOT_FIT))
        return
    click.echo(json.dumps({"peak": memory.peak(), "tokens_per_second": length / clock.seconds_per_step}))


def _recipe(rule: str, length: int, folder: str) -> Recipe:
    training = {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_length": length,
        "activation_checkpointing": True,
    }
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "random"},
            "data": {"train_dataset": "random"},
            "gate": {"rule": rule},
            "training": training,
        }
    )


def _plain_trainer(model: PeftModel, data: Dataset, folder: str) -> Trainer:
    on_gpu = torch.cuda.is_available()
    base_of(model).enable_input_require_grads()
    checkpointing: dict[str, Any] = {CHECKPOINTING: True}  # its name differs between versions of transformers
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1000,
        **checkpointing,
    )
    return Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator)


def _shown(value: float | None, unit: float) -> str:
    return "does not fit" if value is None else f"{value / unit:,.2f}"


def _measure(way: str, shape: str, length: int, cap: float = 0) -> dict[str, float | None]:
    found = in_a_process("benchmarks.performance.cards", "once", way, shape, length, cap)
    err.print(f"[dim]{way} {shape} {length} {f'in {cap:g} GB' if cap else ''} {found}[/]")
    return found


if __name__ == "__main__":
    main()
