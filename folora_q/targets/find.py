"""Find what a name stands for: a run, an adapter or a model. Reads a few JSON files, loads nothing."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from folora_q.errors import UserError, first_line
from folora_q.memory.config import DEMO_MODEL, require_hub_if_absent
from folora_q.models.trust import ADAPTER_CONFIG
from folora_q.recipe.paths import HUB_MODEL, short
from folora_q.recipe.schema import ModelSection
from folora_q.recipe.strict_yaml import MAX_RECIPE_LENGTH, parse_yaml
from folora_q.runs.folder import MERGE_REPORT, RunFolder
from folora_q.storage.untrusted import read_object, read_text
from folora_q.training.checkpoints import checkpoints

# Folders inside a run folder that can be named as targets.
INSIDE_A_RUN = re.compile(r"adapter|added|earlier|trimmed|merged|checkpoint-\d+")
# Those that hold a run's own adapter without the earlier one (`model.adapter`) that it was trained on.
WITHOUT_EARLIER = re.compile(r"added|checkpoint-\d+")
WHAT_TO_MERGE = "name a folder with run.json or adapter_config.json"
WHAT_TO_NAME = "name a run folder, an adapter's folder, a model's folder, a .gguf file or a hub id"


@dataclass(frozen=True)
class Target:
    """A run, an adapter or a model.

    Attributes:
        name: as the user gave it.
        kind: a description for display.
        section: the model to load; for an adapter, its base.
        adapter: the folder of the adapter, if any.
        base: the base of a merged model, from its merge.json.
        run: the run itself, or the run whose folder contains the adapter, checkpoint or merged model.
    """

    name: str
    kind: str
    section: ModelSection
    adapter: Path | None = None
    base: ModelSection | None = None
    run: RunFolder | None = None


def find_target(name: str) -> Target:
    """Find what a name stands for.

    Args:
        name: a run folder, an adapter's folder, or a model: a folder, a .gguf file or a hub id. Whether the
            hub has it is known only when it is loaded.

    Raises:
        UserError: nothing is found, or its description cannot be read.
    """
    path = Path(name)
    there = os.path.exists(name)  # False too for a name that is too long, or holds a NUL
    if there and path.is_dir():
        if RunFolder(path).manifest.is_file():
            return _find_run(name, RunFolder(path))
        if (path / ADAPTER_CONFIG).is_file():
            run = _run_around(path)
            return _on_earlier(replace(_find_adapter(name, path), run=run), path)
        if (path / "config.json").is_file():
            report = _read_json(path / MERGE_REPORT) if (path / MERGE_REPORT).is_file() else {}
            base = _section_of(report.get("base"), report.get("revision"))
            kind = f"merged model, its base {base.model_name_or_path}" if base else "model"
            return Target(name, kind, ModelSection(model_name_or_path=name), base=base, run=_run_around(path))
        raise UserError(
            f"{path} is not a run, adapter or model: it holds no run.json, {ADAPTER_CONFIG} or config.json",
            _hint_inside(path),
        )
    if there and path.suffix != ".gguf":
        raise UserError(f"{path} is a file, but not a .gguf file", WHAT_TO_NAME)
    is_hub_name = HUB_MODEL.fullmatch(name) and not ("/" in name and path.parent.is_dir())
    if name != DEMO_MODEL and not there and (path.suffix == ".gguf" or not is_hub_name):
        raise UserError(f"there is no run, adapter or model at {short(name)!r}{_near(path)}", WHAT_TO_NAME)
    return Target(name, "model", ModelSection(model_name_or_path=name))


def require_reachable(target: Target) -> None:
    """Check that a target's model is on this machine, or that the hub can be asked for it.

    Raises:
        UserError: neither.
    """
    try:
        require_hub_if_absent(target.section.model_name_or_path, target.section.revision)
    except UserError as error:
        raise explained(target, error) from error


def explained(target: Target, error: UserError) -> UserError:
    """Rephrase a loading error in terms of the target that the user named."""
    if target.adapter is not None:
        return UserError(f"the adapter {target.adapter} needs its base and tokenizer: {error.message}", error.hint)
    name = target.section.model_name_or_path
    if os.path.exists(name):
        return error
    reason = error.message.removeprefix(f"cannot load the model {name}: ")
    return UserError(f"{name} is neither a run or adapter here nor a model that can be loaded: {reason}", WHAT_TO_NAME)


def adapter_folder(source: Path) -> Path:
    """Return the adapter of a run folder, or the folder itself if it is an adapter.

    Raises:
        UserError: it is neither, or the run has none yet.
    """
    run = RunFolder(source)
    if run.manifest.exists():
        if not (run.adapter / ADAPTER_CONFIG).exists():
            status = _read_json(run.manifest).get("status")
            marked = f"; it is marked as {status}" if status else ""
            hint = "complete it with `folora-q train RECIPE --resume`, or merge a checkpoint of it"
            raise UserError(f"the run in {source} has no adapter yet{marked}", hint)
        return run.adapter
    if (source / ADAPTER_CONFIG).exists():
        around = _run_around(source)
        if around is not None and around.earlier.is_dir() and WITHOUT_EARLIER.fullmatch(source.resolve().name):
            raise UserError(
                f"{source} is only what was trained on another adapter, and the model needs both",
                f"merge the run: folora-q merge {around.path}",
            )
        return source
    if not source.exists():
        raise UserError(f"there is no run or adapter at {short(source)}{_near(source)}", WHAT_TO_MERGE)
    hint = _hint_inside(source) if source.is_dir() else WHAT_TO_MERGE
    hint = WHAT_TO_MERGE if hint == WHAT_TO_NAME else hint
    raise UserError(f"{source} is neither a run folder nor an adapter", hint)


def merged_folder(source: Path) -> Path:
    """Return the folder of the merged model of a run or an adapter, if no other is named."""
    run = RunFolder(source)
    return run.merged if run.manifest.exists() else source.with_name(f"{source.resolve().name}-merged")


def trimmed_folder(target: Target) -> Path:
    """Return the folder of the trimmed adapter of a run or an adapter, if no other is named."""
    if target.run is not None and target.adapter == target.run.trained:
        return target.run.trimmed
    assert target.adapter is not None, "the target of a trim is an adapter"
    return target.adapter.with_name(f"{target.adapter.resolve().name}-trimmed")


def _find_run(name: str, run: RunFolder) -> Target:
    if not (run.adapter / ADAPTER_CONFIG).is_file():
        status = _read_json(run.manifest).get("status")
        newest = next((saved for saved in checkpoints(run.path) if (saved / ADAPTER_CONFIG).is_file()), None)
        raise UserError(
            f"the run in {run.path} has no adapter" + (f": it is marked as {status}" if status else ""),
            f"chat with a checkpoint of it: folora-q chat {newest}" if newest else None,
        )
    if not run.recipe.is_file():
        return replace(_find_adapter(name, run.adapter), run=run)
    try:
        recipe = parse_yaml(read_text(run.recipe, 4 * MAX_RECIPE_LENGTH))[0]
        section = ModelSection.model_validate(recipe.get("model") if isinstance(recipe, dict) else None)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, ('model', *first['loc'])))}: {first['msg']}"
        raise UserError(f"{run.recipe} cannot be read: {reason}", f"name the adapter itself: {run.adapter}") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run.recipe} cannot be read: {first_line(error)}", f"name the adapter itself: {run.adapter}"
        ) from None
    # The attention backend was chosen for training, perhaps on another machine; all of them compute the same.
    section = section.model_copy(update={"attn_implementation": "auto", "adapter": None})
    target = Target(name, f"adapter of a run on {section.model_name_or_path}", section, run.trained, run=run)
    return _on_earlier(target, run.trained)


def _on_earlier(target: Target, folder: Path) -> Target:
    """Let the base carry the adapter that a run was trained on, if the target is what the run added to it."""
    run = target.run
    if run is None or not run.earlier.is_dir() or not WITHOUT_EARLIER.fullmatch(folder.resolve().name):
        return target
    section = target.section.model_copy(update={"adapter": str(run.earlier)})
    return replace(target, section=section, kind=f"{target.kind} with an earlier adapter")


def _find_adapter(name: str, folder: Path) -> Target:
    config = _read_json(folder / ADAPTER_CONFIG)
    section = _section_of(config.get("base_model_name_or_path"), config.get("revision"))
    if section is None:
        raise UserError(f"{folder / ADAPTER_CONFIG} names no base model", "add it there as base_model_name_or_path")
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
    return Target(name, f"adapter on {section.model_name_or_path}", section, folder)


def _run_around(folder: Path) -> RunFolder | None:
    """Return the run whose folder contains this one."""
    for place in (folder, folder.resolve()):  # as it was given, or with links and dots resolved
        if INSIDE_A_RUN.fullmatch(place.name) and RunFolder(place.parent).manifest.is_file():
            return RunFolder(place.parent)
    return None


def _section_of(name: object, revision: object) -> ModelSection | None:
    """Return the model that a JSON file names, if any."""
    if not isinstance(name, str) or not name:
        return None
    return ModelSection(model_name_or_path=name, revision=revision if isinstance(revision, str) else None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def _hint_inside(path: Path) -> str:
    """Suggest the first run, adapter or model inside a folder that is not one itself."""
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
