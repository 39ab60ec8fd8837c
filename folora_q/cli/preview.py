"""`folora-q preview`: show what would be trained, token by token, and what is left out."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from folora_q.cli.console import out, print_table, starting, visible
from folora_q.cli.options import code_option, recipe_arguments
from folora_q.models.trust import Trust
from folora_q.progress import StageTimer
from folora_q.recipe import Recipe

if TYPE_CHECKING:
    from folora_q.data.task_data import TaskTokens
    from folora_q.data.tokenized import Tokenized

BINS = 10
BAR = 40
# Longer texts are shortened to this length, half from their beginning and half from their end.
MAX_SHOWN_CHARACTERS = 3000
MAX_REASONS = 5


@click.command("preview")
@recipe_arguments
@click.option(
    "-n", "count", default=3, show_default=True, type=click.IntRange(min=0), help="Number of examples to show."
)
@click.option("--heldout", is_flag=True, help="Show held-out examples instead of training examples.")
@click.option("--full", is_flag=True, help="Do not shorten long examples.")
@code_option
@click.pass_obj
def command(
    settings: dict[str, bool],
    path: Path,
    overrides: tuple[str, ...],
    recipe: Recipe,
    count: int,
    heldout: bool,
    full: bool,
    trust: Trust,
) -> None:
    """Show examples as the model will see them: trained tokens in green, the others dim. No model is loaded."""
    with starting(settings["debug"], "Transformers") as progress:
        from folora_q.data.advice import size_warnings
        from folora_q.data.pairs import DESIRABLE, columns_of, sequences_of
        from folora_q.data.task_data import chat_template, read_task, tokenize_task
        from folora_q.models.tokenizer import load_tokenizer
    clock = StageTimer(progress)
    task = read_task(recipe, clock)
    tokenizer = load_tokenizer(recipe.model, chat_template(recipe), trust)
    data = tokenize_task(recipe, task, tokenizer, clock)
    half, examples = (data.heldout, task.heldout) if heldout else (data.train, task.train)

    rows = half.sequences
    columns = columns_of(rows.column_names, trained=True)
    chosen = sorted(random.Random(recipe.training.seed).sample(range(len(rows)), min(count, len(rows))))
    for row in (rows[index] for index in chosen):
        where = examples[row["example"]].where
        kinds = (" chosen", " rejected") if len(columns) > 1 else ("",)
        if DESIRABLE in row:
            kinds = (" desirable" if row[DESIRABLE] else " undesirable",)
        for names, kind in zip(columns, kinds, strict=True):
            ids, labels = (row[name] for name in names)
            learned = sum(label >= 0 for label in labels[1:])
            what = f"[dim]{len(ids)} tokens, {learned} learned[/]"
            out.print(f"\n[bold]{escape(where)}[/]{kind} {what}", soft_wrap=True)
            runs = _runs(tokenizer, ids, labels)
            out.print(_coloured(runs if full else _shortened(runs)), soft_wrap=True)
    _print_lengths(sequences_of(rows[:], trained=True)[0])
    _print_left_out(recipe, data, half)
    for warning in size_warnings(recipe, data):
        out.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)


def _runs(tokenizer, ids: Sequence[int], labels: Sequence[int]) -> Iterator[tuple[str, bool]]:
    """Yield the text in pieces, each with whether it is trained."""
    pairs = zip(ids, [label >= 0 for label in labels], strict=True)
    for learned, run in groupby(pairs, key=lambda pair: pair[1]):
        yield visible(tokenizer.decode([token for token, _ in run])), learned


def _shortened(runs: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    half = MAX_SHOWN_CHARACTERS // 2
    for text, learned in runs:
        if len(text) > MAX_SHOWN_CHARACTERS:
            text = f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
        yield text, learned


def _coloured(runs: Iterator[tuple[str, bool]]) -> Text:
    """Color trained text green and the rest dim; without colours, mark trained text by ⟦ ⟧."""
    colour = out.color_system is not None
    text = Text()
    for piece, learned in runs:
        text.append(piece if colour or not learned else f"⟦{piece}⟧", style="green" if learned else "dim")
    return text


def _print_lengths(sequences: Sequence[Sequence[int]]) -> None:
    lengths = [len(ids) for ids in sequences]
    least = min(lengths)
    width = -(-(max(lengths) - least + 1) // BINS)
    counts = [0] * ((max(lengths) - least) // width + 1)
    for length in lengths:
        counts[(length - least) // width] += 1
    table = Table(title=f"{len(lengths):,} sequences by length in tokens", title_justify="left", box=None)
    table.add_column("tokens", justify="right")
    table.add_column("")
    table.add_column("sequences", justify="right")
    for number, count in enumerate(counts):
        bar = "█" * max(round(BAR * count / max(counts)), 1 if count else 0)
        first = least + number * width
        span = f"{first:,} to {first + width - 1:,}" if width > 1 else f"{first:,}"
        table.add_row(span, f"[cyan]{bar}[/]", f"{count:,}")
    out.print()
    print_table(table)


def _print_left_out(recipe: Recipe, data: TaskTokens, half: Tokenized) -> None:
    counts, limit = half.counts, recipe.training.max_length
    out.print(
        f"\n{counts.tokens:,} tokens, {counts.trained:,} of them learned ({counts.trained / counts.tokens:.1%}); "
        f"the longest example has {counts.longest:,}",
        soft_wrap=True,
    )
    for count, what in ((counts.dropped, "left out"), (counts.cut, "cut"), (counts.split, "split")):
        if count:
            out.print(
                f"[yellow]{count:,} examples over {limit:,} tokens were {what}[/] (data.overlong)", soft_wrap=True
            )
    if counts.untrained:
        out.print(f"[yellow]{counts.untrained:,} sequences without a token to learn were left out[/]", soft_wrap=True)
    skipped = [f"{row['where']}: {row['error']}" for row in data.skipped()]
    if skipped:
        out.print(f"[yellow]{len(skipped):,} rows were skipped[/] (data.on_error)", soft_wrap=True)
        for message in skipped[:MAX_REASONS]:
            out.print(f"  {escape(visible(message))}", soft_wrap=True)
        if len(skipped) > MAX_REASONS:
            out.print(f"  ... and {len(skipped) - MAX_REASONS:,} more")
