"""The run folder: names of its files, and how they are written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folora_q.errors import UserError
from folora_q.recipe.schema import Recipe
from folora_q.recipe.strict_yaml import MAX_RECIPE_LENGTH, parse_yaml
from folora_q.runs.results import read_metrics
from folora_q.storage.files import atomic_write, sha256
from folora_q.storage.untrusted import finite, read_text


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds one run and nothing else of ours."""

    path: Path

    @property
    def manifest(self) -> Path:
        """Status, versions, seeds, fingerprints and results; a folder with this file is a run."""
        return self.path / "run.json"

    @property
    def recipe(self) -> Path:
        """The recipe with its defaults and overrides, which does the same again."""
        return self.path / "recipe.resolved.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, in the order of time."""
        return self.path / "metrics.jsonl"

    @property
    def proxy(self) -> Path:
        """The text sampled from the base model."""
        return self.path / "proxy.jsonl"

    @property
    def gates(self) -> Path:
        """The gates of the adapted layers."""
        return self.path / "gates.safetensors"

    @property
    def gate_results(self) -> Path:
        """Quotients and values of the gates, readable."""
        return self.path / "gates.json"

    @property
    def evaluation(self) -> Path:
        """Every number that was measured of the tuned model against its base."""
        return self.path / "evaluation.json"

    @property
    def answers(self) -> Path:
        """Prompts with the answers of base and tuned model."""
        return self.path / "answers.jsonl"

    @property
    def report(self) -> Path:
        """The report, one HTML file, where it was asked for."""
        return self.path / "report.html"

    @property
    def figures(self) -> Path:
        """The report's figures as PNG."""
        return self.path / "figures"

    @property
    def skipped(self) -> Path:
        """Rows of the data that could not be used, with the reason."""
        return self.path / "skipped.jsonl"

    @property
    def adapter(self) -> Path:
        """The adapter, as PEFT loads it."""
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """The merged model, where it was merged."""
        return self.path / "merged"

    def read_recipe(self) -> Recipe:
        """The recipe that the run was begun with.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no YAML, or no recipe.
        """
        return Recipe.model_validate(parse_yaml(read_text(self.recipe, 4 * MAX_RECIPE_LENGTH))[0])

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace run.json."""
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        atomic_write(self.manifest, text.encode("utf-8", "backslashreplace"))  # as in `write_lines`

    def remember(self, manifest: dict[str, Any], path: Path) -> None:
        """Put the checksum of a finished part into run.json, so that it is known to be whole should the run go on."""
        manifest.setdefault("files_sha256", {})[path.name] = sha256(path)
        self.write_manifest(manifest)

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Leave the lines of metrics.jsonl until a step, from which training goes on."""
        # The summary at the end of training is of its last step, too.
        lines = [(finite(line.get("step")), line) for line in read_metrics(self.metrics) if "train_runtime" not in line]
        kept = [line for reached, line in lines if reached is not None and reached <= step]
        self.write_lines(self.metrics, kept if step else [])

    def write_lines(self, path: Path, lines: Iterable[dict[str, Any]]) -> None:
        """Write one of the folder's JSONL files whole."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        atomic_write(path, text.encode("utf-8", "backslashreplace"))  # half a surrogate pair becomes JSON's own escape

    def clear(self) -> None:
        """Remove the run and nothing else; run.json goes last, so that a clearing cut short still looks like a run."""
        self.discard_unfinished()
        for folder in (self.merged, self.figures, *self.path.glob("checkpoint-*")):
            shutil.rmtree(folder, ignore_errors=True)
        for file in self.path.glob("merged-*.gguf"):
            file.unlink()
        for file in (*self._written, self.manifest):
            file.unlink(missing_ok=True)

    def discard_unfinished(self) -> None:
        """Remove what a killed process had not finished, which is hidden, and the adapter, which is made again."""
        hidden = (*self.path.glob(".checkpoint-*"), *self.path.glob(".adapter.*"), self.path / ".rehearsal")
        for folder in (self.adapter, *hidden):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (*self._written, self.manifest):
            for part in self.path.glob(f".{file.name}.*"):
                part.unlink(missing_ok=True)

    @property
    def _written(self) -> tuple[Path, ...]:
        results = (self.gate_results, self.evaluation, self.answers, self.report)
        return (self.recipe, self.metrics, self.proxy, self.gates, self.skipped, *results)


def check_run_folder(path: Path, overwrite: bool) -> None:
    """See whether a new run can have this folder, without touching it.

    Raises:
        UserError: something else is there, or a run and not `overwrite`.
    """
    try:
        if RunFolder(path).manifest.exists():
            if not overwrite:
                raise UserError(f"{path} already holds a run", "add --overwrite, or name another training.output_dir")
        elif path.exists() and any(not file.name.startswith(".") for file in path.iterdir()):
            raise UserError(f"{path} holds files that are not a run", "name another training.output_dir")
    except OSError as error:
        raise UserError(f"cannot use {path} as the run folder: {error.strerror}", "see training.output_dir") from error


def open_run_folder(path: Path, overwrite: bool) -> RunFolder:
    """An empty folder for a new run.

    Args:
        overwrite: remove the run that already exists. Files that are no part of a run are never removed.

    Raises:
        UserError: as `check_run_folder`, or the folder cannot be made.
    """
    check_run_folder(path, overwrite)
    folder = RunFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        folder.clear()
    except OSError as error:
        raise UserError(f"cannot use {path} as the run folder: {error.strerror}", "see training.output_dir") from error
    return folder
