"""Measure a training step: plain PEFT + bitsandbytes, and what each change of folora-q brings, alone and together.

    .venv/bin/python -m benchmarks.performance.step                   the demo's model on a CPU: five minutes
    .venv/bin/python -m benchmarks.performance.step --gpu             Llama-2-7B's and 3-8B's shapes, a GPU
    .venv/bin/python -m benchmarks.performance.step --gpu --profile   also counts the kernel launches

Half of the tokens are trained, as in chats. Time: all ways take turns on one model and one batch, and the table shows
medians, so that their ratios do not depend on what else the machine does. Memory: the peak of a fresh process for each
way. On a GPU activations are recomputed; batch 1 at 1k, 2k and 4k tokens.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import click
from rich.table import Table

from folora_q.cli.console import err, out, quiet_libraries

quiet_libraries()  # before they are imported

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.performance._process import in_a_process
from benchmarks.performance.shapes import SHAPES, random_4bit
from folora_q.calibration.hooks import shared_inputs
from folora_q.data.tokens import IGNORED
from folora_q.kernels.compiled_layers import CompiledLayers
from folora_q.kernels.fused_adapters import FusedAdapters
from folora_q.models.adapters import adapter_pairs, freeze_lora_a, keep_in_float32
from folora_q.models.demo import DEMO_MODEL
from folora_q.models.hardware import PeakMemory, choose_hardware
from folora_q.models.load import load_model
from folora_q.models.parts import base_of, embedding_rows
from folora_q.recipe.schema import ModelSection

MODULE = "benchmarks.performance.step"
WARM_UP = 2


@dataclass(frozen=True)
class Way:
    """How a step is computed; the defaults are plain PEFT's, under the Trainer's autocast on a GPU only.

    Attributes:
        frozen: A is not trained.
        fused: layers with a frozen A are computed by our autograd function.
        autocast: adapters compute in 16 bits on a CPU too.
        trained_positions: the head is applied only where a token is trained.
        eager: attention is computed without a fused kernel.
        compiled: decoder layers run compiled.
    """

    frozen: bool = False
    fused: bool = False
    autocast: bool = False
    trained_positions: bool = False
    eager: bool = False
    compiled: bool = False


DEFAULT = Way(frozen=True, fused=True, autocast=True, trained_positions=True)
WAYS = {
    "plain PEFT": Way(),
    "A frozen": Way(frozen=True),
    "A frozen, adapters fused": Way(frozen=True, fused=True),
    "adapters under autocast": Way(autocast=True),
    "head at trained positions": Way(trained_positions=True),
    "eager attention": Way(eager=True),
    "compiled layers": Way(compiled=True),
    "A frozen, compiled layers": Way(frozen=True, compiled=True),
    "the default": DEFAULT,
    "the default, compiled": replace(DEFAULT, compiled=True),
    "the demo": replace(DEFAULT, eager=True),
}


@click.group(invoke_without_command=True, help=__doc__)
@click.option("--gpu", is_flag=True)
@click.option("--profile", is_flag=True, help="Also count operations, or on a GPU kernel launches.")
@click.option("--batch", type=int, help="Sequences; default: 4 on a CPU, 1 on a GPU.")
@click.option("--lengths", help="Tokens per sequence; default: 96 on a CPU, 1024,2048,4096 on a GPU.")
@click.option("--steps", default=8, show_default=True)
@click.pass_context
def main(context: click.Context, gpu: bool, profile: bool, batch: int | None, lengths: str | None, steps: int) -> None:
    if context.invoked_subcommand is not None:
        return
    if gpu and not torch.cuda.is_available():
        raise click.ClickException("no GPU is available")
    for shape in ("llama-2-7b", "llama-3-8b") if gpu else ("demo",):
        for length in (lengths or ("1024,2048,4096" if gpu else "96")).split(","):
            setting = [shape, str(batch or (1 if gpu else 4)), length, str(steps)]
            _print_table(setting, profile)


def _print_table(setting: list[str], profile: bool) -> None:
    shape, batch, length, _ = setting
    times = _measure("time", "all", *setting)
    counts = _measure("profile", "all", *setting) if profile else {}
    table = Table(title=f"{shape}, {batch} x {length} tokens, half of them trained, adapter r 32", title_justify="left")
    for heading in ("way", "step, ms", "tokens/s", "speed", "peak, MB", "memory", *["operations"] * profile):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    tokens, plain, first = int(batch) * int(length), 0.0, 0
    for name in WAYS:
        middle, peak = statistics.median(times[name]), _measure("memory", name, *setting)
        plain, first = plain or middle, first or peak
        cells = [f"{middle * 1e3:,.0f}", f"{tokens / middle:,.0f}", f"{plain / middle:.2f}"]
        cells += [f"{peak / 1e6:,.0f}", f"{peak / first:.2f}"]
        table.add_row(name, *cells, *([f"{counts[name]:,}"] if profile else []))
    out.print(table)


@main.command(hidden=True)
@click.argument("what", type=click.Choice(["time", "memory", "profile"]))
@click.argument("way")
@click.argument("shape")
@click.argument("batch", type=int)
@click.argument("length", type=int)
@click.argument("steps", type=int)
def once(what: str, way: str, shape: str, batch: int, length: int, steps: int) -> None:
    """Take steps in this process, and print times, the peak memory or the number of operations as JSON."""
    bench = _Bench(shape, batch, length)
    ways = WAYS if way == "all" else {way: WAYS[way]}
    for each in ways.values():
        for _ in range(WARM_UP):
            bench.step(each)
    if what == "memory":
        memory = PeakMemory(bench.device)
        memory.reset()
        for _ in range(steps):
            bench.step(WAYS[way])
        click.echo(json.dumps(memory.peak()))
    elif what == "profile":
        click.echo(json.dumps({name: bench.operations(each) for name, each in ways.items()}))
    else:
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(steps):
            for name, each in ways.items():
                times[name].append(bench.step(each))
        click.echo(json.dumps(times))


class _Bench:
    """A model with an adapter, and a batch."""

    def __init__(self, shape: str, batch: int, length: int) -> None:
        hardware = choose_hardware()
        self.device, self.dtype = hardware.device, hardware.dtype
        self.on_gpu = self.device.type == "cuda"
        if shape == "demo":
            base = load_model(ModelSection(model_name_or_path=DEMO_MODEL), hardware).model
        else:
            base = random_4bit(SHAPES[shape], self.device)
        if self.on_gpu:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: PeftModel = get_peft_model(base, lora)
        keep_in_float32(self.model)
        self.model.train()
        self.compiled: CompiledLayers | None = None
        self.ids = torch.randint(5, embedding_rows(base_of(self.model)), (batch, length), device=self.device)
        self.labels = self.ids.clone()
        self.labels[:, : length // 2] = IGNORED
        self.attention = base_of(self.model).config._attn_implementation or "sdpa"
        self.fused = self._fuse()
        self.optimizers = {frozen: self._optimizer(frozen) for frozen in (False, True)}

    def _optimizer(self, frozen: bool) -> torch.optim.Optimizer:
        pairs = adapter_pairs(self.model)
        return torch.optim.AdamW([p for pair in pairs for p in ((pair.b,) if frozen else (pair.a, pair.b))], lr=1e-5)

    def _fuse(self) -> FusedAdapters:
        """Give layers that read the same tensor the same A, as the default rule does."""
        pairs = {pair.name: pair for pair in adapter_pairs(self.model)}
        groups = shared_inputs(self.model, {name: pair.module for name, pair in pairs.items()}, self.ids[:1, :8])
        for first, *others in groups:
            for name in others:
                pairs[name].a.data.copy_(pairs[first].a.data)
        freeze_lora_a(list(pairs.values()))
        return FusedAdapters(self.model, groups)

    def step(self, way: Way) -> float:
        """Take a step, and return its seconds."""
        for pair in adapter_pairs(self.model):
            pair.a.requires_grad_(not way.frozen)
        base_of(self.model).set_attn_implementation("eager" if way.eager else self.attention)
        self._wait()
        began = time.perf_counter()
        with self._computing(way):
            self._loss(way).backward()
        self.optimizers[way.frozen].step()
        self.model.zero_grad(set_to_none=True)
        self._wait()
        return time.perf_counter() - began

    def operations(self, way: Way) -> int:
        """Return the number of kernel launches of a step, or on a CPU of operations."""
        activities = [torch.profiler.ProfilerActivity.CUDA if self.on_gpu else torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profiled:
            self.step(way)
        return sum(event.count for event in profiled.key_averages())

    @contextmanager
    def _computing(self, way: Way) -> Iterator[None]:
        autocast = self.dtype != torch.float32 and (way.autocast or self.on_gpu)
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, self.dtype) if autocast else nullcontext())
            if way.fused:
                stack.enter_context(self.fused.active())
            if way.compiled:
                self.compiled = self.compiled or CompiledLayers(self.model)
                stack.enter_context(self.compiled.active())
            yield

    def _loss(self, way: Way) -> Tensor:
        call: Callable[..., Any] = self.model
        if not way.trained_positions:
            return call(input_ids=self.ids, labels=self.labels, use_cache=False).loss
        columns = (self.labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
        logits = call(input_ids=self.ids, use_cache=False, logits_to_keep=columns).logits.float()
        return cross_entropy(logits.flatten(0, 1), self.labels[:, columns + 1].flatten())

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def _measure(*arguments: str) -> Any:
    err.print(f"[dim]{' '.join(arguments)}[/]")
    return in_a_process(MODULE, "once", *arguments)


if __name__ == "__main__":
    main()
