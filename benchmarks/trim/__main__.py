"""Compare three ways to shrink an adapter after training: by quotients, scaled, and PEFT's intruder reduction.

    python -m benchmarks.trim runs/plain --output runs/trim-plain

Every way is measured on the same held-out rows of the task and the same model-generated text, which chose nothing.
points.json and trade-off.png are written to the output folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import cast

import click
from peft import PeftModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from rich.table import Table

from benchmarks.frontier.testbed import decode
from folora_q.cli.console import out
from folora_q.models.adapters import factors
from folora_q.progress import Silence, StageTimer
from folora_q.report.curves import trade_off_curves
from folora_q.report.render import png
from folora_q.runs.results import Interval
from folora_q.trimming.paths import PATHS, Factors, Update
from folora_q.trimming.paths import Path as WayToTheBase
from folora_q.trimming.points import TrimPoint
from folora_q.workflows.trim import PreparedTrim, TrimRequest, TrimRun

INTRUDERS, REDUCED = "intruders", "reduced"
# PEFT's mitigation_lambda: how much of the intruder dimensions is left. Its default is 0.75.
LEFT = (1.0, 0.75, 0.5, 0.25, 0.0)


@click.command()
@click.argument("run")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--top-k", default=10, show_default=True, help="PEFT's top_k: singular vectors to search.")
def main(run: str, output: Path, top_k: int) -> None:
    """Measure the adapter of a RUN along every way, and draw the curves."""
    trim = TrimRun(TrimRequest(run, curve=True), StageTimer(Silence()))
    prepared = trim.prepare()
    points, _ = trim.measure(prepared.measuring)
    labels = {name: path.label for name, path in PATHS.items()} | {INTRUDERS: "intruders reduced (PEFT)"}
    points += intruders_reduced(prepared, top_k, labels[INTRUDERS])
    output.mkdir(parents=True, exist_ok=True)
    (output / "points.json").write_text(json.dumps([asdict(point) for point in points], indent=1), encoding="utf-8")
    curves = {
        label: [(point.loss, point.kl.value) for point in points if point.path == name and point.loss is not None]
        for name, label in labels.items()
    }
    (output / "trade-off.png").write_bytes(png(trade_off_curves(curves)))
    table = Table("way", "left", "task loss", "KL")
    for point in points:
        table.add_row(labels[point.path], f"{point.share:g}", f"{point.loss:.4f}", _written(point.kl))
    out.print(table)


def intruders_reduced(prepared: PreparedTrim, top_k: int, label: str) -> list[TrimPoint]:
    """Measure PEFT's reduction with several strengths."""
    model = cast(PeftModel, prepared.measuring.model_pair.adapted)
    decode(model)  # it reads the base's weights, and cannot read 4 bits

    def reduced(update: Update, left: float) -> Factors:
        reduce_intruder_dimension(
            model, new_adapter_name=REDUCED, top_k=top_k, mitigation_lambda=left, logging_sink=None
        )
        found = {
            pair.name: tuple(part.detach().clone() for part in factors(pair.module, REDUCED)) for pair in update.pairs
        }
        model.set_adapter("default")
        model.delete_adapter(REDUCED)
        return cast(Factors, found)

    PATHS[INTRUDERS] = WayToTheBase(label, reduced)
    try:
        return [prepared.measuring.point(INTRUDERS, left) for left in LEFT]
    finally:
        del PATHS[INTRUDERS]


def _written(kl: Interval) -> str:
    return f"{kl.value:.4f}" + ("" if kl.bounds is None else f" ({kl.bounds[0]:.4f} to {kl.bounds[1]:.4f})")


if __name__ == "__main__":
    main()
