"""Resolve the paths in a recipe, and find missing files and packages before a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from folora_q.errors import UserError
from folora_q.recipe.dataset import Source
from folora_q.recipe.earlier_adapter import find_adapter
from folora_q.recipe.model_name import find_model
from folora_q.recipe.paths import (
    HUB_ID,
    REMOTE,
    TEMPLATE_ENDINGS,
    NotFoundError,
    absolute,
    exists,
    is_data_name,
    is_remote,
    listed,
    near,
    short,
)
from folora_q.recipe.schema import Recipe

Key = tuple[str | int, ...]
RELATIVE = "paths in a recipe are relative to it; those on the command line to the working directory"
# Modules that settings need, and their names for pip where these differ.
PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "swanlab": "swanlab",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "liger": "liger_kernel",
}
PIP_NAMES = {"flash_attn": "flash-attn --no-build-isolation", "comet_ml": "comet-ml", "liger_kernel": "liger-kernel"}
WITHOUT_PIP = {"flash_attn_interface": "build it from https://github.com/Dao-AILab/flash-attention (folder hopper)"}


@dataclass
class _Findings:
    """What is missing, each with its place, and hints on how to correct it."""

    where: Callable[[Key], str]
    sentences: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def add(self, key: Key, reason: str, hint: str) -> None:
        name = ".".join(str(part) for part in key if not isinstance(part, int))
        self.sentences.append(f"`{name}`: {reason} ({self.where(key)})")
        if hint not in self.hints:
            self.hints.append(hint)

    def require_none(self) -> None:
        if self.sentences:
            raise UserError(listed(self.sentences), "\n      ".join(self.hints))


def with_absolute_paths(
    recipe: Recipe, folder_for: Callable[[str, Key], Path], where: Callable[[Key], str], relative: str = RELATIVE
) -> Recipe:
    """Return the recipe with absolute paths of its inputs.

    Args:
        folder_for: returns the folder that a path is relative to, given the path and its key.
        where: returns the file and line of a key, given as its parts.
        relative: hint for a file that is missing.

    Raises:
        UserError: a file, or a package that a setting needs, is missing; the message lists every one.
    """
    findings = _Findings(where)

    def found(key: Key, value: str, look: Callable[[Path, str], str]) -> str:
        try:
            return look(folder_for(value, key), value)
        except NotFoundError as error:
            findings.add(key, error.reason, error.hint or relative)
            return value

    def sources(key: str, given: list[Source] | None) -> list[Source] | None:
        return given and [
            source.model_copy(update={"path": found(("data", key, index, "path"), source.path, find_data)})
            for index, source in enumerate(given)
        ]

    data = recipe.data.model_copy(
        update={key: sources(key, getattr(recipe.data, key)) for key in ("train_dataset", "eval_dataset")}
    )
    if data.chat_template is not None and _is_file_name(data.chat_template):
        template = found(("data", "chat_template"), data.chat_template, _template)
        data = data.model_copy(update={"chat_template": template})
    evaluation = recipe.evaluation
    changed: dict[str, object] = {}
    if evaluation.general_text is not None:
        texts = enumerate(evaluation.general_text)
        changed["general_text"] = [found(("evaluation", "general_text", i), text, _file) for i, text in texts]
    if evaluation.general_prompts is not None:
        changed["general_prompts"] = found(("evaluation", "general_prompts"), evaluation.general_prompts, _file)
    if evaluation.metric == "function" and evaluation.metric_function is not None:
        changed["metric_function"] = found(("evaluation", "metric_function"), evaluation.metric_function, _function)
    evaluation = evaluation.model_copy(update=changed)
    kept = [found(("keep", "files", i), name, _file) for i, name in enumerate(recipe.keep.files)]
    keep = recipe.keep.model_copy(update={"files": kept})
    name = found(("model", "model_name_or_path"), recipe.model.model_name_or_path, find_model)
    model = recipe.model.model_copy(update={"model_name_or_path": name})
    for key, look in (("adapter", find_adapter), ("adapter_data", _file)):
        if (given := getattr(model, key)) is not None:
            model = model.model_copy(update={key: found(("model", key), given, look)})
    _require_another_folder(recipe, model.adapter, findings)
    _require_packages(recipe, findings)
    findings.require_none()
    return recipe.model_copy(update={"data": data, "evaluation": evaluation, "model": model, "keep": keep})


def _require_another_folder(recipe: Recipe, adapter: str | None, findings: _Findings) -> None:
    """Find an earlier adapter that the run would delete when it clears its own folder."""
    output = Path(recipe.training.output_dir).resolve()
    if adapter is not None and output in (Path(adapter).resolve(), *Path(adapter).resolve().parents):
        reason = f"{short(adapter)} is in the folder of this run, which would replace it"
        findings.add(("model", "adapter"), reason, "name another training.output_dir")


def _require_packages(recipe: Recipe, findings: _Findings) -> None:
    needed: list[tuple[Key, str]] = [
        (("model", "attn_implementation"), recipe.model.attn_implementation),
        (("training", "kernels"), recipe.training.kernels),
        *((("logging", "report_to"), tracker) for tracker in recipe.logging.report_to),
    ]
    for key, value in needed:
        module = PACKAGES.get(value)
        if module is not None and find_spec(module) is None:
            hint = WITHOUT_PIP.get(module) or f"pip install {PIP_NAMES.get(module, module)}"
            findings.add(key, f"{value} needs the package {module}, which is not installed", hint)


def _is_file_name(template: str) -> bool:
    return template.endswith(TEMPLATE_ENDINGS) or "/" in template or "\\" in template


def _file(folder: Path, value: str) -> str:
    path = absolute(folder, value)
    if not (exists(path) and path.is_file()):
        raise _missing(path, value)
    return str(path)


def _template(folder: Path, value: str) -> str:
    if not value.endswith(TEMPLATE_ENDINGS):
        raise NotFoundError(
            f"{short(value)} is not a template: its name does not end in {' or '.join(TEMPLATE_ENDINGS)}"
        )
    return _file(folder, value)


def _function(folder: Path, value: str) -> str:
    path, _, name = value.rpartition(":")
    return f"{_file(folder, path)}:{name}"


def find_data(folder: Path, value: str) -> str:
    """Return the absolute path of local data; an address or a hub id as it is.

    Args:
        folder: the folder that a path is relative to.

    Raises:
        NotFoundError: nothing is there.
    """
    if value.lower().startswith("file://"):
        value = url2pathname(urlsplit(value).path)
    if is_remote(value):
        return _remote(value)
    path = absolute(folder, value)
    if exists(path):
        return str(path)
    if any(mark in value for mark in "*?["):
        raise NotFoundError(f"no file matches {short(path)}")
    if HUB_ID.fullmatch(value) and not is_data_name(value):
        return value
    raise _missing(path, value)


def _missing(path: Path, value: str) -> NotFoundError:
    here = Path(value).absolute()
    elsewhere = f"; the working directory has {here}" if here != path and exists(here) else near(path)
    return NotFoundError(f"no file at {short(path)}{elsewhere}")


def _remote(address: str) -> str:
    """Check that an address can be read; nothing else is known before it is read."""
    from fsspec.registry import known_implementations

    protocol = address.partition("://")[0].lower()
    known = known_implementations.get(protocol)
    if known is None or protocol not in REMOTE:
        names = ", ".join(REMOTE)
        raise NotFoundError(f"{short(address)} cannot be read: {protocol} is not one of {names}; download the data")
    if "::" in address:
        raise NotFoundError(f"{short(address)} is a chain of addresses (::): download the data")
    package = known["class"].partition(".")[0]
    if find_spec(package) is None:
        reason = f"{short(address)} needs the package {package}, which is not installed: pip install {package}"
        raise NotFoundError(reason, f"pip install {package}")
    return address
