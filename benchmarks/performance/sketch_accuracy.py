"""Measure covariance sketches: the variance they capture, their memory, and the effect of their rank on a run.

.venv/bin/python -m benchmarks.performance.sketch_accuracy captured    the demo's model and texts: five minutes on
                                                                       two CPU cores
.venv/bin/python -m benchmarks.performance.sketch_accuracy memory      bytes at 7B shapes, from real sketches
.venv/bin/python -m benchmarks.performance.sketch_accuracy frontier    the demo's recipe at every rank: seven
                                                                       minutes each
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import click
from rich.table import Table

from folora_q.cli.console import ConsoleProgress, out, quiet_libraries, quiet_progress_bars

quiet_libraries()  # before they are imported

import torch
from peft import PeftModel
from torch import nn

from folora_q.calibration.hooks import collect_inputs, shared_inputs
from folora_q.calibration.sample_cache import SampledModel, load_or_sample
from folora_q.core import CovarianceSketch, ProjectedCovariance
from folora_q.data.task_data import chat_template, read_task, tokenize_task
from folora_q.data.tokens import Batch, batches
from folora_q.data.windows import crops
from folora_q.models.adapters import adapter_pairs, attach_adapter
from folora_q.models.hardware import choose_hardware
from folora_q.models.load import load_model
from folora_q.models.tokenizer import load_tokenizer
from folora_q.progress import StageTimer
from folora_q.recipe import load_recipe
from folora_q.recipe.shipped import recipes_folder
from folora_q.runs.folder import RunFolder
from folora_q.runs.result_files import read_evaluation
from folora_q.runs.results import GENERATED_TEXT, GENERATED_TEXT_CUT
from folora_q.workflows.train import TrainingRequest, run_training

RANKS = (16, 64, 128, 256)
OVERSAMPLING = 16
# Input widths of the adapted layers of one block: q/k/v, o, gate/up, down.
WIDTHS = {"Llama-2-7B": (4096, 4096, 4096, 11_008), "Llama-3-8B": (4096, 4096, 4096, 14_336)}
BLOCKS = 32


@click.group(help=__doc__)
def main() -> None:
    quiet_progress_bars()


@main.command()
def memory() -> None:
    """Count the bytes held while statistics are collected: one text's sketches, and the second reading."""
    table = Table(title=f"statistics of {BLOCKS} blocks, float32", title_justify="left")
    for heading in ("model", "rank", "dense, MB", "sketches, MB", "ratio", "second reading, MB", "ratio"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for model, widths in WIDTHS.items():
        dense = sum(width * width for width in widths) * 4 * BLOCKS
        for rank in RANKS:
            sketches = {width: CovarianceSketch(width, rank, OVERSAMPLING) for width in set(widths)}
            held = sum(sketches[width].product.nbytes for width in widths) * BLOCKS
            held += sum(sketch.test_matrix.nbytes for sketch in sketches.values())  # one for each width
            exact = {width: ProjectedCovariance(torch.empty(width, 2 * rank)) for width in set(widths)}
            second = sum(exact[width].basis.nbytes + exact[width].gram.nbytes for width in widths) * BLOCKS
            table.add_row(
                model,
                str(rank),
                f"{dense / 1e6:,.0f}",
                *(cell for size in (held, second) for cell in (f"{size / 1e6:,.0f}", f"1/{dense / size:.0f}")),
            )
    out.print(table)


@main.command()
def captured() -> None:
    """Show the share of a covariance's trace that the leading directions capture, by module."""
    recipe = load_recipe(recipes_folder() / "demo.yaml")
    clock = StageTimer(ConsoleProgress())
    tokenizer = load_tokenizer(recipe.model, chat_template(recipe))
    hardware = choose_hardware()
    base = load_model(recipe.model, hardware, tokenizer)
    rows = tokenize_task(recipe, read_task(recipe, clock), tokenizer, clock).train.sequences
    sampled = SampledModel(base.model, tokenizer, base.fingerprint, hardware.dtype)
    samples = load_or_sample(sampled, recipe.proxy, clock)
    own = [sample.ids for sample in samples[: recipe.proxy.num_samples]]
    device = hardware.device
    texts = {
        GENERATED_TEXT: list(batches([*own, *crops(own, 1)], recipe.gate.batch_size, device)),
        "task": list(batches(rows[: recipe.gate.num_task_samples]["input_ids"], recipe.gate.batch_size, device)),
    }
    model = attach_adapter(base, recipe.adapter, 0).eval()
    modules = {pair.name: cast(nn.Module, pair.module) for pair in adapter_pairs(model)}
    readers = {g[0]: modules[g[0]] for g in shared_inputs(model, modules, texts["task"][0].input_ids[:1, :8])}
    shares: dict[tuple[str, str, int], list[float]] = {}
    for text, read in texts.items():
        for rank in RANKS:
            with clock.stage(f"{text}, rank {rank}", len(read)) as done:
                for name, share in _captured(model, readers, read, rank, done).items():
                    shares.setdefault((text, name.rsplit(".", 1)[1], rank), []).append(share)
    table = Table(title="share of the trace captured: median (least) over layers", title_justify="left")
    table.add_column("text")
    table.add_column("input of")
    for rank in RANKS:
        table.add_column(f"rank {rank}", justify="right")
    for text, kind in dict.fromkeys((text, kind) for text, kind, _ in shares):
        found = [shares[text, kind, rank] for rank in RANKS]
        table.add_row(text, kind, *(f"{statistics.median(each):.3f} ({min(each):.3f})" for each in found))
    out.print(table)


def _captured(
    model: PeftModel, readers: Mapping[str, nn.Module], text: Sequence[Batch], rank: int, done: Callable[[int], None]
) -> dict[str, float]:
    """Return the share of the trace that each layer's sketch of a text captures."""
    widths = {name: cast(int, module.in_features) for name, module in readers.items()}
    sketches = {name: CovarianceSketch(width, rank, OVERSAMPLING) for name, width in widths.items()}
    with torch.no_grad(), model.disable_adapter(), collect_inputs(readers, sketches) as counted:
        for batch in text:
            counted.count(batch.attention_mask)
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)
            counted.require_finite()
            done(1)
    return {name: sketch.covariance().captured for name, sketch in sketches.items()}


@main.command()
@click.argument("overrides", nargs=-1)
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/sketch_accuracy"))
def frontier(overrides: tuple[str, ...], output: Path) -> None:
    """Run the demo's recipe at every rank; finished runs in --output are not repeated."""
    table = Table(title="the demo's recipe by gate.rank", title_justify="left")
    for heading in ("rank", "task loss", "KL, generated text", "KL, cut", "rise, prose"):
        table.add_column(heading, justify="right")
    for rank in RANKS:
        folder = output / f"rank-{rank}"
        recipe = load_recipe(
            recipes_folder() / "demo.yaml", [f"gate.rank={rank}", f"training.output_dir={folder}", *overrides]
        )
        found = read_evaluation(RunFolder(folder).evaluation)
        if found is None:
            run_training(TrainingRequest(recipe=recipe, overwrite=True), ConsoleProgress())
            found = read_evaluation(RunFolder(folder).evaluation)
        assert found is not None
        prose, task, own, cut = map(found.text, ("prose", "task", GENERATED_TEXT, GENERATED_TEXT_CUT))
        assert prose and task and own and cut, f"{folder} has no complete evaluation"
        table.add_row(
            str(rank),
            f"{task.loss.tuned.value:.4f}",
            f"{own.kl.value:.4f}",
            f"{cut.kl.value:.4f}",
            f"{prose.loss.change.value:+.4f}",
        )
    out.print(table)


if __name__ == "__main__":
    main()
