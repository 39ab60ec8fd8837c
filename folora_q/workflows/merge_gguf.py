"""Write a GGUF file of a merged model, measure what quantization kept of the tuning, and write Ollama's Modelfile."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from folora_q.errors import RunError
from folora_q.export.gguf import find_converter, write_gguf
from folora_q.export.gguf_check import GgufFacts
from folora_q.export.gguf_quality import TASK_AMOUNT, GgufQuality, measure_gguf
from folora_q.export.gguf_types import K_QUANTS
from folora_q.export.llama_quantize import GgufTools, find_quantizer, write_k_quant
from folora_q.export.merge import REPORT
from folora_q.export.modelfile import Modelfile, write_modelfile
from folora_q.export.texts import check_texts
from folora_q.export.verify import MergedModel
from folora_q.progress import StageTimer
from folora_q.storage.files import atomic_write

# Types whose rounding is measured on text; the others differ from the merged model by a rounding to 16 bits at most.
MEASURED = ("q8_0", *K_QUANTS)


@dataclass(frozen=True)
class GgufResult:
    """A GGUF file of the merged model.

    Attributes:
        quality: None if it was not measured.
        modelfile: for Ollama, next to the file.
    """

    path: Path
    kind: str
    facts: GgufFacts
    quality: GgufQuality | None
    modelfile: Modelfile

    def to_dict(self) -> dict[str, Any]:
        """Return the result for merge.json."""
        return {
            "file": self.path.name,
            "type": self.kind,
            **self.facts.to_dict(),
            "quality": None if self.quality is None else self.quality.to_dict(),
        }


def find_tools(kind: str, converter: Path | None, quantizer: Path | None) -> GgufTools:
    """Find the programs of llama.cpp that a type needs.

    Raises:
        UserError: one is not installed.
    """
    needed = find_quantizer(quantizer) if kind in K_QUANTS else None
    return GgufTools(find_converter(converter), needed)


def export_gguf(
    merged: MergedModel, kind: str, tools: GgufTools, compute: torch.dtype | None, timer: StageTimer
) -> GgufResult:
    """Write the file and the Modelfile next to the merged folder, and add the result to merge.json.

    Args:
        compute: the dtype to measure in; None does not measure.
    """
    folder = merged.folder
    path = folder.with_name(f"{folder.name}-{kind}.gguf")
    with timer.stage(f"writing and checking {path}", None):
        if kind in K_QUANTS:
            facts = write_k_quant(folder, path, kind, tools)
        else:
            facts = write_gguf(folder, path, kind, tools.converter)
    quality = _measured(merged, path, compute, timer) if compute is not None and kind in MEASURED else None
    modelfile = write_modelfile(folder, path, merged.merge.trust)
    if modelfile.kept is not None:
        timer.note(f"{modelfile.kept} is not folora-q's, and was left as it is; the new one is {modelfile.path}")
    result = GgufResult(path, kind, facts, quality, modelfile)
    report = json.loads((folder / REPORT).read_text("utf-8"))
    report["gguf"] = [*(each for each in report.get("gguf", []) if each["file"] != path.name), result.to_dict()]
    atomic_write(folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return result


def _measured(merged: MergedModel, path: Path, compute: torch.dtype, timer: StageTimer) -> GgufQuality | None:
    merge = merged.merge
    tokenizer = AutoTokenizer.from_pretrained(merged.folder, trust_remote_code=merge.trust.remote_code)
    texts = check_texts(merge.adapters[0][0].folder, tokenizer, TASK_AMOUNT)
    try:
        with timer.stage(f"comparing {path.name} with the trained model", 3) as done:
            return measure_gguf(path, merged, texts, compute, done)
    except RunError as error:
        timer.note(f"what the file keeps of the tuning was not measured: {error.message}")
        return None
