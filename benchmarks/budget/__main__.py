"""Does a budget spend what it may, on text that its controller has not seen, and does the task gain by it?

    python -m benchmarks.budget recipes/demo.yaml --output runs/budget --budget 0.02 --rate 2e-3 --rate 8e-3

Trains a RECIPE once for each budget and seed, and once without a budget for each learning rate: the search that a
budget replaces. Then it measures all adapters on the same texts, which the base generates for this alone. A run that is
complete is not repeated; points.json holds the results, and trade-off.png draws them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from peft import PeftModel, set_peft_model_state_dict
from rich.table import Table
from safetensors.torch import load_file

from folora_q.calibration.sample_cache import SampledModel, load_or_sample
from folora_q.cli.console import out
from folora_q.data.task_data import read_task, tokenize_task
from folora_q.evaluation.divergence import compare
from folora_q.evaluation.evaluate import task_batches, whole_and_cut
from folora_q.evaluation.loss import GENERAL_TEXTS, mean_loss
from folora_q.evaluation.model_pair import ModelPair
from folora_q.models.parts import base_of
from folora_q.progress import Silence, StageTimer
from folora_q.recipe import load_recipe
from folora_q.report.curves import trade_off_curves
from folora_q.report.render import png
from folora_q.runs.folder import RunFolder
from folora_q.runs.results import Interval
from folora_q.targets.find import find_target
from folora_q.targets.load import load_target

# The texts that steer a budget, those of them that are measured often, and those that are measured afterwards.
STEERING, OFTEN, UNSEEN = 320, 128, 320
# The runs' own evaluation is small: what counts is measured here.
SMALL = (
    *(f"proxy.num_heldout_samples={STEERING + 2}", f"evaluation.num_proxy_samples={OFTEN}"),
    *("evaluation.metric=none", "evaluation.num_answers=0", "evaluation.steps=null"),
    *("evaluation.general_text=[{folder}/text.txt]", "evaluation.general_prompts={folder}/prompt.txt"),
)


@dataclass(frozen=True)
class Variant:
    """A run: with a budget in nats per token, or with a learning rate and no budget."""

    seed: int
    budget: float | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        """Name of its folder."""
        what = f"rate-{self.rate:g}" if self.budget is None else f"budget-{self.budget:g}"
        return f"{what}-seed-{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """What it changes in the recipe."""
        own = [] if self.budget is None else [f"gate.budget={{kl: {self.budget:g}, num_texts: {STEERING}}}"]
        return [
            f"training.seed={self.seed}",
            *own,
            *([] if self.rate is None else [f"training.learning_rate={self.rate:g}"]),
        ]


@dataclass(frozen=True)
class Result:
    """What a run learned and forgot.

    Attributes:
        loss: on the task's held-out rows.
        kl: on unseen text; `steered` is what the controller measured last.
    """

    variant: Variant
    loss: float
    kl: Interval
    steered: float | None


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the runs.")
@click.option("--budget", "budgets", multiple=True, type=float, help="A budget; can be repeated.")
@click.option("--rate", "rates", multiple=True, type=float, help="A learning rate without a budget; can be repeated.")
@click.option("--seeds", default=1, show_default=True, help="Number of seeds of each budget.")
@click.option("--set", "overrides", multiple=True, help="Override of the recipe, for all runs; can be repeated.")
def main(
    recipe: Path,
    output: Path,
    budgets: tuple[float, ...],
    rates: tuple[float, ...],
    seeds: int,
    overrides: tuple[str, ...],
) -> None:
    """Train a RECIPE with budgets and with learning rates, and print what each learned and forgot."""
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    (output / "text.txt").write_text(GENERAL_TEXTS["prose"].read_text("utf-8")[:2000], encoding="utf-8")
    (output / "prompt.txt").write_text("What is the capital of Australia?\n", encoding="utf-8")
    small = [each.format(folder=output) for each in SMALL]
    variants = [Variant(0, rate=rate) for rate in rates]
    variants += [Variant(seed, budget) for seed in range(seeds) for budget in budgets]
    for variant in variants:
        _train(recipe, output / variant.name, [*small, *overrides, *variant.overrides])
    measuring = Measuring(output / variants[0].name)
    results = [measuring.result(output / variant.name, variant) for variant in variants]
    (output / "points.json").write_text(json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8")
    _print(results)
    curves = {
        "learning rates without a budget": [each for each in results if each.variant.budget is None],
        "budgets": [each for each in results if each.variant.budget is not None],
    }
    points = {
        label: [(each.loss, each.kl.value) for each in sorted(found, key=lambda each: each.kl.value)]
        for label, found in curves.items()
    }
    picture = trade_off_curves({label: path for label, path in points.items() if path}, "What the task costs")
    (output / "trade-off.png").write_bytes(png(picture))


def _train(recipe: Path, folder: Path, overrides: list[str]) -> None:
    """Train a variant, if its folder has no adapter yet."""
    if (RunFolder(folder).adapter / "adapter_config.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "folora_q", "train", str(recipe), *overrides]
    with folder.with_name(f"{folder.name}.log").open("w") as log:
        command += [f"training.output_dir={folder}", "--overwrite"]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)


class Measuring:
    """Measures runs of one recipe on the same text: one model, into which each run's adapter is loaded.

    Args:
        folder: of any of the runs.
    """

    def __init__(self, folder: Path) -> None:
        timer = StageTimer(Silence())
        recipe = load_recipe(RunFolder(folder).recipe)
        loaded = load_target(find_target(str(folder)), compare=True)
        assert isinstance(loaded.model, PeftModel)
        self.pair, self.model = ModelPair(loaded.model, remember=True), loaded.model
        section = recipe.proxy.model_copy(
            update={"seed": recipe.proxy.seed + 1, "num_samples": UNSEEN - 1, "num_heldout_samples": 1}
        )
        rows, device = recipe.evaluation.batch_size, self.model.device
        with self.pair.base() as base:
            sampled = SampledModel(base, loaded.tokenizer, loaded.fingerprint, loaded.hardware.dtype)
            samples = load_or_sample(sampled, section, timer)
        self.text = whole_and_cut([sample.ids for sample in samples], section.seed, rows, device)
        data = tokenize_task(recipe, read_task(recipe, timer), loaded.tokenizer, timer)
        self.task = task_batches(data, rows, device)

    def result(self, folder: Path, variant: Variant) -> Result:
        """Measure a run, or read what was measured before."""
        run, kept = RunFolder(folder), folder / "unseen.json"
        if kept.is_file():
            found = json.loads(kept.read_text("utf-8"))
            return Result(variant, found["loss"], Interval(**found["kl"]), found["steered"])
        set_peft_model_state_dict(self.model, load_file(run.adapter / "adapter_model.safetensors"))
        kl = compare(self.pair, self.text).kl
        record = json.loads(run.manifest.read_text("utf-8")).get("budget")
        steered = None if record is None else record["measured"][-1][1]
        result = Result(variant, mean_loss(base_of(self.model), self.task), kl, steered)
        kept.write_text(json.dumps(asdict(result)), encoding="utf-8")
        return result


def _print(results: list[Result]) -> None:
    table = Table("run", "KL, steering texts", "KL, unseen texts", "of the budget", "task loss")
    for each in results:
        low, high = each.kl.bounds or (each.kl.value, each.kl.value)
        budget = each.variant.budget
        table.add_row(
            each.variant.name,
            "" if each.steered is None else f"{each.steered:.4f}",
            f"{each.kl.value:.4f} ({low:.4f} to {high:.4f})",
            "" if budget is None else f"{each.kl.value / budget:.0%}",
            f"{each.loss:.4f}",
        )
    out.print(table)


if __name__ == "__main__":
    main()
