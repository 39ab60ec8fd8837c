"""What a name stands for, a run, an adapter or a model, and loading it to talk to."""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from peft import PeftModel
from pydantic import ValidationError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.chat.reply import Chatter, first_line, nothing_to_compare
from folora_q.data.formats import Chat, shape_of, to_example
from folora_q.data.rows import Row
from folora_q.data.sources import read_source
from folora_q.errors import UserError
from folora_q.export.adapter import CONFIG as ADAPTER_CONFIG
from folora_q.export.merge import REPORT as MERGE_REPORT
from folora_q.models.demo import DEMO_MODEL
from folora_q.models.hardware import Hardware, choose_hardware
from folora_q.models.load import load_model
from folora_q.models.tokenizer import load_tokenizer, loading, local_or_hub
from folora_q.recipe.dataset import DataSection
from folora_q.recipe.paths import is_hub_dataset, short
from folora_q.recipe.schema import ModelSection
from folora_q.recipe.strict_yaml import parse_yaml
from folora_q.runs.folder import RunFolder

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
FIRST_ROWS = 20
WHAT_TO_NAME = "name a run folder, an adapter's folder, a model's folder, a .gguf file or a hub id"
# What PEFT and safetensors raise for an adapter that cannot be read, or belongs to another model.
ADAPTER_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError, SafetensorError)


def load_chat(name: str, dtype: str = "auto", bits: int = 4, compare: bool = False) -> Chatter:
    """Load what a name stands for.

    Args:
        name: a run folder, an adapter's folder, or a model: a folder, a .gguf file or a hub id.
        dtype: compute dtype; auto is the recipe's where there is one, else the hardware's.
        bits: of the model's weights, 4 as in training or 16.
        compare: there must be a base to compare with. A merged model's, named in its merge.json, is loaded besides it.

    Raises:
        UserError: there is no such thing, it cannot be loaded, or there is nothing to compare it with.
    """
    found = _find(name)
    if compare and found.adapter is None and found.base is None:
        raise nothing_to_compare(name)
    hardware = choose_hardware(found.section.dtype if dtype == "auto" else dtype)
    try:
        tokenizer = _tokenizer(found)
        model = _load(found.section, hardware, tokenizer, bits)
    except UserError as error:
        raise _explained(found, error) from error
    if found.adapter is not None and (found.adapter / "generation_config.json").is_file():
        with loading(found.section):
            model.generation_config = GenerationConfig.from_pretrained(found.adapter)
    stops = model.generation_config.eos_token_id
    stops = [stop for stop in (stops if isinstance(stops, list) else [stops]) if stop is not None]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops.append(tokenizer.eos_token_id)
    base = None
    if compare and found.adapter is None and found.base is not None:
        try:
            base = _load(found.base, hardware, tokenizer, bits)
        except UserError as error:
            reason = f"{Path(name) / MERGE_REPORT} names a base: {error.message}"
            raise UserError(reason, "leave out --base") from error
        base.generation_config = model.generation_config  # they stop alike
    chosen = f"{bits} bits, computing in {str(hardware.dtype).removeprefix('torch.')} on {hardware.reason}"
    return Chatter(
        model=model if found.adapter is None else _with_adapter(model, found.adapter),
        tokenizer=tokenizer,
        name=name,
        origin=f"{found.kind}, in {chosen}",
        stops=stops,
        base=base,
        system=found.system,
    )


@dataclass(frozen=True)
class _Found:
    """What a name stands for.

    Attributes:
        kind: for people.
        section: the model to load.
        adapter: the folder of the adapter on it.
        base: what a merged model says that it was made of.
        system: the system prompt that a run was trained with.
    """

    kind: str
    section: ModelSection
    adapter: Path | None = None
    base: ModelSection | None = None
    system: str | None = None


def _find(name: str) -> _Found:
    path = Path(name)
    there = os.path.exists(name)  # False too for a name that is too long, or holds a NUL
    if there and path.is_dir():
        if RunFolder(path).manifest.is_file():
            return _find_run(RunFolder(path))
        if (path / ADAPTER_CONFIG).is_file():
            return _find_adapter(path)
        if (path / "config.json").is_file():
            report = _read_json(path / MERGE_REPORT) if (path / MERGE_REPORT).is_file() else {}
            base = _section_of(report.get("base"), report.get("revision"))
            kind = f"merged model, its base {base.model_name_or_path}" if base else "model"
            return _Found(kind, ModelSection(model_name_or_path=name), base=base)
        raise UserError(
            f"{path} is no run, adapter or model: it holds no run.json, {ADAPTER_CONFIG} or config.json",
            _hint_inside(path),
        )
    if there and path.suffix != ".gguf":
        raise UserError(f"{path} is a file, but no .gguf file", WHAT_TO_NAME)
    is_hub_name = HUB_NAME.fullmatch(name) and not ("/" in name and path.parent.is_dir())
    if name != DEMO_MODEL and not there and (path.suffix == ".gguf" or not is_hub_name):
        raise UserError(f"there is no run, adapter or model at {short(name)!r}{_near(path)}", WHAT_TO_NAME)
    return _Found("model", ModelSection(model_name_or_path=name))


def _find_run(run: RunFolder) -> _Found:
    if not (run.adapter / ADAPTER_CONFIG).is_file():
        status = _read_json(run.manifest).get("status")
        saved = [folder for folder in run.path.glob("checkpoint-*") if (folder / ADAPTER_CONFIG).is_file()]
        newest = max(saved, key=lambda folder: folder.stat().st_mtime, default=None)
        raise UserError(
            f"the run in {run.path} has no adapter" + (f": it is marked as {status}" if status else ""),
            f"a checkpoint of it can be asked: folora-q chat {newest}" if newest else None,
        )
    if not run.recipe.is_file():
        return _find_adapter(run.adapter)
    try:
        recipe = parse_yaml(run.recipe.read_text(encoding="utf-8"))[0]
        section = ModelSection.model_validate(recipe["model"])
        data = DataSection.model_validate(recipe["data"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run.recipe} cannot be read: {first_line(error)}", f"name the adapter itself: {run.adapter}"
        ) from None
    # The attention backend was chosen for training, perhaps on another machine; all of them compute the same.
    section = section.model_copy(update={"attn_implementation": "auto"})
    return _Found(
        f"adapter of a run on {section.model_name_or_path}", section, run.adapter, system=_system_prompt(data)
    )


def _system_prompt(data: DataSection) -> str | None:
    """The one that the first training rows share, if they do and their files are still there."""
    source = data.train_dataset[0]
    if is_hub_dataset(source):
        return None
    try:
        rows = [row for row in islice(read_source(source), FIRST_ROWS) if isinstance(row, Row)]
        examples = [to_example(row, shape_of(row, source), source) for row in rows]
    except (UserError, OSError):
        return None
    chats = [example.messages[0] for example in examples if isinstance(example, Chat)]
    prompts = {first["content"] if first["role"] == "system" else None for first in chats}
    return prompts.pop() if len(prompts) == 1 else None


def _find_adapter(folder: Path) -> _Found:
    config = _read_json(folder / ADAPTER_CONFIG)
    section = _section_of(config.get("base_model_name_or_path"), config.get("revision"))
    if section is None:
        raise UserError(
            f"{folder / ADAPTER_CONFIG} names no base model", "write its name there as base_model_name_or_path"
        )
    mapping = config.get("auto_mapping")
    held = mapping.get("quantization_config") if isinstance(mapping, dict) else None
    if isinstance(held, dict):  # as folora-q writes how the base was held in training
        keys = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        try:
            section = ModelSection.model_validate(
                section.model_dump() | {key: held[key] for key in keys if key in held}
            )
        except ValidationError as error:
            raise UserError(f"{folder / ADAPTER_CONFIG} cannot be used: {error.errors()[0]['msg']}") from None
    return _Found(f"adapter on {section.model_name_or_path}", section, folder)


def _section_of(name: object, revision: object) -> ModelSection | None:
    """The model that a JSON file names, if it does."""
    if not isinstance(name, str) or not name:
        return None
    return ModelSection(model_name_or_path=name, revision=revision if isinstance(revision, str) else None)


def _tokenizer(found: _Found) -> Tokenizer:
    """The adapter's own where it has one, with the base's chat template if it has none."""
    folder = found.adapter
    if folder is None:
        return load_tokenizer(found.section)
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(ModelSection(model_name_or_path=str(folder)) if own else found.section)
    template = folder / "chat_template.jinja"
    if not own and template.is_file():
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {template}: {error}") from None
    elif own and tokenizer.chat_template is None:
        tokenizer.chat_template = load_tokenizer(found.section).chat_template
    return tokenizer


def _load(section: ModelSection, hardware: Hardware, tokenizer: Tokenizer, bits: int) -> PreTrainedModel:
    if bits == 4:
        return load_model(section, hardware, tokenizer).model
    with loading(section):
        model = AutoModelForCausalLM.from_pretrained(
            local_or_hub(section.model_name_or_path),
            revision=section.revision,
            dtype=hardware.dtype,
            device_map={"": hardware.device},
        )
    return model.requires_grad_(False).eval()


def _with_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    if not any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        raise UserError(f"there is no {folder / ADAPTER_WEIGHTS[0]}")
    base = model.name_or_path
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            tuned = PeftModel.from_pretrained(model, folder).eval()
        except ADAPTER_ERRORS as error:
            raise UserError(
                f"cannot put the adapter {folder} on {base}: {first_line(error)}",
                "is it damaged, or was it trained on another model?",
            ) from error
    # PEFT goes on without the weights that it does not find, which is an adapter that does nothing there.
    if any("missing adapter keys" in str(warning.message) for warning in caught):
        raise UserError(
            f"the adapter {folder} does not fit {base}: it lacks weights for some of its layers",
            "was it trained on another model?",
        )
    return tuned


def _explained(found: _Found, error: UserError) -> UserError:
    """What cannot be loaded, in the words of what was asked for."""
    if found.adapter is not None:
        return UserError(f"the adapter {found.adapter} needs its base and tokenizer: {error.message}", error.hint)
    name = found.section.model_name_or_path
    if os.path.exists(name):
        return error
    reason = error.message.removeprefix(f"cannot load the model {name}: ")
    return UserError(f"{name} is no run or adapter here, and no model that can be loaded: {reason}", WHAT_TO_NAME)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object")
    return value


def _hint_inside(path: Path) -> str:
    """The first run, adapter or model in a folder that is none, which is perhaps what was meant."""
    for name in ("run.json", ADAPTER_CONFIG, "config.json"):
        if inside := sorted(path.glob(f"*/{name}")):
            return f"did you mean {inside[0].parent}?"
    return WHAT_TO_NAME


def _near(path: Path) -> str:
    try:
        near = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    except (OSError, ValueError):
        near = []
    return f"; did you mean {path.parent / near[0]}?" if near else ""
