"""Measure a run on 1, 2 and 4 processes, and count what they send each other at 7B and 70B.

    .venv/bin/python -m benchmarks.performance.scaling            the demo's model on a CPU, a thread for each process
    .venv/bin/python -m benchmarks.performance.scaling --fsdp     the same with a sharded base
    .venv/bin/python -m benchmarks.performance.scaling --count    only the bytes

Times are those of the run's stages, by the first process, relative to one process. On a CPU processes share cores and
the memory's bandwidth, so that more processes than cores bring nothing: this checks that work is divided, not how GPUs
scale.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from folora_q.cli.console import err, out
from folora_q.memory.components import FLOAT32, arithmetic, input_spaces, trained_parameters, weights
from folora_q.memory.shapes import ModelShape, shape_of
from folora_q.recipe import Recipe, load_recipe

RECIPE = Path("recipes/demo.yaml")
STAGES = ("sampling text from the base model", "statistics of both texts", "training")
SHORT = (
    *("training.max_steps=4", "training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=4"),
    *("proxy.num_samples=12", "proxy.num_heldout_samples=4", "proxy.max_new_tokens=64", "gate.num_task_samples=32"),
    *("proxy.public_share=0", "evaluation.steps=null", "evaluation.metric=none", "evaluation.num_answers=1"),
)
LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 32_000, "tie_word_embeddings": False}
SHAPES = {
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "heads": (32, 32)},
    "Llama-2-70B": {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "heads": (64, 8)},
}
# Bytes per second that a process receives in an all-reduce, assumed: PCIe 4.0 x16 without NVLink.
BANDWIDTH = 10e9


@click.command()
@click.option("--processes", default="1,2,4", show_default=True, help="Numbers of processes, the first for comparison.")
@click.option("--fsdp", is_flag=True, help="Shard the base over two and more processes.")
@click.option("--count", "only_count", is_flag=True, help="Count bytes, and measure nothing.")
def main(processes: str, fsdp: bool, only_count: bool) -> None:
    """Compare a run's stages on several processes, and count what they send."""
    if not only_count:
        _print_times([int(number) for number in processes.split(",")], fsdp)
    _print_bytes()


def _print_times(counts: list[int], fsdp: bool) -> None:
    times = {count: _stages(count, fsdp and count > 1) for count in counts}
    table = Table(title="time, relative to one process (speed)", title_justify="left")
    for heading in ("processes", *STAGES):
        table.add_column(heading, justify="right")
    first = times[counts[0]]
    for count, found in times.items():
        table.add_row(str(count), *(f"{found[s] / first[s]:.2f} ({first[s] / found[s]:.2f})" for s in STAGES))
    out.print(table)


def _stages(count: int, fsdp: bool) -> dict[str, float]:
    """Return the seconds of a run's stages, as the first process begins and ends them; the evaluation is left out."""
    err.print(f"[dim]{count} processes[/]")
    began: dict[str, float] = {}
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        launched = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "folora_q"]
        place = f"model.fsdp={'shard' if fsdp else 'none'}"
        command = [*launched, "train", str(RECIPE), *SHORT, place, f"training.output_dir={folder}/run"]
        environment = {"OMP_NUM_THREADS": "1", "FOLORA_Q_CACHE": f"{folder}/cache"}
        process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            for stage in STAGES:
                if line.startswith(f"[start] {stage}"):
                    began[stage] = time.perf_counter()
                elif line.startswith(f"[done] {stage}"):
                    found[stage] = time.perf_counter() - began[stage]
            if len(found) == len(STAGES):
                break
        process.terminate()
        process.wait()
    if len(found) < len(STAGES):
        raise click.ClickException(f"{' '.join(command)} failed: {''.join(lines)[-800:]}")
    return found


def _print_bytes() -> None:
    recipe = load_recipe(RECIPE, ["adapter.r=16"])
    table = Table(
        title=f"sent and received by each of two GPUs; seconds at {BANDWIDTH / 1e9:g} GB/s", title_justify="left"
    )
    for heading in ("model", "gradients, a step", "sums, all readings", "FSDP, a pass"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, sizes in SHAPES.items():
        heads, groups = sizes["heads"]
        given = {key: value for key, value in sizes.items() if key != "heads"}
        shape = shape_of(LLAMA | given | {"num_attention_heads": heads, "num_key_value_heads": groups})
        numbers = _gradients(recipe, shape), _sums(recipe, shape), _gathered(shape)
        table.add_row(name, *(f"{number / 1e6:,.0f} MB, {number / BANDWIDTH:.3f} s" for number in numbers))
    out.print(table)


def _gradients(recipe: Recipe, shape: ModelShape) -> int:
    """Return the bytes of the gradients of B; a ring of two sends each once and receives each once."""
    return FLOAT32 * trained_parameters(shape, arithmetic(recipe, shape, on_gpu=True))


def _gathered(shape: ModelShape) -> int:
    """Return the bytes of the 4-bit layers that a GPU lacks; a backward pass gathers them again."""
    return weights(shape, double=True, compute=2)["4-bit weights"] // 2


def _sums(recipe: Recipe, shape: ModelShape) -> int:
    """Return the bytes of sketches, Grams and images of both texts, in all readings."""
    section, total = recipe.gate, 0
    for space in input_spaces(shape, arithmetic(recipe, shape, on_gpu=True)):
        columns = min(section.rank + section.oversampling, space.width)
        numbers = space.width * columns
        for m, image in section.readings:
            numbers += min(m, space.width) * (min(m, space.width) + space.width * image)
        total += space.count * numbers
    return 2 * FLOAT32 * total


if __name__ == "__main__":
    main()
