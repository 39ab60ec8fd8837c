"""Measure what a second task does to the first: the next-task path against plain training, on the demo's model.

    .venv/bin/python -m benchmarks.next_task FOLDER       a quarter of an hour on one CPU core

The first task is the demo's (bookings to JSON), the second one reverses lists; both are made by rules. Results are kept
in FOLDER, and runs that are there already are not repeated. docs/next-task.md shows the table.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from peft import PeftModel
from rich.table import Table

from folora_q.cli.console import out
from folora_q.data.task_data import read_task, tokenize_task
from folora_q.data.tokens import batches
from folora_q.evaluation.loss import GENERAL_TEXTS
from folora_q.models.hardware import choose_hardware
from folora_q.models.load import load_model
from folora_q.progress import Silence, StageTimer
from folora_q.recipe import load_recipe
from folora_q.recipe.strict_yaml import dump_yaml
from folora_q.runs.result_files import read_evaluation
from folora_q.runs.results import Evaluation, TextKind

DEMO = Path("recipes/demo.yaml")
WORDS = """apple river stone cloud paper green seven window silver garden bread horse table yellow winter music lemon
bottle forest candle orange hammer pencil island rabbit carpet butter ladder planet copper basket tunnel""".split()
TRAIN_ROWS, HELDOUT_ROWS = 600, 96
PLAIN_RATE, OWN_RATE, STEPS = 2e-4, 2e-3, 40
# Small enough for a quarter of an hour: few samples, little general text, few answers.
SMALL = (
    *("evaluation.steps=null", "evaluation.num_answers=12", "evaluation.general_text=[{folder}/prose.txt]"),
    *("evaluation.general_prompts={folder}/prompt.txt", "data.max_eval_samples=24", "gate.num_task_samples=24"),
    *("proxy.num_samples=24", "proxy.num_heldout_samples=8", "proxy.max_new_tokens=64", "proxy.public_share=0"),
)
PLAIN = ("gate.enabled=false", f"training.learning_rate={PLAIN_RATE}")


@dataclass(frozen=True)
class Row:
    """A way to train the second task.

    Attributes:
        overrides: of the second recipe; None continues the first adapter.
    """

    name: str
    overrides: tuple[str, ...] | None


ROWS = (
    Row("next task, earlier_share .3", ("proxy.earlier_share=0.3",)),
    Row("second adapter, no gate", PLAIN),
    Row("first adapter continued, no gate", None),
    Row("next task, earlier_share 0", ("proxy.earlier_share=0",)),
    Row("second adapter, no gate, rate 1e-3", ("gate.enabled=false", "training.learning_rate=1e-3")),
    Row("next task, earlier_share .6", ("proxy.earlier_share=0.6",)),
)


def write_tasks(folder: Path) -> tuple[Path, Path]:
    """Write the second task's rows, and the recipes of both tasks with little to evaluate; return the recipes."""
    chooser = random.Random(0)
    made: dict[str, None] = {}
    while len(made) < TRAIN_ROWS + HELDOUT_ROWS:
        made[" ".join(chooser.sample(WORDS, chooser.randint(3, 5)))] = None
    lines = []
    for words in made:
        asked, said = ", ".join(words.split()), ", ".join(reversed(words.split()))
        turns = (("system", "Reverse the list."), ("user", asked), ("assistant", said))
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    for name, part in (("train.jsonl", lines[:TRAIN_ROWS]), ("heldout.jsonl", lines[TRAIN_ROWS:])):
        (folder / name).write_text("\n".join(part) + "\n", encoding="utf-8")
    (folder / "prose.txt").write_text(GENERAL_TEXTS["prose"].read_text("utf-8")[:6000], encoding="utf-8")
    (folder / "prompt.txt").write_text("What is the capital of Australia?\n", encoding="utf-8")
    small = [each.format(folder=folder) for each in SMALL]
    rows = [f"data.train_dataset={folder}/train.jsonl", f"data.eval_dataset={folder}/heldout.jsonl"]
    paths = folder / "first.yaml", folder / "second.yaml"
    for path, changes in zip(paths, (small, [*small, *rows, f"training.max_steps={STEPS}"]), strict=True):
        path.write_text(dump_yaml(load_recipe(DEMO, changes).model_dump(mode="json")), encoding="utf-8")
    return paths


def train(recipe: Path, output: Path, *overrides: str) -> None:
    """Run a recipe, unless it was run already."""
    if not (output / "adapter").is_dir():
        command = [sys.executable, "cli.py", "train", str(recipe), "--overwrite", f"training.output_dir={output}"]
        subprocess.run([*command, *overrides], check=True, stdout=sys.stderr)


def evaluation_in(folder: Path) -> Evaluation:
    """Return the measurements in a folder, which exist."""
    found = read_evaluation(folder / "evaluation.json")
    assert found is not None
    return found


def continue_plainly(recipe: Path, first: Path, output: Path) -> None:
    """Train B of the first adapter on with AdamW, at its own rate, on as many rows of the second task as others see."""
    if output.is_dir():
        return
    settings = load_recipe(recipe)
    timer = StageTimer(Silence())
    base = load_model(settings.model, choose_hardware(settings.model.dtype))
    data = tokenize_task(settings, read_task(settings, timer), base.tokenizer, timer)
    model = PeftModel.from_pretrained(base.model, first / "adapter", is_trainable=True).train()
    trained = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    optimizer = torch.optim.AdamW(trained, lr=OWN_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    size = settings.training.per_device_train_batch_size
    chooser = random.Random(settings.training.seed)
    for _ in range(STEPS):
        rows = data.train.sequences[chooser.sample(range(len(data.train.sequences)), size)]
        (batch,) = batches(rows["input_ids"], size, base.model.device, rows["labels"])
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        model.zero_grad()
        schedule.step()
    model.save_pretrained(str(output))


def measured(adapter: Path, recipe: Path, output: Path) -> tuple[float, float]:
    """Measure an adapter on the original base: task loss and exact match."""
    if not (output / "evaluation.json").is_file():
        command = [sys.executable, "cli.py", "eval", str(adapter), "--recipe", str(recipe), "--output", str(output)]
        subprocess.run([*command, "--samples", "4"], check=True, stdout=sys.stderr)
    return of_task(evaluation_in(output))


def of_task(found: Evaluation) -> tuple[float, float]:
    """Return loss and exact match of the tuned model on its own task."""
    assert found.score is not None
    return found.of_kind(TextKind.TASK)[0].loss.tuned.value, found.score.score.tuned.value


def with_row(row: Row, folder: Path, recipes: tuple[Path, Path]) -> list[float]:
    """Train both tasks in one way; return loss and exact match: the first's after it and after both, the second's."""
    first, name = folder / "bookings", "".join(letter if letter.isalnum() else "-" for letter in row.name)
    train(recipes[0], first)
    before = measured(first / "adapter", recipes[0], folder / "first-on-first")
    if row.overrides is None:
        continue_plainly(recipes[1], first, folder / name)
        after = measured(folder / name, recipes[0], folder / f"{name}-on-first")
        return [*before, *after, *measured(folder / name, recipes[1], folder / f"{name}-on-second")]
    names = f"model.adapter={first}", f"model.adapter_data={recipes[0]}"
    train(recipes[1], folder / name, *names, *row.overrides)
    found = evaluation_in(folder / name)
    (loss,), (score,) = found.of_kind(TextKind.EARLIER), found.earlier
    return [*before, loss.loss.tuned.value, score.score.tuned.value, *of_task(found)]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--only", multiple=True, type=int, help="Numbers of the rows to run, from 0.")
def main(folder: Path, only: tuple[int, ...]) -> None:
    """Train both tasks in every way, and print the first task's numbers before and after the second."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    recipes = write_tasks(folder)
    table = Table("", "first: loss, exact", "after both", "second: loss, exact")
    for number, row in enumerate(ROWS):
        if not only or number in only:
            found = with_row(row, folder, recipes)
            pairs = [f"{found[at]:.4f}, {found[at + 1]:.0%}" for at in (0, 2, 4)]
            table.add_row(row.name, *pairs)
            out.print(table)


if __name__ == "__main__":
    main()
