"""Run folders of earlier versions, in tests/data/runs, and how one is made.

    .venv/bin/python -m tests.runs.earlier        with each release: writes tests/data/runs/VERSION

A folder is as that version wrote it, but for its place, which is {HERE} in its texts; checkpoints are untouched, since
their manifests know every byte. `logits.safetensors` is what the adapter says on its base, in float32.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from folora_q import __version__
from folora_q.cli.app import main
from tests.conftest import save_tiny_model, write_recipe

FOLDERS = Path(__file__).parents[1] / "data" / "runs"
HERE = "{HERE}"
SMALL = [
    "adapter.r=1",
    "gate.rank=4",
    "proxy.num_samples=2",
    "proxy.num_heldout_samples=1",
    "evaluation.metric=none",
    "evaluation.num_answers=1",
    "training.save_steps=3",
    "training.save_total_limit=1",
    "training.max_steps=6",
    "logging.logging_steps=1",
]
PROMPT = torch.arange(3, 19)[None]


def base_model(folder: Path) -> Path:
    """The base of all of them, with weights made of integers, which no other version of torch draws otherwise."""
    model = LlamaForCausalLM.from_pretrained(save_tiny_model(folder), dtype=torch.float32)
    with torch.no_grad():
        for number, (name, weight) in enumerate(sorted(model.named_parameters())):
            if "norm" not in name:
                spread = (torch.arange(weight.numel()) * 7919 + 104_729 * number) % 2003
                weight.copy_((spread.double() / 2003 - 0.5).view_as(weight) * 0.6)
    model.save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    """(t, vocabulary), of a fixed prompt."""
    with torch.no_grad():
        return model.eval()(PROMPT).logits[0]


def tuned(base: Path, adapter: Path) -> PeftModel:
    """By PEFT alone, in float32."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)


def texts_of(run: Path) -> list[Path]:
    """The files that name a place."""
    found = [path for path in run.rglob("*") if path.suffix in (".json", ".yaml", ".md", ".jsonl")]
    return [path for path in found if not path.relative_to(run).parts[0].startswith("checkpoint-")]


def placed(version: str, place: Path) -> Path:
    """A copy of a version's run in a place, with its base and its data."""
    base_model(place / "base")
    write_recipe(place, place / "base")
    run = Path(shutil.copytree(FOLDERS / version, place / "run"))
    for path in texts_of(run):
        path.write_text(path.read_text("utf-8").replace(HERE, str(place)), "utf-8")
    return run


def make(target: Path) -> None:
    """Train, and keep the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        recipe = write_recipe(place, base_model(place / "base"))
        try:
            main(["train", str(recipe), *SMALL])
        except SystemExit as end:
            assert not end.code
        run = place / "run"
        for path in texts_of(run):
            path.write_text(path.read_text("utf-8").replace(scratch, HERE), "utf-8")
        save_file({"logits": logits(tuned(place / "base", run / "adapter"))}, run / "logits.safetensors")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(run, target)


if __name__ == "__main__":
    make(FOLDERS / __version__)
