"""Measure what the gate adds to the time and the peak memory of a training step.

    .venv/bin/python -m benchmarks.performance.overhead              the demo's model on a CPU: three minutes
    .venv/bin/python -m benchmarks.performance.overhead --gpu --shape llama-2-7b     7B shapes, random weights, a GPU

Time: one model is trained with every optimizer in turn on the same batch; the ratio compares medians of complete steps
(forward, backward, optimizer). A median hides the occasional step that solves the r x r problem, so means are shown
too. Memory: each optimizer runs in a fresh process, and its peak is that of the steps after the first.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import click
from rich.table import Table

from folora_q.cli.console import err, out, quiet_libraries

quiet_libraries()  # before they are imported

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim import Optimizer

from benchmarks.performance._process import in_a_process
from benchmarks.performance.shapes import SHAPES, random_4bit, random_gates
from folora_q.models.adapters import adapter_pairs, keep_in_float32
from folora_q.models.demo import DEMO_MODEL
from folora_q.models.hardware import PeakMemory, choose_hardware
from folora_q.models.load import load_model
from folora_q.models.parts import base_of, embedding_rows
from folora_q.recipe.gate import GateSection
from folora_q.recipe.gate_rules import GATE_RULES, RuleName
from folora_q.recipe.schema import ModelSection
from folora_q.rules import RULES, AdamSettings, OptimizerContext

MODULE = "benchmarks.performance.overhead"
# No gate, and each gate rule.
PLAIN = "plain"
WAYS = (PLAIN, *GATE_RULES)
RATE = 1e-5
RANK = 64


@click.group(invoke_without_command=True, help=__doc__)
@click.option("--gpu", is_flag=True)
@click.option("--shape", default="demo", type=click.Choice(["demo", *SHAPES]))
@click.option("--batch", default=4, show_default=True)
@click.option("--length", default=128, show_default=True, help="Tokens per sequence.")
@click.option("--steps", default=20, show_default=True)
@click.option("--r", default=16, show_default=True, help="Rank of the adapter.")
@click.pass_context
def main(context: click.Context, gpu: bool, shape: str, batch: int, length: int, steps: int, r: int) -> None:
    if context.invoked_subcommand is not None:
        return
    if gpu and not torch.cuda.is_available():
        raise click.ClickException("no GPU is available")
    setting = [shape, str(batch), str(length), str(steps), str(r), "gpu" if gpu else "cpu"]
    times = _measure("time", "all", *setting)
    peaks = {way: _measure("memory", way, *setting)["peak"] for way in WAYS}
    table = Table(
        title=f"{shape}, {batch} x {length} tokens, adapter r {r}, gates of rank {RANK}", title_justify="left"
    )
    for heading in ("way", "step, ms (median)", "ratio", "step, ms (mean)", "ratio", "peak, MB", "ratio"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    plain = times["plain"]
    for way in WAYS:
        middle, mean = (function(times[way]) for function in (statistics.median, statistics.mean))
        table.add_row(
            way,
            f"{middle * 1e3:,.1f}",
            f"{middle / statistics.median(plain):.3f}",
            f"{mean * 1e3:,.1f}",
            f"{mean / statistics.mean(plain):.3f}",
            f"{peaks[way] / 1e6:,.0f}",
            f"{peaks[way] / peaks['plain']:.3f}",
        )
    out.print(table)


@main.command(hidden=True)
@click.argument("what", type=click.Choice(["time", "memory"]))
@click.argument("way")
@click.argument("shape")
@click.argument("batch", type=int)
@click.argument("length", type=int)
@click.argument("steps", type=int)
@click.argument("r", type=int)
@click.argument("device")
def once(what: str, way: str, shape: str, batch: int, length: int, steps: int, r: int, device: str) -> None:
    """Take steps in this process, and print their times or the peak memory as JSON."""
    model, place = _model(shape, r, device == "gpu")
    ids = torch.randint(5, embedding_rows(base_of(model)), (batch, length), device=place)
    ways = WAYS if way == "all" else (way,)
    optimizers = {name: _optimizer(name, model, place) for name in ways}
    step = _stepper(model, ids, place)
    for name, optimizer in optimizers.items():
        step(name, optimizer)  # allocates moments and caches
    if what == "memory":
        memory = PeakMemory(place)
        memory.reset()
        for _ in range(steps):
            step(way, optimizers[way])
        click.echo(json.dumps({"peak": memory.peak()}))
        return
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(steps):
        for name, optimizer in optimizers.items():
            times[name].append(step(name, optimizer))
    click.echo(json.dumps(times))


def _model(shape: str, r: int, gpu: bool) -> tuple[PeftModel, torch.device]:
    hardware = choose_hardware()
    if shape == "demo":
        base = load_model(ModelSection(model_name_or_path=DEMO_MODEL), hardware).model
    else:
        base = random_4bit(SHAPES[shape], hardware.device)
    if gpu:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", task_type="CAUSAL_LM"))
    keep_in_float32(model)
    return model.train(), hardware.device


def _optimizer(way: str, model: PeftModel, device: torch.device) -> Optimizer:
    pairs = adapter_pairs(model)
    trained = [p for pair in pairs for p in ((pair.a, pair.b) if _trains_a(way) else (pair.b,))]

    def configured() -> Optimizer:
        return torch.optim.AdamW(trained, lr=RATE)

    if way == PLAIN:
        return configured()
    rule = cast(RuleName, way)
    adapters = []
    if GATE_RULES[rule].optimizer != "any":  # otherwise training holds no gate
        gates = random_gates(pairs, RANK, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        adapters = [(pair.a, pair.b, gates[pair.name]) for pair in pairs]
    section = GateSection.model_validate({"rule": way, "complement": "frozen"})
    return RULES[rule].build_optimizer(OptimizerContext(section, adapters, configured, AdamSettings(lr=RATE)))


def _trains_a(way: str) -> bool:
    return way == PLAIN or GATE_RULES[cast(RuleName, way)].trains_a


def _stepper(model: PeftModel, ids: torch.Tensor, device: torch.device) -> Callable[[str, Optimizer], float]:
    """Return a function that takes a step with one optimizer, and returns its seconds."""
    a_matrices = [pair.a for pair in adapter_pairs(model)]

    def step(way: str, optimizer: Optimizer) -> float:
        for a in a_matrices:
            a.requires_grad_(_trains_a(way))
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def _measure(*arguments: str) -> dict[str, Any]:
    err.print(f"[dim]{' '.join(arguments)}[/]")
    return in_a_process(MODULE, "once", *arguments)


if __name__ == "__main__":
    main()
