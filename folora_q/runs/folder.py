"""The run folder: names of its files, and how they are written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folora_q.errors import UserError
from folora_q.recipe.schema import Recipe
from folora_q.recipe.strict_yaml import MAX_RECIPE_LENGTH, parse_yaml
from folora_q.runs.result_files import read_metrics
from folora_q.storage.files import atomic_write, sha256
from folora_q.storage.untrusted import finite, read_object, read_text

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# The last file of a merged model's folder, with the result of the verification; without it the folder is incomplete.
MERGE_REPORT = "merge.json"


@dataclass(frozen=True)
class RunFolder:
    """A folder with the files of one run."""

    path: Path

    @property
    def manifest(self) -> Path:
        """Status, versions, seeds, fingerprints and results; a folder with this file is a run."""
        return self.path / "run.json"

    @property
    def recipe(self) -> Path:
        """The recipe with its defaults and overrides, which reproduces the run."""
        return self.path / "recipe.resolved.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per line, in order of time."""
        return self.path / "metrics.jsonl"

    @property
    def proxy(self) -> Path:
        """The text sampled from the base model."""
        return self.path / "proxy.jsonl"

    @property
    def keep(self) -> Path:
        """The base's answers to the prompts that the recipe keeps."""
        return self.path / "keep.jsonl"

    @property
    def gates(self) -> Path:
        """The gates of the adapted layers."""
        return self.path / "gates.safetensors"

    @property
    def gate_results(self) -> Path:
        """Quotients and values of the gates, as JSON."""
        return self.path / "gates.json"

    @property
    def evaluation(self) -> Path:
        """All measurements of the tuned model against its base."""
        return self.path / "evaluation.json"

    @property
    def answers(self) -> Path:
        """Prompts with the answers of the base and the tuned model."""
        return self.path / "answers.jsonl"

    @property
    def report(self) -> Path:
        """The report as one HTML file, if it was written."""
        return self.path / "report.html"

    @property
    def figures(self) -> Path:
        """The report's figures as PNG."""
        return self.path / "figures"

    @property
    def skipped(self) -> Path:
        """Rows of the data that could not be used, with reasons."""
        return self.path / "skipped.jsonl"

    @property
    def adapter(self) -> Path:
        """The adapter, in PEFT's format."""
        return self.path / "adapter"

    @property
    def earlier(self) -> Path:
        """With `model.adapter`: a copy of the adapter that the base carried."""
        return self.path / "earlier"

    @property
    def added(self) -> Path:
        """With `model.adapter`: what was trained, without the earlier adapter; `adapter` is the sum of both."""
        return self.path / "added"

    @property
    def trained(self) -> Path:
        """The adapter that was trained, to be put on the base that it was trained on."""
        return self.added if self.earlier.is_dir() else self.adapter

    @property
    def trimmed(self) -> Path:
        """The adapter that `folora-q trim` saves."""
        return self.path / "trimmed"

    @property
    def merged(self) -> Path:
        """The merged model, if it was merged."""
        return self.path / "merged"

    def read_recipe(self) -> Recipe:
        """Read the recipe that the run was started with.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not YAML, or not a recipe.
        """
        return Recipe.model_validate(parse_yaml(read_text(self.recipe, 4 * MAX_RECIPE_LENGTH))[0])

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace run.json."""
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        atomic_write(self.manifest, text.encode("utf-8", "backslashreplace"))  # as in `write_lines`

    def remember(self, manifest: dict[str, Any], path: Path) -> None:
        """Record the checksum of a finished file in run.json, so that a resumed run can verify it."""
        manifest.setdefault("files_sha256", {})[path.name] = sha256(path)
        self.write_manifest(manifest)

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Keep the lines of metrics.jsonl up to the step from which training resumes."""
        # The summary at the end of training has the last step's number, too.
        lines = [(finite(line.get("step")), line) for line in read_metrics(self.metrics) if "train_runtime" not in line]
        kept = [line for reached, line in lines if reached is not None and reached <= step]
        self.write_lines(self.metrics, kept if step else [])

    def write_lines(self, path: Path, lines: Iterable[dict[str, Any]]) -> None:
        """Write one of the folder's JSONL files atomically."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        atomic_write(path, text.encode("utf-8", "backslashreplace"))  # half a surrogate pair becomes JSON's own escape

    def clear(self) -> None:
        """Remove the files of the run only; run.json last, so that an interrupted removal can be repeated."""
        self.discard_unfinished()
        for folder in (self.merged, self.trimmed, self.figures, self.earlier, *self.path.glob("checkpoint-*")):
            shutil.rmtree(folder, ignore_errors=True)
        for file in self.path.glob("merged-*.gguf"):
            file.unlink()
        for file in (*self._written, self.manifest):
            file.unlink(missing_ok=True)

    def discard_unfinished(self) -> None:
        """Remove hidden files that a killed process left unfinished, and the adapter, which will be saved again."""
        unfinished = (".checkpoint-*", ".adapter.*", ".added.*", ".earlier.*", ".rehearsal")
        hidden = [path for pattern in unfinished for path in self.path.glob(pattern)]
        for folder in (self.adapter, self.added, *hidden):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (*self._written, self.manifest):
            for part in self.path.glob(f".{file.name}.*"):
                part.unlink(missing_ok=True)

    @property
    def _written(self) -> tuple[Path, ...]:
        results = (self.gate_results, self.evaluation, self.answers, self.report)
        return (self.recipe, self.metrics, self.proxy, self.keep, self.gates, self.skipped, *results)


def check_run_folder(path: Path, overwrite: bool) -> None:
    """Check whether a new run can use this folder, without changing it.

    Raises:
        UserError: it contains other files, or a run without `overwrite`.
    """
    try:
        if RunFolder(path).manifest.exists():
            if not overwrite:
                raise _occupied(path)
        elif path.exists() and any(not file.name.startswith(".") for file in path.iterdir()):
            raise UserError(f"{path} holds files that are not a run", "name another training.output_dir")
    except OSError as error:
        raise UserError(f"cannot use {path} as the run folder: {error.strerror}", "see training.output_dir") from error


def held_run(path: Path) -> tuple[str, bool]:
    """Describe the run that a folder holds, and whether it can be resumed."""
    try:
        status = str(read_object(RunFolder(path).manifest).get("status"))
    except (OSError, ValueError):
        status = "None"
    ended = {"complete": "a run, which is complete", "evaluation": "an evaluation", "None": "a run"}
    if status in ended:
        return ended[status], False
    unfinished = {"interrupted": "that was interrupted", "failed": "that failed"}
    return f"a run {unfinished.get(status, 'that did not finish')}", True


def _occupied(path: Path) -> UserError:
    """Return the error for a folder with a run: one that can be resumed is not to be deleted by mistake."""
    what, unfinished = held_run(path)
    other = "name another training.output_dir"
    if not unfinished:
        return UserError(f"{path} already holds {what}", f"add --overwrite to replace it, or {other}")
    steps = [int(found[1]) for file in path.glob("checkpoint-*") if (found := CHECKPOINT.fullmatch(file.name))]
    at = f" from step {max(steps)}" if steps else ""
    hint = f"add --resume to continue it{at}; --overwrite deletes it and starts again; or {other}"
    return UserError(f"{path} already holds {what}", hint)


def open_run_folder(path: Path, overwrite: bool) -> RunFolder:
    """Create or clear the folder for a new run.

    Args:
        overwrite: remove an existing run. Files that are not part of a run are never removed.

    Raises:
        UserError: as `check_run_folder`, or the folder cannot be created.
    """
    check_run_folder(path, overwrite)
    folder = RunFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        folder.clear()
    except OSError as error:
        raise UserError(f"cannot use {path} as the run folder: {error.strerror}", "see training.output_dir") from error
    return folder
