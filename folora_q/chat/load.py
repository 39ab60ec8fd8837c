"""Load a run, an adapter or a model for a chat."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from folora_q.chat.reply import Chatter
from folora_q.data.examples import Chat, with_answers
from folora_q.data.formats import detect_format, to_example
from folora_q.data.rows import Row
from folora_q.data.sources import read_source
from folora_q.data.turns import Message
from folora_q.errors import UserError
from folora_q.models.trust import NOTHING, Trust
from folora_q.recipe.dataset import DataSection
from folora_q.recipe.paths import is_hub_dataset, is_remote
from folora_q.recipe.strict_yaml import MAX_RECIPE_LENGTH, parse_yaml
from folora_q.runs.folder import RunFolder
from folora_q.runs.result_files import read_answers
from folora_q.storage.untrusted import MIB, parse_json, read_text
from folora_q.targets.find import find_target
from folora_q.targets.load import Precision, load_target

FIRST_ROWS = 20


def load_chat(name: str, dtype: str = "auto", bits: int = 4, compare: bool = False, trust: Trust = NOTHING) -> Chatter:
    """Load a target for a chat.

    Args:
        name: a run folder, an adapter's folder, or a model: a folder, a .gguf file or a hub id.
        dtype: compute dtype; auto is the recipe's for a run, else the hardware's.
        bits: weight precision, 4 as in training or 16.
        compare: require a base to compare with; a merged model's, named in its merge.json, is loaded in addition.

    Raises:
        UserError: it is not found, cannot or must not be loaded, or has no base to compare with.
    """
    loaded = load_target(find_target(name), Precision(dtype, bits), compare=compare, trust=trust)
    target, tokenizer = loaded.target, loaded.tokenizer
    stops = loaded.model.generation_config.eos_token_id
    stops = [stop for stop in (stops if isinstance(stops, list) else [stops]) if stop is not None]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops.append(tokenizer.eos_token_id)
    return Chatter(
        model=loaded.model,
        tokenizer=tokenizer,
        name=name,
        origin=f"{target.kind}, in {bits} bits, computing in {loaded.hardware}",
        stops=stops,
        base=loaded.base,
        system=None if target.run is None else _system_prompt(target.run),
        thoughtless=target.run is not None and _thoughtless(target.run),
    )


def _thoughtless(run: RunFolder) -> bool:
    """Whether a run trained on answers without thoughts only, with a template that has a place for thoughts."""
    try:
        counts = parse_json(read_text(run.manifest, MIB))["data"]["train"]
        return counts["given"] >= max(counts["sequences"], 1)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # an unreadable run, or one of a version that did not count this


def _system_prompt(run: RunFolder) -> str | None:
    """Return the system prompt shared by the run's answers or, if there are none, by its first training rows."""
    prompt = _shared(_asked(run))
    return _shared(_trained(run)) if prompt is None else prompt


def _asked(run: RunFolder) -> list[list[Message]]:
    try:
        answers = read_answers(run.answers)
    except UserError:
        return []
    return [answer.prompt for answer in answers if answer.kind == "task" and not isinstance(answer.prompt, str)]


def _trained(run: RunFolder) -> list[list[Message]]:
    try:
        recipe = parse_yaml(read_text(run.recipe, 4 * MAX_RECIPE_LENGTH))[0]
        source = DataSection.model_validate(recipe["data"]).train_dataset[0]
        if is_hub_dataset(source) or is_remote(source.path):
            return []
        rows = [row for row in islice(read_source(source), FIRST_ROWS) if isinstance(row, Row)]
        objective = recipe.get("training", {}).get("objective", "sft")  # older recipes name none
        examples = [to_example(row, detect_format(row, source, objective), source) for row in rows]
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return []
    return [example.messages for example in with_answers(examples) if isinstance(example, Chat)]


def _shared(chats: Iterable[list[Message]]) -> str | None:
    beginnings = [chat[0] if chat else {} for chat in chats]
    prompts = {str(first.get("content")) if first.get("role") == "system" else None for first in beginnings}
    return prompts.pop() if len(prompts) == 1 else None
