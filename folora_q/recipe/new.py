"""Generate a first recipe with comments from a few answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from folora_q.recipe.dataset import FormatName
from folora_q.recipe.run_length import Amount, RunLength, run_length
from folora_q.recipe.strict_yaml import dump_yaml
from folora_q.recipe.training import TrainingSection

Card = Literal["8", "12", "16", "24", "cpu"]

COMMENT_COLUMN = 48
# By card: sequences per forward pass, passes per step, maximum length; batch sizes for sampling and for evaluation.
# Estimated for 7B models, not measured on a GPU.
SIZES: dict[Card, tuple[int, int, int, int, int]] = {
    "8": (1, 16, 1024, 4, 2),
    "12": (1, 16, 2048, 4, 2),
    "16": (2, 8, 2048, 8, 4),
    "24": (4, 4, 2048, 16, 8),
    "cpu": (2, 4, 512, 16, 8),
}
# By format: the line on the objective, where it is not the default.
OBJECTIVES: dict[FormatName, str] = {
    "preference": "  objective: dpo ## learns the chosen answer of each pair against the rejected one\n",
    "labelled": "  objective: kto ## learns from desirable and from undesirable answers\n",
}


@dataclass(frozen=True)
class Answers:
    """What a first recipe depends on.

    Attributes:
        data: as in the recipe.
        format: the format of the rows.
        card: memory of the GPU in GB, or cpu.
        fields: the columns whose names differ from the format's, as {ours: theirs}.
    """

    model: str
    data: str
    format: FormatName
    card: Card
    output_dir: str
    amount: Amount = Amount()
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The sizes for the card; a pair is two sequences."""
        micro_batch, accumulation, *others = SIZES[self.card]
        if self.format != "preference" or micro_batch == 1:
            return SIZES[self.card]
        length, sampled, measured = others
        return micro_batch // 2, accumulation * 2, length, sampled, measured

    @property
    def length(self) -> RunLength:
        """The length of the run."""
        micro_batch, accumulation, length, *_ = self.sizes
        training = TrainingSection(
            output_dir=self.output_dir,
            max_length=length,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
        )
        return run_length(self.amount, training)


def new_recipe(answers: Answers) -> str:
    """Return the text of the recipe, which can be loaded if the data are where the answers say."""
    micro_batch, _, length, sampled, measured = answers.sizes
    run = answers.length
    is_text, pairs = answers.format == "text", answers.format == "preference"
    objective = OBJECTIVES.get(answers.format, "")
    batch = f"{micro_batch} x {run.accumulation} {'pairs' if pairs else 'sequences'} in a step"
    source = "bos" if is_text or answers.format == "prompt_completion" else "mixed"
    on_gpu = answers.card != "cpu"
    machine = f"{'an' if answers.card.startswith('8') else 'a'} {answers.card} GB card" if on_gpu else "a CPU"
    name = answers.output_dir.rstrip("/").rsplit("/", 1)[-1]
    held = "share held out for measuring" if run.eval_size < 1 else "rows held out for measuring"
    lines = f"""\
# yaml-language-server: $schema=recipe.schema.json
# {name}: rows of `{answers.format}`, for {machine}
#   folora-q validate FILE      checks this recipe, without loading the model
#   folora-q preview FILE       shows what would be trained, token by token
#   folora-q train FILE         trains, and says what was learned and what was forgotten

model:
  model_name_or_path: {dump_yaml(answers.model, flow=True)} ## a hub id, a folder, or a .gguf file; loaded in 4 bits

adapter:
  r: 32 ## rank; higher learns more and takes more memory
  lora_alpha: 32 ## the adapter's output is scaled by lora_alpha / r

data:
{_source(answers)}
  eval_size: {run.eval_size:g} ## {held}; or name an eval_dataset
  overlong: {"split" if is_text else "drop"} ## over max_length: drop, truncate, raise; plain text: split
  on_error: raise ## a broken row stops the run; skip leaves it out and counts it

proxy: ## text that the model writes itself: what it should not forget
  source: {source} ## bos: from its start token; chat: as chats; mixed: half of each
  num_samples: {256 if on_gpu else 64}
  max_new_tokens: {256 if on_gpu else 128}
  batch_size: {sampled}

gate:
  enabled: true ## false is plain QLoRA; then set training.learning_rate to 2e-4
  rule: frozen ## only B learns, each direction by its share; step: A too

training:
{objective}\
  output_dir: {dump_yaml(answers.output_dir, flow=True)}
  learning_rate: 2e-3 ## in units of the KL that a step costs; plain QLoRA's is 2e-4
  num_train_epochs: {run.epochs} ## passes over the rows
  per_device_train_batch_size: {micro_batch} ## computed together, as far as memory allows
  gradient_accumulation_steps: {run.accumulation} ## {batch}
  max_length: {length} ## in tokens
  packing: {str(is_text).lower()} ## several examples in one sequence, which do not see each other
  activation_checkpointing: {"auto" if on_gpu else "false"} ## recompute activations: slower, far less memory
  optim: {"paged_adamw_8bit" if on_gpu else "adamw_torch"}

evaluation:
  metric: none ## exact_match: greedy answers to the held-out prompts, compared with yours
  steps: {run.evaluation_steps} ## steps between measurements during training: loss, KL, general text
  batch_size: {measured}
"""
    return "".join(_aligned(line) + "\n" for line in lines.splitlines())


def _source(answers: Answers) -> str:
    """Return the lines of `train_dataset`."""
    data = dump_yaml(answers.data, flow=True)
    comment = "a file, a folder, a glob, a hub id, or a list of them"
    if not answers.fields:
        return f"  train_dataset: {data} ## {comment}"
    fields = dump_yaml(dict(answers.fields), flow=True)
    rendered = "; it becomes a chat" if "instruction" in answers.fields else ""
    return f"  train_dataset:\n    path: {data} ## {comment}\n    fields: {fields} ## our names: your columns{rendered}"


def _aligned(line: str) -> str:
    code, mark, comment = line.partition(" ## ")
    return f"{code:<{COMMENT_COLUMN}} # {comment}" if mark else line
