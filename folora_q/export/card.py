"""Write model cards: what an adapter is, what it learned, and what it made the model forget.

Names in cards are untrusted and escaped: none of them is interpreted as Markdown, HTML or YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from folora_q import __version__
from folora_q.models.load import LoadedModel
from folora_q.recipe.dataset import Source
from folora_q.recipe.objectives import OBJECTIVE_FACTS
from folora_q.recipe.paths import HUB_MODEL, is_hub_dataset
from folora_q.recipe.schema import Recipe
from folora_q.runs.in_words import REWARD_WORDS, summary
from folora_q.runs.results import Evaluation, Interval
from folora_q.storage.files import atomic_write

# The card's file in an adapter's folder.
CARD = "README.md"


def write_card(path: Path, recipe: Recipe, base: LoadedModel, evaluation: Evaluation | None) -> None:
    """Write a card that replaces PEFT's, which has only placeholders.

    Args:
        evaluation: None if there is none, or not yet.
    """
    is_hub_id = _is_hub_id(base.name)
    head = ModelCardData(
        base_model=base.name if is_hub_id else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "qlora", "folora-q", *([f"base_model:adapter:{base.name}"] if is_hub_id else [])],
    )
    atomic_write(path, f"---\n{head.to_yaml()}\n---\n{_body(recipe, base, evaluation)}")


def _body(recipe: Recipe, base: LoadedModel, evaluation: Evaluation | None) -> str:
    gate, held, loader = recipe.gate, base.quantization, base.loader
    method = (
        f"gated ({gate.words}, floor {gate.floor:g}, sketches of rank {gate.rank})"
        if gate.enabled
        else "not gated (plain QLoRA)"
    )
    return f"""
# LoRA adapter for {_text(Path(base.name).name)}

Trained by folora-q {__version__} on a base {"saved in" if held.prequantized else "quantized to"} 4 bits
({held.bnb_4bit_quant_type}, double quantization {"on" if held.bnb_4bit_use_double_quant else "off"}).
{_objective(recipe)}Updates were {method}.

- Base model: {_code(base.name)}{f" at revision {_code(base.revision)}" if base.revision else ""}
- Training data: {", ".join(_code(_named(source)) for source in recipe.data.train_dataset)}
- Rank {recipe.adapter.r}, alpha {recipe.adapter.lora_alpha:g}, learning rate {recipe.training.learning_rate:g},
  seed {recipe.training.seed}
{_stacked(recipe, base)}{_whole(recipe)}
## What it learned, what it forgot

{NOT_MEASURED if evaluation is None else _table(evaluation)}

```python
from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained({json.dumps(base.name)})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


NOT_MEASURED = "Not measured: the run ended before its evaluation did."


def _objective(recipe: Recipe) -> str:
    training = recipe.training
    return f"Its objective was {OBJECTIVE_FACTS[training.objective].title}.\n" if training.compares else ""


def _table(evaluation: Evaluation) -> str:
    return f"""\
| held-out text | base | tuned | change (95 % interval) |
|---|---|---|---|
{_rows(evaluation)}

{" ".join(map(_text, summary(evaluation)))} Loss and KL on texts are in nats per token; intervals are over texts.
Generated text was sampled from the base model and held out from training."""


def _stacked(recipe: Recipe, base: LoadedModel) -> str:
    """Return what the adapter holds besides what was trained here, and what the table compares with."""
    if base.earlier is None:
        return ""
    name = _code(Path(base.earlier.name).name)
    return f"""\
- Holds the earlier adapter {name}, which was not changed, and what was trained on it, whose rank this is.
  In the table "base" is the base model with the earlier adapter.
"""


def _whole(recipe: Recipe) -> str:
    names = recipe.adapter.modules_to_save
    if not names:
        return ""
    rate = recipe.training.embedding_learning_rate
    return f"- Trained in full, without a gate: {', '.join(map(_code, names))}, learning rate {rate:g}\n"


def _rows(evaluation: Evaluation) -> str:
    rows = []
    if (scored := evaluation.score) is not None:
        old, new, by = scored.score.base.value, scored.score.tuned.value, scored.score.change
        shift = f"{by.value:+.1%}{_interval(by, '+.1%')}"
        rows.append(
            f"| {scored.metric.replace('_', ' ')}, {scored.answers} answers | {old:.1%} | {new:.1%} | {shift} |"
        )
    for scored in evaluation.earlier:
        old, new, by = scored.score.base.value, scored.score.tuned.value, scored.score.change
        shift = f"{by.value:+.1%}{_interval(by, '+.1%')}"
        named = f"{_text(scored.task or '')}: {scored.metric.replace('_', ' ')}, {scored.answers} answers"
        rows.append(f"| {named} | {old:.1%} | {new:.1%} | {shift} |")
    if (pairs := evaluation.preference) is not None:
        by, accuracy, margin = pairs.loss.change, pairs.accuracy, pairs.margin
        shift = f"{by.value:+.4f}{_interval(by, '+.4f')}"
        words, base, tuned = REWARD_WORDS[pairs.objective], pairs.loss.base.value, pairs.loss.tuned.value
        rows.append(f"| {words.loss}, {pairs.pairs} {words.rows} | {base:.4f} | {tuned:.4f} | {shift} |")
        rows.append(f"| {words.accuracy} | | {accuracy.value:.1%} |{_interval(accuracy, '.1%')} |")
        if margin is not None:
            rows.append(f"| margin of rewards | 0 | {margin.value:.3f} |{_interval(margin, '.3f')} |")
    for text in evaluation.texts:
        loss, by, kl = text.loss, text.loss.change, text.kl
        shift = f"{by.value:+.4f}{_interval(by, '+.4f')}"
        name = _text(text.name)
        rows.append(f"| {name}: loss | {loss.base.value:.4f} | {loss.tuned.value:.4f} | {shift} |")
        rows.append(f"| {name}: KL from the base | 0 | {kl.value:.4f} |{_interval(kl, '.4f')} |")
    for kept in evaluation.kept:
        name = f"keep, {_text(kept.name)}"
        if kept.score is not None:
            old, new, by = kept.score.base.value, kept.score.tuned.value, kept.score.change
            shift = f"{by.value:+.1%}{_interval(by, '+.1%')}"
            rows.append(f"| {name}: {kept.metric}, {kept.texts} prompts | {old:.1%} | {new:.1%} | {shift} |")
        rows.append(f"| {name}: KL from the base | 0 | {kept.kl.value:.4f} |{_interval(kept.kl, '.4f')} |")
    return "\n".join(rows)


def _interval(found: Interval, form: str) -> str:
    """Format an interval in parentheses after a space; nothing for too few texts."""
    return "" if found.bounds is None else f" ({found.bounds[0]:{form}} to {found.bounds[1]:{form}})"


def _text(name: str) -> str:
    """Escape a name as text, also in tables."""
    return re.sub(r"([\\`*_\[\]|#~!<>&$])", r"\\\1", _line(name))


def _code(name: str) -> str:
    """Format a name as code, between more backticks than it has in a row."""
    line = _line(name)
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " * ("`" in (line[:1], line[-1:]))
    return f"{fence}{space}{line}{space}{fence}"


def _line(name: str) -> str:
    """Put a name on one line, with line breaks and invisible characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _is_hub_id(name: str) -> bool:
    return HUB_MODEL.fullmatch(name) is not None and not Path(name).exists()


def _named(source: Source) -> str:
    """Return a hub id, or a file's name without its local folder."""
    return source.path if is_hub_dataset(source) else Path(source.path).name


def write_merged_card(path: Path, report: Mapping[str, Any]) -> None:
    """Write the card of a merged model: its base and adapters, and the result of the verification."""
    is_hub_id = _is_hub_id(report["base"])
    head = ModelCardData(
        base_model=report["base"] if is_hub_id else None,
        base_model_relation="finetune",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["folora-q", "lora", "merged"],
    )
    adapters = "\n".join(
        f"- adapter {_code(adapter['name'])}, weight {adapter['weight']:g}" for adapter in report["adapters"]
    )
    kind = {
        "original": "the base's own 16-bit weights",
        "dequantized": "the base's weights after the round trip through 4 bits that the adapter was trained on",
    }[report["base_weights"]]
    revision = f" at revision {_code(report['revision'])}" if report["revision"] else ""
    body = f"""
# {_text(Path(report["base"]).name)}, merged

Made by folora-q {__version__} from {_code(report["base"])}{revision}.
Each adapter's change was added to {kind}, in float32, and rounded once to {report["dtype"]}.

{adapters}

## Is it the adapter?

{_verdict(report)}
"""
    atomic_write(path, f"---\n{head.to_yaml()}\n---\n{body}")


def _verdict(report: Mapping[str, Any]) -> str:
    if report["verified"] is None:
        return "**Not verified.**"
    if not report["verified"]:
        return "**No: " + "; ".join(map(_text, report["failures"])) + ".** Do not use this model."
    merged, base = report["merged"], report["base_difference"]
    return f"""Yes. Every weight is the nearest number to the sum. On {report["tokens"]:,} tokens of held-out text,
against PEFT's adapter on the same base:

| | merged | bare base |
|---|---|---|
| largest logit difference | {merged["largest"]:.3g} | {base["largest"]:.3g} |
| mean logit difference | {merged["mean"]:.3g} | {base["mean"]:.3g} |
| KL, nats per token | {merged["kl"]:.2g} | {base["kl"]:.2g} |
| same most likely token | {merged["agreement"]:.1%} | {base["agreement"]:.1%} |"""
