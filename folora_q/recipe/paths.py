"""Resolve paths relative to the recipe, and find missing files before a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from folora_q.errors import MAX_QUOTE_LENGTH, UserError
from folora_q.recipe.dataset import Source
from folora_q.recipe.schema import Recipe

Key = tuple[str | int, ...]

# Endings of data files that can be read.
DATA_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
# Endings of compressed text, after those.
COMPRESSED_ENDINGS = (".gz", ".zst", ".bz2", ".xz")
# Addresses of data, and fsspec's names of the remote filesystems that can read them.
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
WEB = ("http", "https")
REMOTE = (*WEB, *"s3 s3a gs gcs az abfs abfss adl hf oss oci ftp sftp ssh smb hdfs webhdfs github memory".split())
TEMPLATE_ENDINGS = (".jinja", ".jinja2", ".j2")
MAX_FINDINGS = 30
HUB_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Packages that must be installed for settings that name them.
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
}


def is_remote(path: str) -> bool:
    """Return whether a path is an address, such as s3://bucket/rows.jsonl."""
    return ADDRESS.match(path) is not None


def is_hub_dataset(source: Source) -> bool:
    """Return whether a checked source is read from a hub: every local path was made absolute."""
    return not is_remote(source.path) and not Path(source.path).is_absolute()


def matching_files(path: Path) -> list[Path]:
    """Return the files that an absolute pattern matches; ** stands for any number of folders."""
    return [match for match in _matching(path) if match.is_file()]


def matching_folders(path: Path) -> list[Path]:
    """Return the folders that an absolute pattern matches; none for one with **, which searches them."""
    return [] if "**" in path.parts else [match for match in _matching(path) if match.is_dir()]


def _matching(path: Path) -> list[Path]:
    root = Path(path.anchor)
    try:
        return sorted(root.glob(str(path.relative_to(root))))
    except (ValueError, OSError, NotImplementedError):  # not a pattern, or a name that is too long
        return []


def exists(path: Path) -> bool:
    """Return whether a path exists or a pattern matches; False for names that are too long or contain NUL."""
    try:
        return path.exists() or (any(mark in path.name for mark in "*?[") and bool(matching_files(path.resolve())))
    except (OSError, ValueError):
        return False


def with_absolute_paths(recipe: Recipe, folder_for: Callable[[str, Key], Path], where: Callable[[Key], str]) -> Recipe:
    """Return the recipe with absolute paths of its inputs.

    Args:
        folder_for: returns the folder that a path is relative to, given the path and its key.
        where: returns the file and line of a key, given as its parts.

    Raises:
        UserError: a file, or a package that a setting needs, is missing; the message lists every one.
    """
    findings: list[str] = []

    def found(key: Key, value: str, look: Callable[[Path, str], str]) -> str:
        try:
            return look(folder_for(value, key), value)
        except LookupError as error:
            name = ".".join(str(part) for part in key if not isinstance(part, int))
            findings.append(f"`{name}`: {error.args[0]} ({where(key)})")
            return value

    def sources(key: str, given: list[Source] | None) -> list[Source] | None:
        return given and [
            source.model_copy(update={"path": found(("data", key, index, "path"), source.path, _data)})
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
    name = found(("model", "model_name_or_path"), recipe.model.model_name_or_path, _model)
    model = recipe.model.model_copy(update={"model_name_or_path": name})

    needed = [(("model", "attn_implementation"), model.attn_implementation)]
    needed += [(("logging", "report_to"), tracker) for tracker in recipe.logging.report_to]
    findings += [
        f"`{'.'.join(key)}`: {value} needs the package {PACKAGES[value]}, which is not installed ({where(key)})"
        for key, value in needed
        if value in PACKAGES and find_spec(PACKAGES[value]) is None
    ]
    if findings:
        raise UserError(
            listed(findings),
            "paths in a recipe are relative to it; those on the command line to the working directory",
        )
    return recipe.model_copy(update={"data": data, "evaluation": evaluation, "model": model})


def _is_file_name(template: str) -> bool:
    return template.endswith(TEMPLATE_ENDINGS) or "/" in template or "\\" in template


def _absolute(folder: Path, value: str) -> Path:
    try:
        return (folder / Path(value).expanduser()).resolve()
    except UnicodeEncodeError as error:
        raise LookupError(
            f"{value!r} cannot be named in this locale, whose encoding is {error.encoding}: set LC_ALL=C.UTF-8"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise LookupError(f"{value!r} is not a path ({error})") from None


def _file(folder: Path, value: str) -> str:
    path = _absolute(folder, value)
    if not (exists(path) and path.is_file()):
        raise LookupError(f"no file at {short(path)}{_near(path)}")
    return str(path)


def _template(folder: Path, value: str) -> str:
    if not value.endswith(TEMPLATE_ENDINGS):
        raise LookupError(f"{short(value)} is not a template: its name does not end in {' or '.join(TEMPLATE_ENDINGS)}")
    return _file(folder, value)


def _function(folder: Path, value: str) -> str:
    path, _, name = value.rpartition(":")
    return f"{_file(folder, path)}:{name}"


def _data(folder: Path, value: str) -> str:
    if value.lower().startswith("file://"):
        value = url2pathname(urlsplit(value).path)
    if is_remote(value):
        return _remote(value)
    path = _absolute(folder, value)
    if exists(path):
        return str(path)
    if any(mark in value for mark in "*?["):
        raise LookupError(f"no file matches {short(path)}")
    if HUB_ID.fullmatch(value) and path.suffix not in (*DATA_ENDINGS, *COMPRESSED_ENDINGS):
        return value
    raise LookupError(f"no file at {short(path)}{_near(path)}")


def _remote(address: str) -> str:
    """Check that an address can be read; nothing else is known before it is read."""
    from fsspec.registry import known_implementations

    protocol = address.partition("://")[0].lower()
    known = known_implementations.get(protocol)
    if known is None or protocol not in REMOTE:
        names = ", ".join(REMOTE)
        raise LookupError(f"{short(address)} cannot be read: {protocol} is not one of {names}; download the data")
    if "::" in address:
        raise LookupError(f"{short(address)} is a chain of addresses (::): download the data")
    package = known["class"].partition(".")[0]
    if find_spec(package) is None:
        raise LookupError(
            f"{short(address)} needs the package {package}, which is not installed: pip install {package}"
        )
    return address


def _model(folder: Path, value: str) -> str:
    path = _absolute(folder, value)
    if exists(path) and path.is_dir():
        if not (path / "config.json").is_file():
            raise LookupError(f"{path} has no config.json, so it is not a model folder")
        return str(path)
    if exists(path):
        if path.suffix != ".gguf":
            raise LookupError(f"{path} is a file, but not a .gguf file; name the model's folder")
        return str(path)
    if path.suffix == ".gguf" or value.startswith(("/", "./", "../", "~")) or not value:
        raise LookupError(f"no model at {short(path)}{_near(path)}")
    if not HUB_MODEL.fullmatch(value):
        raise LookupError(f"{short(value)} is neither a file or folder here nor a hub id")
    return value


def listed(findings: Iterable[str]) -> str:
    """List findings, one per line, at most MAX_FINDINGS."""
    lines = list(findings)
    more = [f"and {len(lines) - MAX_FINDINGS:,} more"] if len(lines) > MAX_FINDINGS else []
    return "\n       ".join([*lines[:MAX_FINDINGS], *more])


def short(text: object) -> str:
    """Shorten a text for quoting it in a message."""
    quoted = str(text)
    return (
        quoted
        if len(quoted) <= MAX_QUOTE_LENGTH
        else f"{quoted[: MAX_QUOTE_LENGTH // 2]}...{quoted[-MAX_QUOTE_LENGTH // 2 :]}"
    )


def _near(path: Path) -> str:
    try:
        near = get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    except OSError:
        near = []
    return f"; did you mean {near[0]}?" if near else ""
