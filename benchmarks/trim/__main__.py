"""Compare ways to forget less of an adapter after training: by quotients, scaled, PEFT's reduction, earlier steps.

    python -m folora_q train benchmarks/frontier/style.yaml gate.enabled=false training.learning_rate=1e-3 \\
        training.output_dir=runs/plain training.save_steps=10 training.save_total_limit=10
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
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora.intruders import reduce_intruder_dimension
from rich.table import Table
from safetensors.torch import load_file

from benchmarks.frontier.testbed import decode
from folora_q.cli.console import out
from folora_q.models.adapters import factors
from folora_q.progress import Silence, StageTimer
from folora_q.report.curves import trade_off_curves
from folora_q.report.render import png
from folora_q.runs.results import Interval
from folora_q.training.checkpoints import checkpoints, step_of
from folora_q.trimming.paths import PATHS, Factors
from folora_q.trimming.points import TrimPoint
from folora_q.workflows.trim import PreparedTrim, TrimRequest, TrimRun

INTRUDERS, EARLIER = "intruders", "earlier steps"
LABELS = {name: path.label for name, path in PATHS.items()} | {
    INTRUDERS: "intruders reduced (PEFT)",
    EARLIER: "earlier steps of the run",
}
# The name of PEFT's adapter with fewer intruders, next to the original.
REDUCED = "reduced"
# The points of each curve: shares of the penalty, PEFT's mitigation_lambda (how much of the intruder dimensions is
# left; its default is 0.75), and a number of the run's checkpoints.
SHARES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02)
LEFT = (1.0, 0.75, 0.5, 0.0)
CHECKPOINTS = 5


@click.command()
@click.argument("run")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--top-k", default=10, show_default=True, help="PEFT's top_k: singular vectors to search.")
def main(run: str, output: Path, top_k: int) -> None:
    """Measure the adapter of a RUN along every way, and draw the curves."""
    prepared = TrimRun(TrimRequest(run), StageTimer(Silence())).prepare()
    points = [prepared.measuring.point(path, share) for path in PATHS for share in SHARES]
    points += [*intruders_reduced(prepared, top_k), *earlier_steps(prepared)]
    output.mkdir(parents=True, exist_ok=True)
    (output / "points.json").write_text(json.dumps([asdict(point) for point in points], indent=1), encoding="utf-8")
    curves = {
        label: [(point.loss, point.kl.value) for point in points if point.path == name and point.loss is not None]
        for name, label in LABELS.items()
    }
    drawn = trade_off_curves({label: path for label, path in curves.items() if path})
    (output / "trade-off.png").write_bytes(png(drawn))
    table = Table("way", "left", "task loss", "KL")
    for point in points:
        table.add_row(LABELS[point.path], f"{point.share:g}", f"{point.loss:.4f}", _written(point.kl))
    out.print(table)


def intruders_reduced(prepared: PreparedTrim, top_k: int) -> list[TrimPoint]:
    """Measure PEFT's reduction with several strengths."""
    model = cast(PeftModel, prepared.measuring.model_pair.adapted)
    decode(model)  # it reads the base's weights, and cannot read 4 bits

    def reduced(left: float) -> Factors:
        reduce_intruder_dimension(
            model, new_adapter_name=REDUCED, top_k=top_k, mitigation_lambda=left, logging_sink=None
        )
        found = {}
        for pair in prepared.update.pairs:
            a, b = factors(pair.module, REDUCED)
            found[pair.name] = (a.detach().clone(), b.detach().clone())
        model.set_adapter("default")
        model.delete_adapter(REDUCED)
        return found

    return [prepared.measuring.point_with(INTRUDERS, left, reduced(left)) for left in LEFT]


def earlier_steps(prepared: PreparedTrim) -> list[TrimPoint]:
    """Measure the checkpoints of the run, as the share of its steps."""
    run = prepared.target.run
    found = [] if run is None else checkpoints(run.path)
    model, points = cast(PeftModel, prepared.measuring.model_pair.adapted), []
    for checkpoint in found[:: max(len(found) // CHECKPOINTS, 1)]:
        set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
        share = step_of(checkpoint) / step_of(found[0])
        points.append(prepared.measuring.point_with(EARLIER, share, prepared.update.present()))
    return points


def _written(kl: Interval) -> str:
    return f"{kl.value:.4f}" + ("" if kl.bounds is None else f" ({kl.bounds[0]:.4f} to {kl.bounds[1]:.4f})")


if __name__ == "__main__":
    main()
