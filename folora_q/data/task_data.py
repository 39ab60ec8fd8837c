"""Make tokenized data from a recipe, in the same way for a run and for a preview."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.encode import Encoder
from folora_q.data.examples import Text, has_chats
from folora_q.data.loading import TaskData, read_task_data
from folora_q.data.rendering import Renderer
from folora_q.data.templates import read_template
from folora_q.data.tokenized import Tokenized, UnfitExamples, tokenize
from folora_q.errors import UserError
from folora_q.progress import StageTimer
from folora_q.recipe.schema import Recipe


@dataclass(frozen=True)
class TaskTokens:
    """The task as token sequences.

    Attributes:
        task: the examples.
        marking: how the assistant's turns were found, if there are chats.
        ends_of_turn: the tokens that end a turn, and a tool call if there is any.
        renderer: renders chats with the same template.
    """

    task: TaskData
    train: Tokenized
    heldout: Tokenized
    marking: str | None
    ends_of_turn: list[int]
    renderer: Renderer

    def skipped(self) -> list[dict[str, str]]:
        """List the rows that could not be used, with location and reason."""
        found = [(error.where, error.reason) for error in self.task.skipped]
        for examples, half in ((self.task.train, self.train), (self.task.heldout, self.heldout)):
            found += [(examples[index].where, reason) for index, reason in half.counts.refused]
        return [{"where": where, "error": reason} for where, reason in found]

    def summary(self) -> dict[str, Any]:
        """Summarize the data for run.json."""
        return {
            "sources": [asdict(facts) for facts in self.task.facts],
            "marking": self.marking,
            "train": asdict(self.train.counts),
            "heldout": asdict(self.heldout.counts),
            "skipped": len(self.task.skipped),
            "repeated": self.task.repeated,
        }


def read_task(recipe: Recipe, clock: StageTimer) -> TaskData:
    """Read the recipe's rows, and report what they are.

    Raises:
        UserError: a row cannot be used, or the metric does not apply to the rows.
    """
    with clock.stage("reading the data", None):
        task = read_task_data(recipe.data, recipe.training.seed, recipe.training.objective)
    for facts in task.facts:
        clock.note(f"{facts.path}: {facts.rows:,} rows of `{facts.shape}`")
        for remark in facts.remarks:
            clock.note(f"{facts.path}: {remark}")
    if task.skipped:
        clock.note(f"{len(task.skipped):,} rows skipped; the first: {task.skipped[0].message}")
    if task.repeated:
        clock.note(f"{task.repeated:,} of the held-out examples are also in the training data")
    if recipe.evaluation.metric != "none" and any(isinstance(example, Text) for example in task.heldout):
        raise UserError(
            f"evaluation.metric: {recipe.evaluation.metric} needs questions, but held-out rows are plain text",
            "set evaluation.metric: none, or name a data.eval_dataset with prompts",
        )
    return task


def tokenize_task(recipe: Recipe, task: TaskData, tokenizer: Tokenizer, clock: StageTimer) -> TaskTokens:
    """Tokenize training and held-out examples, and report what was left out.

    Raises:
        UserError: the chat template cannot be used, an example is too long, or nothing is left to train on.
    """
    training, data = recipe.training, recipe.data
    encoder = Encoder(
        tokenizer,
        assistant_only_loss=training.assistant_only_loss,
        completion_only_loss=training.completion_only_loss,
        template_name=f"the chat template {data.chat_template}" if data.chat_template else "the model's chat template",
        without_thought=data.without_thought,
    )
    if has_chats((*task.train, *task.heldout)):
        encoder.prepare_chats()
        if encoder.assistant_only_loss:
            clock.note(f"the assistant's turns are found by {encoder.marking}")
    unfit = UnfitExamples(training.max_length, data.overlong, skip_errors=data.on_error == "skip")
    halves: list[Tokenized] = []
    for name, examples in (("training", task.train), ("held-out", task.heldout)):
        with clock.stage(f"tokenizing {name} rows", len(examples), "rows") as done:
            half = tokenize(examples, encoder, unfit, name, done)
        clock.note(_described(half, training.max_length))
        halves.append(half)
    train, heldout = halves
    ends_of_turn = encoder.ends_of_turn((*task.train, *task.heldout))
    return TaskTokens(task, train, heldout, encoder.marking, ends_of_turn, encoder.renderer)


def _described(data: Tokenized, max_length: int) -> str:
    """Describe in one line what there is to train on, what was left out, and where it is stored."""
    counts = data.counts
    share = counts.trained / counts.tokens
    kind = "pair" if "rejected_ids" in data.sequences.column_names else "sequence"
    sequences = f"{counts.sequences:,} {kind}{'s' * (counts.sequences != 1)}"
    parts = [f"{sequences}, {counts.tokens:,} tokens, {share:.0%} of them trained"]
    happened = {"left out": counts.dropped, "cut": counts.cut, "split": counts.split}
    parts += [f"{count:,} over {max_length} tokens {what}" for what, count in happened.items() if count]
    if counts.given:
        parts.append(
            f"{counts.given:,} answers have no thought: the template's empty thought is part of the prompt, "
            "not trained (data.without_thought)"
        )
    if counts.untrained:
        parts.append(f"{counts.untrained:,} without a trained token left out")
    if counts.refused:
        parts.append(f"{len(counts.refused):,} that cannot be rendered skipped")
    return "; ".join(parts) + f" ({'found in' if data.from_cache else 'kept in'} {data.folder})"


def chat_template(recipe: Recipe) -> str | None:
    """Return the template that replaces the model's own, if the recipe names one."""
    return None if recipe.data.chat_template is None else read_template(recipe.data.chat_template)
