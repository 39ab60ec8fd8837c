"""The tables and the plot: of what has been run, and of nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.frontier import changes
from benchmarks.frontier.comparing import PLAIN, Curve, Spread, at_update_norm, kept_accuracy, wanted_loss
from benchmarks.frontier.costs import Beside, read_costs
from benchmarks.frontier.plot import draw
from benchmarks.frontier.results import Result, Setting, kept, read
from benchmarks.frontier.series import OF_FROZEN, OURS, methods
from folora_q.cli.console import out
from folora_q.errors import UserError
from folora_q.files import atomic_write

# What is between these lines of docs/frontier.md is replaced.
BEGIN, END = "<!-- made by `benchmarks.frontier table`: -->", "<!-- until here -->"
METHODS = {series.name: series.points for series in methods()}
# They take a part of the weights away, which 4 bits cannot hold.
SIXTEEN_BIT = {name for name, points in METHODS.items() if points[0].sixteen_bit}
# What ablations are set beside, by whether they change A frozen.
UNCHANGED = {False: f"gated, λ {OURS:g}", True: "gated, A frozen, ridge 0.01"}
# Shares of plain LoRA's best gain at which methods are compared.
SHARES = (0.9, 0.97, 0.99)
MEASURES = {
    "KL": (lambda run: run.kl, True),
    "rise": (lambda run: run.mean_rise, False),
    "exact": (lambda run: math.nan if run.tuned["exact"] is None else run.tuned["exact"], False),
    "right answers kept": (kept_accuracy, False),
    "‖ΔW‖": (lambda run: run.tuned["update_norm"], True),
}
# By name, what a row has there.
Columns = Mapping[str, Callable[[Any], str]]


@dataclass(frozen=True)
class Row:
    """A method at one task loss, over the seeds that both it and plain LoRA have."""

    series: str
    values: dict[str, Spread]
    bound: bool  # with some seed every run learnt more
    kl_ratio: Spread
    rise_ratio: Spread
    area: Spread  # mean log KL ratio over the shared range
    kl_at_norm: Spread
    loss_at_norm: Spread
    # Of a few steps, beside plain LoRA's; NaN where they were not measured.
    time: float
    memory: float


def rows(results: Sequence[Result], share: float, costs: Mapping[str, Beside]) -> list[Row]:
    """Of one task; by KL, those that do not reach the loss last."""
    by_series: dict[str, dict[int, list[Result]]] = {}
    for result in results:
        by_series.setdefault(result.series, {}).setdefault(result.seed, []).append(result)
    plain = by_series[PLAIN]
    found = [_row(name, seeds, plain, share, costs) for name, seeds in by_series.items()]
    return sorted(found, key=lambda row: (math.isnan(row.kl_ratio.mean), row.kl_ratio.mean))


def _row(
    name: str, seeds: dict[int, list[Result]], plain: dict[int, list[Result]], share: float, costs: Mapping[str, Beside]
) -> Row:
    values: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    kl_ratio, rise_ratio, area, kl_at_norm, loss_at_norm = [], [], [], [], []
    bound = False
    for seed in sorted(seeds.keys() & plain.keys()):
        curve, reference = Curve.of(seeds[seed]), Curve.of(plain[seed])
        loss = wanted_loss(plain[seed], share)
        bound |= curve.ends_before(loss)
        for measure, (value, log) in MEASURES.items():
            values[measure].append(curve.at_task_loss(loss, value, log))
        kl_ratio.append(values["KL"][-1] / reference.at_task_loss(loss, *MEASURES["KL"]))
        rise_ratio.append(values["rise"][-1] / reference.at_task_loss(loss, *MEASURES["rise"]))
        area.append(curve.mean_log_ratio(reference, MEASURES["KL"][0]))
        norm = reference.at_task_loss(loss, *MEASURES["‖ΔW‖"])
        kl_at_norm.append(at_update_norm(seeds[seed], norm, *MEASURES["KL"]))
        loss_at_norm.append(at_update_norm(seeds[seed], norm, lambda run: run.task_loss, True))
    time = memory = math.nan
    if name in costs:
        time = costs[name].seconds / costs[name].plain_seconds
        peak, plain_peak = (costs[each].peak_bytes if each in costs else None for each in (name, PLAIN))
        if peak and plain_peak:
            memory = peak / plain_peak
    return Row(
        name,
        {measure: Spread.of(found) for measure, found in values.items()},
        bound,
        *map(Spread.of, (kl_ratio, rise_ratio, area, kl_at_norm, loss_at_norm)),
        time,
        memory,
    )


def at_most(row: Row, spread: Spread, digits: int) -> str:
    sign = "≤ " if row.bound and not math.isnan(spread.mean) else ""
    return f"{sign}{spread:.{digits}f}"


def measured(ratio: float) -> str:
    return "–" if math.isnan(ratio) else f"{ratio:.2f}"


COLUMNS = {
    "method": lambda row: f"{row.series} ¹" if row.series in SIXTEEN_BIT else row.series,
    "seeds": lambda row: str(row.area.seeds),
    "KL": lambda row: at_most(row, row.values["KL"], 3),
    "/ LoRA's": lambda row: at_most(row, row.kl_ratio, 2),
    "rise": lambda row: at_most(row, row.values["rise"], 3),
    "/ LoRA's ": lambda row: at_most(row, row.rise_ratio, 2),
    "exact": lambda row: f"{row.values['exact']:.2f}",
    "right kept": lambda row: f"{row.values['right answers kept']:.3f}",
    "‖ΔW‖": lambda row: f"{row.values['‖ΔW‖']:.2f}",
    "area": lambda row: f"{row.area:+.2f}",
    "KL at LoRA's ‖ΔW‖": lambda row: f"{row.kl_at_norm:.3f}",
    "task loss there": lambda row: f"{row.loss_at_norm:.3f}",
}
# Of a task whose costs were measured.
COST_COLUMNS = {
    "time": lambda row: measured(row.time),
    "memory": lambda row: measured(row.memory),
}


def show(output: Path, settings: Sequence[Setting], steps: int, docs: Path | None) -> None:
    """Print the tables; with `docs` put them into its frontier.md too, with a plot for each task, and the runs.

    Raises:
        UserError: nothing has been run on these settings.
    """
    text: list[str] = []
    lines: list[str] = []
    of_tasks: dict[str, dict[str, Beside]] = {}
    for on in settings:
        lines += (found := kept(output, on))
        of_task = [result for result in map(read, found) if result.steps == steps]
        if not of_task:
            continue
        task = on.task
        costs = of_tasks[task] = read_costs(output, on)
        compared = [result for result in of_task if result.series in METHODS]
        sections: list[tuple[str, Columns, Sequence[Any]]] = [
            (
                f"{task}: at {share:.0%} of the gain that plain LoRA makes at its best rate",
                COLUMNS | (COST_COLUMNS if costs else {}),
                rows(compared, share, costs),
            )
            for share in SHARES
        ]
        for of_frozen, name in UNCHANGED.items():
            changed = [
                result
                for result in of_task
                if result.series not in METHODS and result.series.startswith(OF_FROZEN) == of_frozen
            ]
            if changed:
                ours, plain = ([run for run in compared if run.series == each] for each in (name, PLAIN))
                found = changes.changes(changed, ours, plain)
                sections.append((f"{task}: {name}, with one thing changed", changes.COLUMNS, found))
        for title, columns, found in sections:
            table = Table(title=title, title_justify="left")
            for number, column in enumerate(columns):
                table.add_column(column, justify="right" if number else "left")
            for row in found:
                table.add_row(*(cell(row) for cell in columns.values()))
            out.width = max(out.width, 200)
            out.print(table)
            text += [f"### {title}\n", markdown(columns, found)]
        if docs is not None:
            draw(compared, docs / f"frontier-{task}.png")
            text.append(f"![{task}](frontier-{task}.png)\n")
    if not of_tasks:
        raise UserError(
            f"no run of {steps} steps is kept in {output} for these recipes",
            "give `table` the overrides, --steps and --output that `run` had",
        )
    if docs is not None:
        atomic_write(docs / "frontier-runs.jsonl", "".join(lines))
        costs_text = json.dumps(of_tasks, indent=1, ensure_ascii=False, default=asdict)
        atomic_write(docs / "frontier-costs.json", costs_text + "\n")
        page = docs / "frontier.md"
        before, _, rest = page.read_text("utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        atomic_write(page, before + BEGIN + "\n\n" + "\n".join(text) + "\n" + END + after)


def markdown(columns: Columns, found: Sequence[Any]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(name.strip() for name in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in found]
    return "\n".join(lines) + "\n"
