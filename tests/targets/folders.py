"""Adapters, runs and merged models of the tiny model, written without training one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml

from folora_q.models.adapters import adapter_pairs, attach_adapter, save_adapter
from folora_q.models.hardware import choose_hardware
from folora_q.models.load import load_model
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.schema import ExportSection, ModelSection


def write_adapter(base_folder: Path, folder: Path, std: float = 0.0) -> Path:
    """An adapter of rank 2 whose B is drawn with this deviation, without a tokenizer beside it."""
    base = load_model(ModelSection(model_name_or_path=str(base_folder)), choose_hardware("float32"))
    model = attach_adapter(base, AdapterSection(r=2), 0)
    for pair in adapter_pairs(model):
        torch.nn.init.normal_(pair.b, std=std, generator=torch.Generator(pair.b.device).manual_seed(0))
    save_adapter(model, base, ExportSection(), folder)
    assert not (folder / "tokenizer_config.json").exists()
    return folder


def write_merged(model_folder: Path, folder: Path, base: Path) -> Path:
    """A model that says it is another's merge."""
    shutil.copytree(model_folder, folder)
    (folder / "merge.json").write_text(json.dumps({"base": str(base), "revision": None, "verified": True}))
    return folder


def write_run(base_folder: Path, adapter: Path, folder: Path) -> Path:
    """A finished run with this adapter, the same as its checkpoint 2, and a merged model."""
    folder.mkdir(parents=True)
    for name in ("adapter", "checkpoint-2"):
        shutil.copytree(adapter, folder / name)
    write_merged(base_folder, folder / "merged", base_folder)
    (folder / "run.json").write_text(json.dumps({"status": "finished"}))
    recipe = {
        "model": {"model_name_or_path": str(base_folder), "dtype": "float32", "attn_implementation": "eager"},
        "data": {"train_dataset": str(folder.parent / "train.jsonl")},
    }
    (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder
